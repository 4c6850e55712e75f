"""Random prompts of exact lengths, with common beginnings where a workload asks for them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tests.benchmarks.workloads import Workload

if TYPE_CHECKING:
    import numpy as np

ATTEMPTS = 50
"""Words seldom melt together when decoded and encoded; vLLM's helper mends most of that at once."""


class PromptError(RuntimeError):
    """No prompt of the wanted length was found."""


class Prompts:
    """Makes texts; everything they are depends on the generator's state alone."""

    def __init__(self, tokenizer: Any, rng: np.random.Generator) -> None:
        self._tokenizer = tokenizer
        self._rng = rng
        self._special = int(tokenizer.num_special_tokens_to_add())
        self._words = sorted(id_ for token, id_ in tokenizer.get_vocab().items() if _is_word(token))
        self._blocks: dict[int, list[int]] = {}

    def of(self, workload: Workload) -> list[str]:
        """One a request, never used before, but for what the workload says they share."""
        if workload.arrivals:
            return [
                self.make(arrival.prompt_tokens, [t for name in arrival.blocks for t in self._block(workload, name)])
                for arrival in workload.arrivals
            ]
        head = self._draw(workload.shared_tokens)
        return [self.make(workload.prompt_tokens, head) for _ in range(workload.requests)]

    def make(self, tokens: int, head: list[int]) -> str:
        """Text of exactly ``tokens`` tokens, special ones included, that begins as ``head`` decodes.

        vLLM's random data set takes runs of consecutive token ids, which start alike sooner or later with a small
        vocabulary: then the prefix cache would answer. These are drawn one by one, and only from whole words: pieces of
        characters would come back as other tokens, and more of them.

        Raises:
            PromptError: not found in :data:`ATTEMPTS` attempts.
        """
        from vllm.benchmarks.datasets import gen_prompt_decode_to_target_len

        wanted = tokens - self._special
        for _ in range(ATTEMPTS):
            drawn = head[:wanted] + self._draw(wanted - len(head))
            prompt, _, _ = gen_prompt_decode_to_target_len(self._tokenizer, drawn, wanted, rng=self._rng)
            if len(self._tokenizer.encode(prompt)) == tokens:
                return str(prompt)
        raise PromptError(f"no random prompt of exactly {tokens} tokens in {ATTEMPTS} attempts")

    def _block(self, workload: Workload, name: int) -> list[int]:
        if name not in self._blocks:
            self._blocks[name] = self._draw(workload.block_tokens)
        return self._blocks[name]

    def _draw(self, tokens: int) -> list[int]:
        drawn: list[int] = self._rng.choice(self._words, max(0, tokens)).tolist()
        return drawn


def _is_word(token: str) -> bool:
    """A space and ASCII letters; byte-level and sentence-piece vocabularies mark the space in their own ways."""
    return token[:1] in ("Ġ", "▁") and token[1:].isascii() and token[1:].isalpha()
