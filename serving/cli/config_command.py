"""``penstock config``: every setting with its value, its variable and where the value comes from."""

from __future__ import annotations

import json
import os
import sys
from typing import Any
from urllib.parse import urlsplit

import click

from penstock.queue.settings import Section
from penstock.serving.cli.failures import Explained, explain
from penstock.serving.cli.sections import RESERVED, SECTIONS, variable_of

OPEN = frozenset({"endpoint_url", "region_name"})
"""Options of a file system that are shown."""


@click.command("config")
def command() -> None:
    wrong = [explained for section in SECTIONS if (explained := _print(section))]
    for variable in _unknown():
        click.echo(f"warning: {variable} is set, and no setting has that name", err=True)
    for explained in wrong:
        click.echo(f"penstock: {explained.message}", err=True)
    sys.exit(max((explained.exit_code for explained in wrong), default=0))


def _print(section: type[Section]) -> Explained | None:
    click.echo(f"[{section.section}]")
    try:
        values = section()
    except Exception as error:
        if explained := explain(error):
            return explained
        raise
    for name in section.model_fields:
        click.echo(_line(section, values, name))
    click.echo()
    return None


def _line(section: type[Section], values: Section, name: str) -> str:
    variable = variable_of(section, name)
    value = values.model_dump(mode="json")[name]
    if section.model_fields[name].json_schema_extra:
        value = _masked(value)
    elif isinstance(value, str):
        value = _without_password(value)
    return f"{name} = {json.dumps(value)}  # {variable}, {_origin(variable, name in values.model_fields_set)}"


def _origin(variable: str, given: bool) -> str:
    if variable in os.environ:
        return "environment"
    return "file" if given else "default"


def _masked(value: Any, name: str = "") -> Any:
    """Every text inside, but for addresses: which of a client's options are secrets only the client knows."""
    if isinstance(value, dict):
        return {key: _masked(inner, key) for key, inner in value.items()}
    if isinstance(value, list):
        return [_masked(inner, name) for inner in value]
    if isinstance(value, str):
        return _without_password(value) if name in OPEN else "***"
    return value


def _without_password(value: str) -> str:
    password = urlsplit(value).password if "://" in value else None
    return value.replace(f":{password}@", ":***@") if password else value


def _unknown() -> list[str]:
    known = {variable_of(section, name) for section in SECTIONS for name in section.model_fields} | RESERVED
    return sorted(name for name in os.environ if name.startswith("PENSTOCK_") and name not in known)
