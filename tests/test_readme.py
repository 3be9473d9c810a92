"""What the README tells a newcomer to type exists and is accepted."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = "\n".join(re.findall(r"```\n(.*?)```", README, flags=re.S)).replace("\\\n", " ")
COMMANDS = [line.split("#")[0].strip() for line in BLOCKS.splitlines() if "tools/" in line or "scripts/prepare" in line]


def test_the_two_commands_of_a_newcomer_come_first_and_are_in_the_makefile():
    first = README.split("```")[1]
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.M)
    assert re.findall(r"make (\w+)", first) == ["quickstart", "test"]
    assert {"quickstart", "test"} <= set(targets)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_of_the_readme_names_a_program_and_options_that_exist(command):
    if "hydra/launcher=slurm" in command:
        pytest.importorskip("submitit")
    words = command.split()
    program = next(word for word in words if word.startswith(("tools/", "scripts/")))
    assert (ROOT / program).is_file()
    overrides = [word for word in words[words.index(program) + 1 :] if "=" in word]
    singles = [re.sub(r"=(\w+),.*", r"=\1", override) for override in overrides]  # a sweep's first job
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        compose(Path(program).stem, singles)


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`((?:atfr|configs|tools|benchmarks|scripts|tests)/[\w/.]*)`", README))))
def test_every_file_and_folder_that_the_readme_names_is_there(path):
    assert (ROOT / path).exists()
