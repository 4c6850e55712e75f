"""A run's folder: locked while somebody lives, swept by the next start when nobody does."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from penstock.serving.demo.processes import descendants
from penstock.serving.demo.run import Run, sweep

pytestmark = pytest.mark.unit


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "penstock" / "demo"


def test_left_over_processes_and_files_are_swept(cache: Path) -> None:
    run, lock = Run.create()
    left_over = subprocess.Popen(["sleep", "600"])
    run.record([process for process in descendants(os.getpid()) if process.pid == left_over.pid])
    os.close(lock)
    sweep()
    assert left_over.wait() == -9
    assert not run.temporary.exists()
    assert list(cache.iterdir()) == []


def test_a_run_that_lives_is_left_alone() -> None:
    run, lock = Run.create()
    sweep()
    assert run.temporary.exists()
    assert run.folder.exists()
    os.close(lock)
    sweep()
    assert not run.folder.exists()


def test_logs_of_a_failed_run_are_kept_until_the_next_start() -> None:
    run, lock = Run.create()
    run.log("workers").write_text("why")
    run.remove(keep_logs=True)
    assert run.log("workers").read_text() == "why"
    assert not run.temporary.exists()
    os.close(lock)
    sweep()
    assert not run.folder.exists()


def test_temporary_folder_leaves_room_for_the_paths_of_sockets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tempfile

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / ("deep" * 20)))
    run, lock = Run.create()
    assert len(str(run.temporary)) < 40
    run.remove(keep_logs=False)
    os.close(lock)


def test_sweep_without_any_run_does_nothing(cache: Path) -> None:
    sweep()
    assert not cache.exists()
