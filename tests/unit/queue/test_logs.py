"""Whatever a process or its libraries log is one JSON line, with the process on it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

pytestmark = pytest.mark.unit
SCRIPT = """
import logging, threading, warnings
import structlog
from penstock.queue.logs import Unless, configure_logging
configure_logging("ingress")
logging.getLogger().handlers[0].addFilter(Unless(KeyError))
structlog.get_logger().info("ours", request_id="r")
logging.getLogger("vllm.engine").warning("two\\nlines %d", 7)
logging.getLogger("uvicorn.error").info("nobody wants to know")
for error in (ZeroDivisionError, KeyError):
    try:
        raise error
    except error:
        logging.getLogger("vllm").exception("it broke")
warnings.warn("careful")
thread = threading.Thread(target=lambda: logging.getLogger("lib").error("elsewhere"))
thread.start()
thread.join()
"""


def test_every_line_is_one_event() -> None:
    found = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True, timeout=60)
    lines = [json.loads(line) for line in found.stderr.splitlines()]
    assert [line["process"] for line in lines] == ["ingress"] * 5
    assert all("timestamp" in line for line in lines)
    ours, two, broke, warned, thread = lines
    assert (ours["event"], ours["level"], ours["request_id"]) == ("ours", "info", "r")
    assert (two["event"], two["level"], two["logger"]) == ("two\nlines 7", "warning", "vllm.engine")
    assert "ZeroDivisionError" in broke["exception"]
    assert "careful" in warned["event"]
    assert (thread["event"], thread["level"]) == ("elsewhere", "error")
