"""The process the user starts: it passes signals on to the supervisor and cleans up if that is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from types import FrameType

import msgspec

from penstock.serving.demo.options import DemoOptions
from penstock.serving.demo.processes import adopt_orphans, end_descendants
from penstock.serving.demo.run import Run, sweep

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def run_demo(options: DemoOptions) -> int:
    """Run the demo in a supervisor of its own; returns the exit code."""
    sweep()
    adopt_orphans()
    run, lock = Run.create()
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)  # until there is a supervisor to pass them on to
    supervisor = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "penstock.serving.demo",
            run.folder,
            str(os.getpid()),
            msgspec.json.encode(options),
        ],
        pass_fds=[lock],
        start_new_session=True,  # a Ctrl-C reaches the guard alone, which passes it on once
    )
    _pass_signals_to(supervisor)
    code = supervisor.wait()
    end_descendants()
    run.remove(keep_logs=code == 1)
    return code if code >= 0 else 128 - code


def _pass_signals_to(supervisor: subprocess.Popen[bytes]) -> None:
    def forward(number: int, frame: FrameType | None) -> None:
        supervisor.send_signal(number)

    for number in _SIGNALS:
        signal.signal(number, forward)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
