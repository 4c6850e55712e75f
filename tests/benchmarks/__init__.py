"""Penstock measured against vLLM's own server, side by side in one run."""
