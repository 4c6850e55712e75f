"""Nothing a process has started escapes it, and nobody else's process is ever touched."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from penstock.serving.demo.processes import Process, descendants, end

pytestmark = pytest.mark.unit

FOREST = """
import subprocess, sys, time
from penstock.serving.demo.processes import adopt_orphans, descendants, end_descendants
import os
adopt_orphans()
# a grandchild in a session of its own, whose parent ends at once: an orphan that was detached on purpose
child = "import subprocess, sys; subprocess.Popen(['sleep', '600'], start_new_session=True)"
subprocess.run([sys.executable, "-c", child], check=True)
subprocess.Popen(["sh", "-c", "trap '' TERM; sleep 600; true"])
while len(descendants(os.getpid())) < 3:
    time.sleep(0.01)
print(len(descendants(os.getpid())), flush=True)
end_descendants()
print(len(descendants(os.getpid())), flush=True)
"""


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(["sleep", "600"])
    yield process
    process.kill()
    process.wait()


def _identity(parent: int, pid: int) -> Process:
    return next(process for process in descendants(parent) if process.pid == pid)


def test_all_descendants_end_detached_and_stubborn_ones_too() -> None:
    done = subprocess.run([sys.executable, "-c", FOREST], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["3", "0"]


def test_a_reused_process_id_is_left_alone(sleeper: subprocess.Popen[bytes]) -> None:
    import os

    found = _identity(os.getpid(), sleeper.pid)
    end([Process(found.pid, found.started - 1)])
    assert sleeper.poll() is None
    end([found])
    assert sleeper.wait() == -9


def test_ending_what_is_gone_is_no_error(sleeper: subprocess.Popen[bytes]) -> None:
    import os

    found = _identity(os.getpid(), sleeper.pid)
    sleeper.kill()
    sleeper.wait()
    end([found])
    assert not Path(f"/proc/{found.pid}").exists()
