"""Name a run folder after the command's overrides."""

from __future__ import annotations

import hashlib
import os
import re
import shlex
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

from atfr.cli.command.arguments import parse, value_text
from atfr.engine.run.run_dir import PATHS

SWEPT = "ATFR_SWEPT"  # environment variable of a job: the comma-separated keys that have several values in its sweep; see atfr.cli.sweep
SWEEPS = Path("runs", "sweep")  # where the run folders of sweeps are
LONGEST = 100  # letters of a name


def in_sweep() -> bool:
    """Return whether this is a job of a sweep (`-m`)."""
    return HydraConfig.get().mode == RunMode.MULTIRUN


def run_folder(output_dir: str | None, *, under: str = "") -> Path:
    """Return `trainer.output_dir`, or a folder under runs/ (and there under `under`) named after the command's overrides.

    The name has no date and does not depend on the order of the overrides, so that the same command resumes. It begins with the
    choices of groups (dataset, model, model/sgs) and leaves out the folders of the data; a list appears with its file name. In a
    sweep the overrides that differ between the jobs come first.
    """
    if output_dir is not None:
        return Path(output_dir)
    overrides, free = list(HydraConfig.get().overrides.task), HydraConfig.get().job.config.override_dirname.exclude_keys
    swept = swept_part(overrides) if in_sweep() else []
    rest = [override for override in overrides if override not in swept and _key(override) not in free]
    name = folder_name([*sorted(map(_plain, swept)), *sorted(map(_without_folder, map(_plain, rest)), key=lambda override: ("." in _key(override), override))])
    return SWEEPS.parent / under / SWEEPS.name / name if in_sweep() else Path("runs", under, name)


def report_command(folder: Path) -> str:
    """Return the line that names the command for a report about a run folder or a folder of runs."""
    return f"report: python tools/report.py {shlex.quote(str(folder))}"


def swept_part(overrides: list[str]) -> list[str]:
    """Return the overrides that differ between the jobs of a sweep, or all if this is not known."""
    swept = os.environ.get(SWEPT)
    return overrides if swept is None else [override for override in overrides if _key(override) in swept.split(",")]


def folder_name(overrides: list[str]) -> str:
    """Return a folder name that needs no quotes in a shell or in hydra; if characters were replaced or cut, it ends with a hash."""
    full = ",".join(overrides)
    name = re.sub(r"[^\w.+-]+", "_", full.replace("=", "-"), flags=re.ASCII)[:LONGEST] or "default"
    if len(full) > LONGEST or re.search(r"[^\w.+=,-]", full, flags=re.ASCII):
        name += "-" + hashlib.sha256(full.encode()).hexdigest()[:8]
    return name


def _without_folder(override: str) -> str:
    """Reduce the path of an override that locates data to its last part."""
    key, _, value = override.partition("=")
    return f"{key}={os.path.basename(value)}" if key.lstrip("+") in PATHS and not value.startswith("[") else override


def _key(override: str) -> str:
    return override.partition("=")[0].lstrip("+~")


def _plain(override: str) -> str:
    """Return the override without quotes around its value."""
    parsed = parse(override)
    if parsed is None or parsed.value_type is None or parsed.is_sweep_override() or parsed.is_delete():
        return override
    return f"{override.partition('=')[0]}={value_text(parsed)}"
