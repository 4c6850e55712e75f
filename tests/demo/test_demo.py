"""``penstock demo`` as a new user runs it: real engines, printed lines pasted, killed hard, nothing left behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from penstock.serving.demo.options import DemoOptions
from tests.support.waiting import eventually

pytestmark = [pytest.mark.stack, pytest.mark.timeout(900)]

START_TIMEOUT_S = 600
"""Three interpreters import vLLM on two cores, beside whatever else the machine does."""
END_TIMEOUT_S = 90
"""Ray gives each replica up to 30 s."""
PASTE_TIMEOUT_S = 120
"""The OpenAI client takes seconds to import on a busy machine."""


class Demo:
    """One ``penstock demo``; everything it starts carries ``marker`` in its environment."""

    def __init__(self, home: Path, *options: str) -> None:
        self._output = home / "output"
        self._marker = f"XDG_CACHE_HOME={home}".encode()
        self._home = home
        with self._output.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "penstock.serving.cli", "demo", *options],
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | {"XDG_CACHE_HOME": str(home), "TMPDIR": "/tmp"},
            )

    @property
    def output(self) -> str:
        return self._output.read_text()

    def until(self, text: str) -> None:
        """Wait until it has said this."""

        def said() -> bool:
            assert text in self.output or self.process.poll() is None, self.output
            return text in self.output

        eventually(said, START_TIMEOUT_S, f"the demo says {text!r}")

    def members(self) -> list[int]:
        """The demo and all it started, however detached."""
        found = []
        for folder in Path("/proc").iterdir():
            with suppress(OSError):
                if folder.name.isdigit() and self._is_ours(folder):
                    found.append(int(folder.name))
        return found

    def _is_ours(self, folder: Path) -> bool:
        """By its environment; Redis writes its title over that, but works in its own folder."""
        marked = self._marker in (folder / "environ").read_bytes().split(b"\0")
        return marked or (folder / "cwd").readlink().is_relative_to(self._home)

    def supervisor(self) -> int:
        """The process below the one the user started."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return int(children[0])

    def kill(self) -> None:
        """As hard as can be: the guard and the supervisor at once, so that neither can clean up."""
        for pid in (self.supervisor(), self.process.pid):
            os.kill(pid, signal.SIGKILL)
        self.process.wait()

    def end(self) -> None:
        """For a test that failed."""
        self.process.kill()
        self.process.wait()
        for pid in self.members():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def left_nothing(self) -> None:
        assert self.members() == []
        assert list((self._home / "penstock" / "demo").glob("*")) == []


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    """A cache of its own, with the Kafka jars of the real one."""
    real = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "penstock"
    (tmp_path / "penstock").mkdir()
    for jars in real.glob("kafka-*"):
        (tmp_path / "penstock" / jars.name).symlink_to(jars)
    return tmp_path


def test_killed_and_started_again_then_used(home: Path) -> None:
    """The printed curl line and snippet work when pasted; Ctrl-C leaves nothing, nor does the start that was killed."""
    first = Demo(home)
    try:
        first.until("ray ready")
        first.kill()
        again = Demo(home)
        try:
            again.until("Ctrl-C ends it.")
            assert DemoOptions().prompt in again.output
            _paste(again.output)
            again.process.send_signal(signal.SIGINT)
            assert again.process.wait(END_TIMEOUT_S) == 0
            again.left_nothing()
        finally:
            again.end()
    finally:
        first.end()


def test_once_on_kafka(home: Path) -> None:
    demo = Demo(home, "--once", "--queue", "kafka", "--mixed", "1")
    try:
        assert demo.process.wait(START_TIMEOUT_S) == 0, demo.output
        assert re.search(r"TTFT \d+ ms, \d+ tokens", demo.output)
        demo.left_nothing()
    finally:
        demo.end()


def test_a_part_that_fails_says_why_first(home: Path) -> None:
    """The innermost cause, before any traceback, and exit code 1."""
    demo = Demo(home, "--once", "--mixed", "1", "--model", str(home / "no-model"))
    try:
        assert demo.process.wait(START_TIMEOUT_S) == 1
        assert "no-model" in demo.output
        assert "Traceback" not in demo.output
        assert demo.members() == []
    finally:
        demo.end()


def _paste(output: str) -> None:
    curl = next(line for line in output.splitlines() if line.startswith("curl "))
    answer = subprocess.run(["bash", "-c", curl], capture_output=True, timeout=PASTE_TIMEOUT_S, check=True).stdout
    assert answer.count(b"data: ") > 3
    assert answer.rstrip().endswith(b"data: [DONE]")
    start = output.index("from openai import OpenAI")
    snippet = output[start : output.index("\n> ", start)]
    printed = subprocess.run(
        [sys.executable, "-c", snippet], capture_output=True, timeout=PASTE_TIMEOUT_S, check=True
    ).stdout
    assert b"Penstock" in printed
