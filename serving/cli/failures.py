"""What a failed command tells its user: which setting is wrong, where it came from and what it should be."""

from __future__ import annotations

import os
import tomllib
from typing import NamedTuple

from pydantic import ValidationError
from pydantic_settings import SettingsError

from penstock.queue.errors import PenstockError, RequestError
from penstock.queue.settings import CONFIG_VARIABLE, DEFAULT_CONFIG, Section
from penstock.serving.cli.sections import SECTIONS, variable_of


class Explained(NamedTuple):
    """The message, and the process' exit code: 1 it failed, 2 wrong usage or settings."""

    message: str
    exit_code: int


def explain(error: Exception) -> Explained | None:
    """What to tell the user, or None for an error that is a bug and deserves its traceback."""
    if isinstance(error, ValidationError) and (section := _section(error.title)) is not None:
        return Explained("\n".join(_wrong_values(section, error)), 2)
    if isinstance(error, SettingsError):
        return Explained(f"{error}: it must be JSON ({error.__cause__})", 2)
    if isinstance(error, tomllib.TOMLDecodeError):
        return Explained(f"{_file()} is not valid TOML: {error}", 2)
    if isinstance(error, PenstockError):
        return Explained(str(error), 2 if isinstance(error, RequestError) else 1)
    return None


def _section(title: str) -> type[Section] | None:
    return next((section for section in SECTIONS if section.__name__ == title), None)


def _wrong_values(section: type[Section], error: ValidationError) -> list[str]:
    return [_wrong_value(section, detail["loc"], detail["type"], detail["msg"]) for detail in error.errors()]


def _wrong_value(section: type[Section], place: tuple[int | str, ...], kind: str, reason: str) -> str:
    if not place:
        return f"settings of [{section.section}]: {reason.removeprefix('Value error, ')}"
    where, variable = ".".join(map(str, place)), variable_of(section, str(place[0]))
    table = f"table [{section.section}] of {_file()}"
    if kind == "missing":
        return f"{variable} is not set, nor is {where} in {table}"
    if variable in os.environ:
        return f"{variable}={os.environ[variable]!r} (environment): {where}: {reason}"
    return f"{where} in {table}: {reason} (its variable is {variable})"


def _file() -> str:
    return os.environ.get(CONFIG_VARIABLE, DEFAULT_CONFIG)
