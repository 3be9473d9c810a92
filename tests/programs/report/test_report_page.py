"""The page as HTML: names are escaped, pictures inlined, nothing is loaded from elsewhere, and its scripts run."""

from __future__ import annotations

import json
import re
import shutil
import subprocess

import pytest
from PIL import Image
from report_pages import report, write_run

NASTY = '<b>&"\' $x$'
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


def test_names_are_escaped_everywhere(tmp_path):
    write_run(tmp_path / NASTY, classes=(NASTY, "jump"), model={"size": NASTY}, name=NASTY)
    write_run(tmp_path / "other", model={"size": NASTY + "2"}, similarity="<i>")
    (tmp_path / "\udcff<u>").mkdir()
    (tmp_path / "\udcff<u>" / "config.yaml").write_text("trainer: {epochs: 3}")
    page, source, _ = report(tmp_path, folder=tmp_path)
    tags = [tag for tag, _ in page.elements]
    assert tags.count("i") == tags.count("u") == 0 and "<b>&" not in source
    for text in (f"size={NASTY}", str(tmp_path / NASTY), "<i> ", "\\udcff<u>"):
        assert text in page.text
    assert NASTY in [row[0][0] for row in page.table("classes")]


def test_examples_are_inlined_and_those_that_cannot_be_read_are_left_out(tmp_path):
    folder = write_run(tmp_path / "run") / "examples"
    folder.mkdir()
    Image.effect_noise((900, 500), 60).convert("RGB").save(folder / "large.png")
    Image.new("RGB", (30, 20), "red").save(folder / "small.png")
    (folder / "damaged.png").write_bytes((folder / "small.png").read_bytes()[:40])
    shutil.copy(folder / "small.png", tmp_path / "run" / "outside.png")
    entry = {"kind": "dearest wrong", "video": "v <1>.mp4", "view": 0, "label": "run", "prediction": "jump", "score": 0.75, "bins": 9, "gflops": 0.03}
    files = ("large.png", "small.png", "damaged.png", "gone.png", "../outside.png")
    (folder / "examples.json").write_text(json.dumps([{**entry, "file": name} for name in files] + [{}]))
    page, source, _ = report(tmp_path / "run", folder=tmp_path)
    pictures = [attributes["src"] for tag, attributes in page.elements if tag == "img"]
    assert len(pictures) == 2 and all(picture.startswith("data:image/png;base64,") for picture in pictures)
    assert len(pictures[0]) * 3 / 4 < 0.9 * (folder / "large.png").stat().st_size
    assert "4 of 6 pictures of examples/ are missing or damaged" in page.text
    assert "dearest wrong: run, taken for jump (score 0.75), B' 9, 0.03 GFLOPsv <1>.mp4" in " ".join(page.text.split())


def test_the_page_needs_no_other_file(shown):
    for _, attributes in shown[0].elements:
        for name in ("src", "href", "xlink:href", "action", "srcset"):
            assert (attributes.get(name) or "#").startswith(("#", "data:"))
    assert not re.search(r"url\((?!#)|@import|https?://(?!www\.w3\.org)", shown[1])
    ids = [attributes["id"] for _, attributes in shown[0].elements if "id" in attributes]
    assert len(ids) == len(set(ids)) and set(re.findall(r'(?:href="#|url\(#)([^")]+)', shown[1])) <= set(ids)


def test_tables_sort_and_filter_in_a_browser_without_errors(shown, tmp_path):
    if CHROMIUM is None:
        pytest.skip("needs chromium")
    script = """
    const runs = document.getElementById("runs-table"), heads = runs.tHead.rows[0].cells, found = [];
    const order = () => [...runs.tBodies[0].rows].filter((row) => !row.hidden).map((row) => row.cells[0].textContent).join("");
    found.push(order());
    heads[6].click(); found.push(order());
    heads[6].click(); found.push(order());
    heads[1].click(); found.push(order());
    const filter = document.querySelector("[data-filter=runs-table]");
    filter.value = "ATFR 0.7"; filter.dispatchEvent(new Event("input")); found.push(order());
    const classes = document.querySelector("[data-filter=classes-table]");
    classes.value = "jum"; classes.dispatchEvent(new Event("input"));
    found.push([...document.querySelectorAll("#classes-table tbody tr")].map((row) => row.hidden).join());
    document.title = found.join(" ");
    """
    file = tmp_path / "page.html"
    file.write_text(shown[1].replace("</body>", f"<script>{script}</script></body>"), encoding="utf-8")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr", "--dump-dom", f"file://{file}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    title = re.search(r"<title>(.*?)</title>", done.stdout)
    rows = shown[0].table("runs")
    assert title is not None, done.stderr
    by_cost, by_label = (sorted(range(1, len(rows) + 1), key=lambda number: rows[number - 1][column][at]) for column, at in ((6, 1), (1, 0)))
    dearest_first = sorted(by_cost, key=lambda number: (-rows[number - 1][6][1], number))
    assert title[1].split() == ["".join(map(str, order)) for order in (range(1, len(rows) + 1), dearest_first, by_cost, by_label, [2])] + ["false,true"]
    assert "CONSOLE" not in done.stderr and "Refused" not in done.stderr
