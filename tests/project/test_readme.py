"""The documentation is true: its commands are accepted, its Python runs, its links and figures are right."""

from __future__ import annotations

import argparse
import csv
import json
import re
import runpy
import shlex
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import pytest
import torch
from hydra import compose, initialize_config_dir
from miniatures import _videos as write_videos
from run_tools import ROOT, run_tool, small_job

PAGES = {path.relative_to(ROOT).as_posix(): path.read_text() for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "studies/claim/README.md", *sorted((ROOT / "docs").glob("*.md")))}
LANGUAGES = {"bash", "python", "yaml", "diff", "text", "bibtex"}
HYDRA = ("tools/train.py", "tools/test.py", "tools/calibrate.py", "tools/export.py", "tools/flops.py", "tools/predict.py", "scripts/prepare.py")
SMALLER = (('"x3d_s"', '"x3d_tiny"'), ("13, 160, 160", "8, 48, 48"))  # a network and clips of the same kind that take a second


class Block(NamedTuple):
    page: str
    language: str
    tag: str
    text: str


BLOCKS = [Block(page, *match) for page, text in PAGES.items() for match in re.findall(r"^```(\S*) ?([^\n]*)\n(.*?)^```$", text, flags=re.S | re.M)]
IN_BLOCKS = [(b.page, line) for b in BLOCKS if b.language == "bash" for line in b.text.replace("\\\n", " ").splitlines()]
INLINE = [(page, command) for page, text in PAGES.items() for command in re.findall(r"`((?:python|pytest|pip|make) [^`\n]+)`", text)]
COMMANDS = sorted({(page, " ".join(words)) for page, line in IN_BLOCKS + INLINE if (words := [shlex.quote(word) for word in shlex.split(line, comments=True)])})
FILES = {block.tag.removeprefix("file="): block for block in BLOCKS if block.tag.startswith("file=")}


def test_the_first_screen_is_a_sentence_a_figure_commands_and_python():
    lines = PAGES["README.md"].splitlines()
    assert len(lines) <= 120
    first = "\n".join(lines[:30])
    assert "docs/figure.png" in first and (ROOT / "docs/figure.png").stat().st_size <= 200_000
    assert [block.language for block in BLOCKS if block.page == "README.md"][:2] == ["bash", "python"]
    assert first.index("make quickstart") < first.index("dataset=videolist") < first.index("dataset=kinetics400") < first.index("import atfr")


def test_every_block_names_its_language():
    assert all(text.count("```") % 2 == 0 for text in PAGES.values())
    assert {block.language for block in BLOCKS if block.page != "docs/annotations.md"} <= LANGUAGES


@pytest.mark.parametrize("page,command", COMMANDS)
def test_every_command_is_accepted(page, command, monkeypatch):
    words = [word for word in shlex.split(command) if not re.fullmatch(r"[A-Z]+=\S*", word)]  # without PYTHONPATH=.
    script = next((word for word in words if word.endswith((".py", ".sbatch"))), None)
    if words[0] == "make":
        assert set(words[1:]) <= set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.M))
    elif words[:3] == ["pip", "install", "-e"]:
        setup = ConfigParser()
        setup.read(ROOT / "setup.cfg")
        assert set(re.findall(r"\w+", words[3])) <= set(setup["options.extras_require"])
    elif words[0] == "pytest":
        assert all((ROOT / word).exists() for word in words[1:] if "/" in word)
    elif words[0] == "tensorboard":
        assert words[1] == "--logdir" and words[2].split("/")[0] == "runs"
    elif script == "scripts/slurm/train.sbatch" or script in HYDRA:
        assert (ROOT / script).is_file()
        accepted_by_hydra(script, words[words.index(script) + 1 :])
    else:
        assert words[0] == "python", f"{command}: not a command that this test knows"
        accepted_by_argparse(words[1:], monkeypatch)


def accepted_by_hydra(script: str, arguments: list[str]) -> None:
    """Compose the config of the first job."""
    if "hydra/launcher=slurm" in arguments:
        pytest.importorskip("submitit")
    if any(argument.startswith("--config-dir") for argument in arguments):
        return  # these run in the tests of docs/extending.md
    overrides = [re.sub(r"=([\w.]+),.*", r"=\1", argument) for argument in arguments if "=" in argument]
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        compose(Path(script).stem, overrides)


def accepted_by_argparse(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the script until its arguments are parsed."""
    parse = argparse.ArgumentParser.parse_known_args

    class Parsed(Exception):
        pass

    def parse_known_and_stop(self: argparse.ArgumentParser, *given: object) -> None:
        parse(self, *given)
        raise Parsed

    def parse_and_stop(self: argparse.ArgumentParser, *given: object) -> None:
        _, unknown = parse(self, *given)
        assert not unknown
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", parse_known_and_stop)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    monkeypatch.setattr(sys, "argv", [str(ROOT / arguments[0]), *arguments[1:]])
    monkeypatch.syspath_prepend(str((ROOT / arguments[0]).parent))
    with pytest.raises(Parsed):
        runpy.run_path(sys.argv[0], run_name="__main__")


@pytest.mark.parametrize("page,path", sorted({(page, path) for page, text in PAGES.items() for path in re.findall(r"`((?:atfr|configs|tools|benchmarks|scripts|studies|tests)/[a-z0-9_/.-]*)`", text)}))
def test_every_file_that_is_named_exists(page, path):
    assert (ROOT / path).exists()


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_to_a_page_and_a_heading(page):
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", PAGES[page]):
        name, _, anchor = target.partition("#")
        file = (ROOT / page).parent / name if name else ROOT / page
        assert file.exists(), target
        headings = {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in re.findall(r"^#+ (.*)$", file.read_text(), flags=re.M)} if anchor else set()
        assert not anchor or anchor in headings, target


def test_every_page_is_in_the_index():
    pages = {page.removeprefix("docs/") for page in PAGES if page.startswith("docs/")} - {"index.md"}
    assert pages == set(re.findall(r"\]\(([\w-]+\.md)\)", PAGES["docs/index.md"]))


RUN = [b for b in BLOCKS if b.language == "python" and not b.tag]


@pytest.mark.parametrize("block", [pytest.param(b, id=b.page, marks=() if b.page == "README.md" or len(b.text.splitlines()) < 12 else pytest.mark.slow) for b in RUN])
def test_every_python_example_runs(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = block.text
    for long, short in SMALLER:
        text = text.replace(long, short)
    exec(compile(text, block.page, "exec"), {"__name__": "example"})


@pytest.mark.slow
def test_a_run_classifies_a_video_as_the_example_says(small_videos, tmp_path, monkeypatch, capsys):
    (block,) = [b for b in BLOCKS if b.tag == "run"]
    monkeypatch.chdir(tmp_path)
    assert run_tool("train", *small_job(small_videos, tmp_path / "runs/default", "trainer.max_steps=1", "trainer.test=false")).code == 0
    write_videos(tmp_path, ["video.mp4"])
    exec(compile(block.text, block.page, "exec"), {"__name__": "example"})
    assert "GFLOPs" in capsys.readouterr().out


@pytest.fixture
def examples(tmp_path, monkeypatch):
    """The files of docs/extending.md, in the working directory and importable."""
    for name, block in FILES.items():
        assert block.page == "docs/extending.md" and len(block.text.splitlines()) < 40
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(block.text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


@pytest.mark.slow
def test_the_network_of_a_library_that_the_example_names_can_meet_the_default_budget(tmp_path, monkeypatch):
    (command,) = [line for block in BLOCKS if block.page == "docs/extending.md" for line in block.text.splitlines() if "model=custom_sgs" in line]
    monkeypatch.chdir(tmp_path)
    outcome = run_tool("train", *shlex.split(command)[2:], "dry_run=true", "trainer.accelerator=cpu")
    assert outcome.code == 0, outcome.err
    assert "runs packed; with SGS: a clip that keeps B'" in outcome.out


@pytest.mark.slow
def test_the_backbone_of_the_example_runs_with_sgs(examples):
    outcome = run_tool("train", "--config-dir=.", "model=my_backbone", "dry_run=true", "trainer.accelerator=cpu")
    assert outcome.code == 0, outcome.err
    assert "runs packed; with SGS: a clip that keeps B'" in outcome.out
    assert "one clip of 16 frames, 48 x 48" in outcome.out  # of the built-in videos, as the page says


def test_the_dataset_of_the_example_is_read(examples):
    write_videos(examples / "videos", [f"{split}/{label}/{i}.mp4" for split in ("train", "test") for label in ("jump", "run") for i in range(2)])
    outcome = run_tool("train", "--config-dir=.", "model=my_backbone", "dataset=my_dataset", f"dataset.root={examples}/videos", "dry_run=true", "trainer.accelerator=cpu", "trainer.batch_size=2")
    assert outcome.code == 0, outcome.err
    assert "my_dataset, 2 classes" in outcome.out and "4 train, 4 val, 4 test" in outcome.out


def test_the_dataset_of_the_example_names_the_option_of_its_folder(examples):
    outcome = run_tool("train", "--config-dir=.", "dataset=my_dataset", "dataset.root=", "trainer.accelerator=cpu")
    assert outcome.code == 1 and "/train is not a folder; dataset.root is the folder that holds train and test\n" in outcome.err, outcome.err


def test_the_similarity_of_the_example_agrees_with_its_loop(tmp_path):
    (diff,), (example,) = ([b for b in BLOCKS if b.language == "diff"], [b for b in BLOCKS if b.tag == "patched"])
    file = Path("atfr/models/sgs/functional.py")
    source = (ROOT / file).read_text()
    for hunk in re.split(r"^@@$", diff.text, flags=re.M)[1:]:
        lines = hunk.strip("\n").splitlines()
        old, new = ("\n".join(line[1:] for line in lines if line[0] in kept) for kept in (" -", " +"))
        assert source.count(old) == 1, f"docs/extending.md changes lines that {file} does not have: {old}"
        source = source.replace(old, new)
    subprocess.run(["cp", "-r", str(ROOT / "atfr"), str(tmp_path)], check=True)
    (tmp_path / file).write_text(source)
    done = subprocess.run([sys.executable, "-c", f"import torch\ntorch.manual_seed(0)\n{example.text}"], cwd=tmp_path, capture_output=True, text=True, env={"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 0, done.stderr


def test_a_packed_operation_of_the_example_treats_each_clip_alone():
    from atfr.models.packed.segments import Segments

    (block,) = [b for b in BLOCKS if b.page == "docs/packed-execution.md" and b.language == "python"]
    names: dict = {}
    exec(compile(block.text, block.page, "exec"), names)
    module, clips = names["SubtractClipMean"](), [torch.randn(1, 2, length, 3, 3) for length in (2, 5, 3)]
    segments = Segments((2, 5, 3), 5, torch.zeros(10))
    packed, after = module.packed_forward((torch.cat(clips, dim=2), segments))
    assert after is segments
    torch.testing.assert_close(packed, torch.cat([module(clip) for clip in clips], dim=2))


def rows_of(page: str, start: str) -> list[list[str]]:
    """The cells of the rows of a page's tables that begin so."""
    return [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in PAGES[page].splitlines() if line.startswith(start)]


def test_the_accuracies_of_the_readme_are_those_of_the_rows_of_the_study():
    rows = list(csv.DictReader((ROOT / "studies/claim/rows.csv").open()))
    checked = rows_of("README.md", "| `python studies/claim/claim.py")
    assert len(checked) >= 4
    for command, *cells in checked:
        words = shlex.split(command)
        data = f"{words[words.index('--data') + 1]}-{words[words.index('--networks') + 1]}"
        methods = words[words.index("--methods") + 1 :][:3]
        seeds = words[words.index("--seeds") + 1 :] if "--seeds" in words else ["0", "1", "2"]
        found = {m: [row for row in rows if (row["data"], row["method"], row["budget"]) == (data, m, "") and row["seed"] in seeds] for m in methods}
        assert all(len(f) == len(seeds) for f in found.values()), command
        values = [mean(float(row["balanced"]) for row in found[m]) for m in methods]
        sgs = found[methods[1]]
        expected = [*(f"{value:.1f}" for value in values), f"{mean(float(row['gflops']) for row in sgs):.2f}", f"{mean(float(row['time']) for row in sgs):.2f}"]
        assert cells == expected, command


def test_the_speeds_of_the_documents_are_those_that_were_measured():
    measured = {(row["model"], row["distribution"]): row for row in json.loads((ROOT / "benchmarks/results/adaptive_speed-cpu.json").read_text()) if row["batch"] == 8 and row["way"] == "packed"}
    for command, *cells in rows_of("README.md", "| `python benchmarks/adaptive_speed.py"):
        row = measured[shlex.split(command)[3], "equal"]
        assert cells == ["", "", "", f"{row['flops']:.2f}", f"{row['time']:.2f}"], command
    table = [cells for cells in rows_of("docs/results.md", "| ") if tuple(cells[:2]) in measured]
    assert len(table) == 12
    for model, distribution, *cells in table:
        row = measured[model, distribution]
        assert cells == [f"{row[key]:.2f}" for key in ("flops", "time", "efficiency")]
