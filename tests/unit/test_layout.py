"""The layout's traps: a package nobody ships, and a `queue` that shadows the standard library's."""

from __future__ import annotations

import queue
import re
import sysconfig
import tomllib
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[2]
SOURCES = ("queue", "workers", "serving", "autoscaling", "kuberay")


def test_every_folder_of_code_is_a_package_of_the_wheel() -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {path.parent for top in SOURCES for path in (ROOT / top).rglob("*.py")} | {ROOT / "queue" / "lua"}
    wanted = {f"penstock.{folder.relative_to(ROOT).as_posix().replace('/', '.')}" for folder in folders}
    assert set(setuptools["packages"]) == wanted
    assert {name: ROOT / path for name, path in setuptools["package-dir"].items()} == {
        f"penstock.{folder.relative_to(ROOT).as_posix().replace('/', '.')}": folder for folder in folders
    }


def test_queue_is_the_standard_librarys() -> None:
    assert not (ROOT / "queue" / "__init__.py").exists()
    assert Path(queue.__file__ or "").parent == Path(sysconfig.get_path("stdlib"))


def test_docs_name_tests_that_exist() -> None:
    """`file.py::test`, and `::test` of the file last named like that."""
    tests: dict[str, str] = {}
    for path in (ROOT / "tests").rglob("test_*.py"):
        tests[path.name] = tests.get(path.name, "") + path.read_text()
    missing = []
    for page in (ROOT / "docs").rglob("*.md"):
        file = ""
        for named, test in re.findall(r"`(?:[\w/]*?(test_\w+\.py))?(?:::(\w+))?`", page.read_text()):
            file = (test and named) or file
            if (named and named not in tests) or (test and f"def {test}(" not in tests.get(file, "")):
                missing.append(f"{page.name}: {named}::{test}")
    assert not missing
