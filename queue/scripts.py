"""Sources of the Lua scripts that ship beside the modules."""

from __future__ import annotations

from pathlib import Path


def script(name: str) -> str:
    """Source of ``lua/{name}.lua``.

    Found by path: ``importlib.resources`` refuses a folder without ``__init__.py`` in an editable install.
    """
    return Path(__file__).with_name("lua").joinpath(f"{name}.lua").read_text()
