"""The supervisor process, started by the guard: ``python -m penstock.serving.demo FOLDER GUARD_PID
OPTIONS``.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from pathlib import Path

import msgspec

from penstock.serving.demo.options import DemoOptions
from penstock.serving.demo.processes import adopt_orphans, die_with_parent
from penstock.serving.demo.run import Run
from penstock.serving.demo.supervisor import supervise


def main() -> int:
    """Run the demo described by the arguments."""
    folder, guard, options = sys.argv[1:]
    signal.pthread_sigmask(signal.SIG_SETMASK, ())  # inherited from the guard, which blocks them while it starts us
    die_with_parent(int(guard))
    adopt_orphans()
    return asyncio.run(supervise(msgspec.json.decode(options, type=DemoOptions), Run.join(Path(folder))))


if __name__ == "__main__":
    sys.exit(main())
