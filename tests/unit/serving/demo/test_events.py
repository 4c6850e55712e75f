"""Why a part died, out of what it wrote."""

from __future__ import annotations

from pathlib import Path

import pytest

from penstock.serving.demo.events import LogFollower, cause_of_death, parse_event

pytestmark = pytest.mark.unit


def test_events_are_read_as_the_log_grows(tmp_path: Path) -> None:
    log = tmp_path / "workers.log"
    follower = LogFollower(log)
    assert follower.events() == {}
    log.write_text('plain words\n{"event": "ray_ready", "seconds": 3}\n(ServeReplica pid=7) {"event": "engine_fai')
    assert set(follower.events()) == {"ray_ready"}
    with log.open("a") as more:
        more.write('led", "cause": "no such model"}\n')
    assert follower.events()["engine_failed"]["cause"] == "no such model"
    assert follower.events()["ray_ready"]["seconds"] == 3


@pytest.mark.parametrize("line", ["", "{}", "{not json}", '["event"]', '{"event": 3}', "} {"])
def test_lines_that_are_no_events(line: str) -> None:
    assert parse_event(line) is None


def test_an_engines_own_words_come_first(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text('ValueError: outer\n(x) {"event": "engine_failed", "cause": "CUDA out of memory"}\nRayError: last\n')
    assert cause_of_death(log) == "CUDA out of memory"


def test_first_exception_of_a_chain_is_the_cause(tmp_path: Path) -> None:
    log = tmp_path / "log"
    first = "Traceback (most recent call last):\n  File ...\nFileNotFoundError: [Errno 2] no file: 'x'\n"
    log.write_text(f"{first}\nDuring handling ...\n\nray.exceptions.RayTaskError: it failed\n")
    assert cause_of_death(log) == "FileNotFoundError: [Errno 2] no file: 'x'"


def test_what_the_command_line_says_wins_over_tracebacks(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("penstock: PENSTOCK_INGRESS_PORT='x' (environment): not a number\n")
    assert cause_of_death(log) == "PENSTOCK_INGRESS_PORT='x' (environment): not a number"


def test_silence_and_chatter(tmp_path: Path) -> None:
    assert cause_of_death(tmp_path / "none") == "it ended without a word"
    (tmp_path / "log").write_text("\n".join(f"line {n}" for n in range(100)))
    assert cause_of_death(tmp_path / "log").splitlines()[-1] == "line 99"
