"""The official Node client, and what both official clients make of an error inside a stream."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.stack.conftest import MODEL

pytestmark = [pytest.mark.stack, pytest.mark.timeout(700)]

SOURCE = Path(__file__).parents[1] / "support" / "node"
COUNTED = " ".join(str(n) for n in range(1, 21))


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the check script and the client installed."""
    if shutil.which("npm") is None:
        if os.environ.get("CI") == "true":
            raise RuntimeError("npm is missing")
        pytest.skip("npm is missing")
    folder = tmp_path_factory.mktemp("node")
    shutil.copytree(SOURCE, folder, dirs_exist_ok=True)
    command = ["npm", "install", "--no-package-lock", "--no-audit", "--no-fund", "--silent"]
    subprocess.run(command, cwd=folder, check=True, timeout=300)
    return folder


def _run(node: Path, url: str, mode: str) -> dict[str, Any]:
    command = ["node", "check.mjs", f"{url}/v1", MODEL, mode]
    out = subprocess.run(command, cwd=node, check=True, capture_output=True, text=True, timeout=120)
    result: dict[str, Any] = json.loads(out.stdout)
    return result


@pytest.mark.parametrize("mode", ["plain", "stream"])
def test_node_client(node: Path, url: str, mode: str) -> None:
    assert _run(node, url, mode) == {"text": COUNTED, "error": None}


def test_node_client_sees_a_typed_error_inside_a_stream(node: Path, url: str) -> None:
    result = _run(node, url, "deadline")
    assert result["text"].startswith("1 2 3")
    assert result["error"]["code"] == "deadline_exceeded"


def test_python_client_sees_a_typed_error_inside_a_stream(url: str) -> None:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)
    stream = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "Count to 1000."}],
        temperature=0,
        stream=True,
        extra_body={"ignore_eos": True, "max_tokens": 3900},
        extra_headers={"x-request-timeout-ms": "1000"},
    )
    deltas: list[str] = []
    with pytest.raises(openai.APIError) as error:
        deltas.extend(chunk.choices[0].delta.content or "" for chunk in stream)
    assert "".join(deltas).startswith("1 2 3")
    assert error.value.code == "deadline_exceeded"
