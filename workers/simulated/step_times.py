"""How long a step takes: a few coefficients per profile, fitted to published measurements and estimates.

A step reads the weights once whatever it does, so its time is the longer of that floor and the prefill's
compute, and on top of it what every decoding sequence adds::

    max(floor, prefill_base + per_prefill_token * n + per_prefill_pair * (end^2 - start^2))
        + per_sequence * b + per_context_token * c

with ``n`` prompt tokens computed, each chunk from ``start`` to ``end`` of its sequence, ``b`` decoding
sequences and ``c`` tokens of context they read. Fits minimise the squared relative error.
"""

from __future__ import annotations

import msgspec

INTERCONNECT_BYTES_PER_S = 40e9
"""KV transfer rate of one engine: 400 Gbit/s InfiniBand, usual beside an H100, at 80 % of its line rate."""


class StepTimes(msgspec.Struct, frozen=True):
    """Coefficients of one profile, in milliseconds (per token, per token squared, per sequence)."""

    floor: float = 0.0
    prefill_base: float = 0.0
    per_prefill_token: float = 0.0
    per_prefill_pair: float = 0.0
    per_sequence: float = 0.0
    per_context_token: float = 0.0
    kv_bytes_per_token: int = 0

    def step_s(self, prefill_tokens: int, prefill_pairs: int, sequences: int, context_tokens: int) -> float:
        """Seconds of one step. ``prefill_pairs``: the sum of ``end^2 - start^2`` over the prompt chunks."""
        prefill = 0.0
        if prefill_tokens:
            compute = self.per_prefill_token * prefill_tokens + self.per_prefill_pair * prefill_pairs
            prefill = self.prefill_base + compute
        decode = self.per_sequence * sequences + self.per_context_token * context_tokens
        return (max(self.floor, prefill) + decode) / 1000

    def transfer_s(self, tokens: int) -> float:
        """Seconds to move the KV of ``tokens`` tokens from a prefill engine to a decode engine."""
        return tokens * self.kv_bytes_per_token / INTERCONNECT_BYTES_PER_S


PROFILES = {
    "instant": StepTimes(),
    # NVIDIA aiconfigurator estimates for vLLM 0.24, bfloat16. They are sums of kernel times, hence
    # optimistic: real systems are up to twice as slow. Decode was estimated at one context length (2,048),
    # so the time per context token is not fitted but KV bytes over HBM bandwidth. Error of the fit, over
    # prefills of 512-8,192 tokens and decodes of 1-256 sequences: at most 0.1 % and 5.5 %.
    "h100/llama3.1-8b": StepTimes(
        floor=6.245,
        prefill_base=1.518,
        per_prefill_token=1.636e-2,
        per_prefill_pair=7.653e-7,
        per_sequence=1.222e-2,
        per_context_token=3.913e-5,
        kv_bytes_per_token=131_072,
    ),
    # As above, for vLLM 0.14; at most 1.4 % and 8.0 %.
    "a100/llama3.1-8b": StepTimes(
        floor=11.44,
        prefill_base=6.927,
        per_prefill_token=5.062e-2,
        per_prefill_pair=1.931e-6,
        per_sequence=5.402e-2,
        per_context_token=6.428e-5,
        kv_bytes_per_token=131_072,
    ),
    # As above, for vLLM 0.24 and tensor parallelism over four GPUs; at most 1.8 % and 3.0 %.
    "h100x4/llama3.1-70b": StepTimes(
        floor=14.58,
        prefill_base=6.746,
        per_prefill_token=5.005e-2,
        per_prefill_pair=1.822e-6,
        per_sequence=2.861e-2,
        per_context_token=2.445e-5,
        kv_bytes_per_token=327_680,
    ),
    # Splitwise (ISCA'24) measurements, tensor parallelism over eight GPUs, batches of 1-64, prompts of
    # 128-8,192 tokens. Error of the fit: prefill 15.8 % on average, at most 49 %; decode 2.0 % on average,
    # at most 7.7 %.
    "h100x8/llama2-70b": StepTimes(
        floor=29.80,
        prefill_base=22.70,
        per_prefill_token=6.488e-2,
        per_prefill_pair=3.522e-6,
        per_sequence=0.2016,
        per_context_token=1.778e-4,
        kv_bytes_per_token=327_680,
    ),
}


def step_times(profile: str) -> StepTimes:
    """The coefficients of a profile, by its name in the settings.

    Raises:
        ValueError: no such profile; the message lists those there are.
    """
    if profile not in PROFILES:
        raise ValueError(f"no step profile {profile!r}; there are {', '.join(PROFILES)}")
    return PROFILES[profile]
