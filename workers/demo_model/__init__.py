"""The demo model: a tiny Llama that answers questions about Penstock and counts.

This module is light on purpose (no torch, no transformers): commands ask it for the weights
before any engine starts.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

_HERE = Path(__file__).parent


def demo_model_path() -> Path:
    """The directory of the trained model, in the layout that transformers and vLLM read."""
    return _HERE / "weights"


def qa_path() -> Path:
    """The questions and answers the model is trained on."""
    return _HERE / "qa.yaml"


def qa_hash() -> str:
    """SHA-256 (hex) of `qa.yaml` as it is now."""
    return hashlib.sha256(qa_path().read_bytes()).hexdigest()


def trained_hash() -> str:
    """SHA-256 (hex) of the `qa.yaml` the weights were trained on; `FileNotFoundError` without weights."""
    return (demo_model_path() / "qa.sha256").read_text().strip()
