"""Private servers live as long as whoever started them, and no longer."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest
import redis

from penstock.queue.local import kafka_broker, redis_server
from penstock.queue.local.kafka_broker import KafkaBroker
from penstock.queue.local.process import ServerError
from penstock.queue.local.redis_server import RedisServer
from tests.contract.servers import Server, start

pytestmark = pytest.mark.contract

STARTER = """
import sys
from pathlib import Path
from penstock.queue.local.redis_server import RedisServer
server = RedisServer(Path(sys.argv[1]))
server.start()
print(server.process.pid, flush=True)
sys.stdin.read()
"""


@pytest.fixture(params=[RedisServer, KafkaBroker])
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Server:
    """One of each, not started."""
    made: Server = request.param(tmp_path / "server")
    return made


def test_stops_by_itself_and_starts_again(server: Server) -> None:
    start(server)
    assert server.process is not None
    first = psutil.Process(server.process.pid)
    server.stop()
    server.stop()
    assert not first.is_running()
    with server:
        assert server.process.alive
    assert not server.process.alive


def test_data_survives_a_crash(tmp_path: Path) -> None:
    server = RedisServer(tmp_path)
    start(server)
    with redis.Redis.from_url(server.url) as client:
        client.set("answer", 42)
    server.kill()
    server.start()
    with redis.Redis.from_url(server.url) as client:
        assert client.get("answer") == b"42"
    server.stop()


@pytest.mark.parametrize("paused", [False, True])
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_dies_with_its_starter(tmp_path: Path, how: signal.Signals, paused: bool) -> None:
    """Also when it stands still because of a signal."""
    start(probe := RedisServer(tmp_path / "probe"))
    probe.stop()
    starter = subprocess.Popen(
        [sys.executable, "-c", STARTER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert starter.stdout is not None
    assert starter.stdin is not None
    child = psutil.Process(int(starter.stdout.readline()))
    if paused:
        child.suspend()
    starter.send_signal(how)
    starter.wait()
    child.wait(timeout=30)
    starter.stdout.close()
    starter.stdin.close()


def test_outlives_the_thread_that_started_it(tmp_path: Path) -> None:
    start(probe := RedisServer(tmp_path / "probe"))
    probe.stop()
    server = RedisServer(tmp_path)
    thread = threading.Thread(target=server.start)
    thread.start()
    thread.join()
    with redis.Redis.from_url(server.url) as client:
        assert client.ping()
    server.stop()


def test_another_server_on_the_port_is_not_mistaken_for_ours(tmp_path: Path) -> None:
    start(first := RedisServer(tmp_path / "first"))
    with pytest.raises(ServerError, match="already uses its port"):
        RedisServer(tmp_path / "second", port=first.port).start()
    first.stop()


def test_a_failed_start_shows_the_log(tmp_path: Path) -> None:
    """Whatever this Redis calls its append-only data: a folder since 7.0, a file before."""
    start(server := RedisServer(tmp_path))
    server.stop()
    (data,) = tmp_path.glob("appendonly*")
    shutil.rmtree(data) if data.is_dir() else data.unlink()
    data.write_text("not a folder") if data.suffix == "" else data.mkdir()
    with pytest.raises(ServerError, match=r"(?s)did not start.*"):
        server.start()


def test_a_missing_program_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(redis_server.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ServerError, match="install Redis"):
        redis_server.find_redis_server()
    with pytest.raises(ServerError, match="Maven"):
        kafka_broker.kafka_jars(tmp_path / "jars")
    with pytest.raises(ServerError, match="Java"):
        KafkaBroker(tmp_path / "kafka", jars=tmp_path).start()
