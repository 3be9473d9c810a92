"""Quote command-line values that hydra's grammar refuses, such as paths that begin with `~` or are not ASCII."""

from __future__ import annotations

import os
from typing import Callable

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException

OPENING, CLOSING, QUOTES = "([{", ")]}", "'\""
HYDRA_FLAGS = (
    *("help", "hydra-help", "version", "cfg", "resolve", "package", "run", "multirun", "shell-completion"),
    *("config-path", "config-name", "config-dir", "experimental-rerun", "info"),
)
TOP_PATHS = ("init_from", "checkpoint", "root", "output")  # paths at the top of a config; no config group has these names


def is_override(argument: str) -> bool:
    return argument.startswith("~") or ("=" in argument and not argument.startswith("-"))


def is_sweep(arguments: list[str]) -> bool:
    return any(argument in ("-m", "--multirun", "hydra.mode=MULTIRUN") for argument in arguments)


def quote_where_needed(arguments: list[str]) -> list[str]:
    """Quote the values that hydra cannot parse.

    Other arguments stay unchanged, with one exception: a path with commas is one value if it exists, or if the command is not a
    sweep. With `-m`, the values of a comma list are quoted one by one.
    """
    sweep = is_sweep(arguments)
    return [_quoted_argument(argument, sweep) if is_override(argument) and not argument.startswith("~") else argument for argument in arguments]


def quoted(text: str) -> str:
    """Quote a text as one string of hydra's grammar."""
    return QuotedString(text, Quote.single).with_quotes()


def parse(argument: str) -> Override | None:
    """Parse an argument; None if hydra cannot."""
    try:
        return OverridesParser.create().parse_override(argument)
    except (HydraException, ValueError):
        return None


def value_text(override: Override) -> str:
    """Return the value of an override that is not a sweep as text without quotes."""
    value = override.value()
    return value if isinstance(value, str) else override.get_value_element_as_str()


def _quoted_argument(argument: str, sweep: bool) -> str:
    key, _, value = argument.partition("=")
    if key.startswith("hydra.") and value.startswith("~"):  # hydra does not expand ~; our own options are expanded by atfr.cli.command.home
        argument = f"{key}={os.path.expanduser(value)}"
        value = argument.partition("=")[2]
    value, override = value.strip(), parse(argument)
    if override is not None:
        one_path = override.is_sweep_override() and "/" in value and ("." in key or key in TOP_PATHS)
        return f"{key}={quoted(value)}" if one_path and (not sweep or os.path.exists(os.path.expanduser(value))) else argument
    mended = f"{key}={_mended(value, lambda text: parse(f'{key}={text}') is not None, split=sweep)}"
    return argument if parse(mended) is None else mended


def refuse_flags(arguments: list[str], full_name: Callable[[str], str] = str) -> None:
    """Raise HydraException at the first argument that is written like a flag and is none of hydra's.

    Args:
        full_name: maps the name of the flag to the option that may be meant.
    """
    for place, argument in enumerate(arguments):
        name, _, value = argument[2:].partition("=")
        if argument.startswith("--") and not any(flag.startswith(name) for flag in HYDRA_FLAGS):
            following = arguments[place + 1] if place + 1 < len(arguments) and not is_override(arguments[place + 1]) else "VALUE"
            raise HydraException(f"{argument} is not an option: options are KEY=VALUE, such as {full_name(name)}={value or following}")


def _mended(value: str, parses: Callable[[str], bool], *, split: bool) -> str:
    if parses(value):
        return value
    if value.startswith("[") and value.endswith("]"):
        return f"[{','.join(_mended(part, parses, split=False) for part in _split(value[1:-1]))}]"
    parts = _split(value)
    if split and len(parts) > 1 and not os.path.exists(os.path.expanduser(value)):
        return ",".join(_mended(part, parses, split=False) for part in parts)
    return value if value.startswith((*OPENING, *QUOTES)) else quoted(value)


def _split(text: str) -> list[str]:
    """Split at the commas outside of brackets and quotes. Unbalanced brackets or quotes are treated as part of a path."""
    parts, depth, quote = [""], 0, ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in QUOTES:
            quote = letter
        elif letter in OPENING + CLOSING:
            depth += 1 if letter in OPENING else -1
        if letter == "," and depth == 0 and not quote:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in (text.split(",") if depth or quote else parts)]
