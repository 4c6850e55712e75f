"""The command line: light, and plain about what is wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit
HEAVY = ("pydantic", "redis", "ray", "vllm", "torch", "prometheus_client", "httpx", "rich")


def penstock(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PENSTOCK_")}
    return subprocess.run(
        [sys.executable, "-m", "penstock.serving.cli", *words],
        env=inherited | {"PENSTOCK_MODEL_PATH": "org/model"} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_help_names_all_commands_and_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom penstock.serving.cli import cli\n"
        "try: cli(['--help'])\n"
        "finally: print('LOADED', sorted(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = done.stdout.split("LOADED")[1]
    assert [name for name in HEAVY if f"'{name}'" in loaded] == []
    assert all(name in done.stdout for name in ("demo", "ingress", "workers", "keys", "queue", "config"))


@pytest.mark.parametrize(
    "words", [["demo"], ["ingress"], ["workers"], ["keys", "create"], ["queue", "depth"], ["config"]]
)
def test_every_command_has_help(words: list[str]) -> None:
    done = penstock(*words, "--help")
    assert done.returncode == 0
    assert f"Usage: python -m penstock.serving.cli {' '.join(words)}" in done.stdout


def test_a_local_batch_may_be_of_any_length(tmp_path: Path) -> None:
    """The last line's mistake is what keeps this one from being run."""
    line = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"model": "penstock-demo"}}
    lines = tmp_path / "in.jsonl"
    lines.write_text("".join(json.dumps(line | {"custom_id": name}) + "\n" for name in "abb"))
    done = penstock("batch", "run", str(lines), "-o", str(tmp_path / "out"), PENSTOCK_BATCHES_MAX_LINES="1")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "line 3: duplicate_custom_id: The custom_id of line 2 is used again.\n"


def test_version() -> None:
    assert penstock("--version").stdout.startswith("penstock, version ")


def test_unknown_command_is_wrong_usage() -> None:
    done = penstock("fly")
    assert (done.returncode, "No such command 'fly'" in done.stderr) == (2, True)


def test_config_shows_value_name_and_origin(tmp_path: Path) -> None:
    file = tmp_path / "p.toml"
    file.write_text('[redis]\nnamespace = "mine:"\n')
    done = penstock("config", PENSTOCK_CONFIG=str(file), PENSTOCK_REDIS_URL="redis://me:secret@host:1/0")
    assert done.returncode == 0
    assert 'url = "redis://me:***@host:1/0"  # PENSTOCK_REDIS_URL, environment' in done.stdout
    assert 'namespace = "mine:"  # PENSTOCK_REDIS_NAMESPACE, file' in done.stdout
    assert "retention_s = 3600  # PENSTOCK_REDIS_RETENTION_S, default" in done.stdout


def test_config_shows_no_secrets_of_the_file_store() -> None:
    options = '{"key": "me", "secret": "hush", "client_kwargs": {"endpoint_url": "http://s3:1", "verify": false}}'
    done = penstock("config", PENSTOCK_FILES_STORAGE_OPTIONS=options)
    shown = '{"key": "***", "secret": "***", "client_kwargs": {"endpoint_url": "http://s3:1", "verify": false}}'
    assert done.returncode == 0
    assert f"storage_options = {shown}  # PENSTOCK_FILES_STORAGE_OPTIONS, environment" in done.stdout


def test_wrong_value_in_the_environment() -> None:
    done = penstock("config", PENSTOCK_INGRESS_PORT="99999")
    assert done.returncode == 2
    assert "PENSTOCK_INGRESS_PORT='99999' (environment): port: Input should be less than" in done.stderr


def test_wrong_value_and_unknown_name_in_the_file(tmp_path: Path) -> None:
    file = tmp_path / "p.toml"
    file.write_text('[ingress]\nprot = 1\n[ingress.deadline_s]\nbatch = "soon"\n')
    done = penstock("config", PENSTOCK_CONFIG=str(file))
    assert done.returncode == 2
    assert f"prot in table [ingress] of {file}" in done.stderr
    assert f"deadline_s.batch in table [ingress] of {file}" in done.stderr


def test_file_that_is_not_toml(tmp_path: Path) -> None:
    file = tmp_path / "p.toml"
    file.write_text("[ingress\n")
    done = penstock("keys", "list", PENSTOCK_CONFIG=str(file))
    assert (done.returncode, f"{file} is not valid TOML" in done.stderr) == (2, True)


def test_setting_that_must_be_given_is_named() -> None:
    done = penstock("config", PENSTOCK_MODEL_PATH="")
    assert (done.returncode, "PENSTOCK_MODEL_PATH" in done.stderr) == (2, True)


def test_misspelt_variable_is_pointed_out() -> None:
    assert (
        "PENSTOCK_INGRES_PORT is set, and no setting has that name"
        in penstock("config", PENSTOCK_INGRES_PORT="1").stderr
    )


def test_redis_away_is_a_failure_without_traceback() -> None:
    done = penstock("keys", "list", PENSTOCK_REDIS_URL="redis://127.0.0.1:1/0")
    assert (done.returncode, "Redis is unavailable" in done.stderr) == (1, True)
    assert "Traceback" not in done.stderr
