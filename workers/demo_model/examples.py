"""Training examples for the demo model: answers to varied questions, tool arguments, and counts in pieces."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerFast

from penstock.workers.demo_model.corpus import COUNT_LIMIT, Augmenter, Corpus, counting
from penstock.workers.demo_model.tokenization import END

BATCH_TOKENS = 800
POOLS = {"answer": 400, "arguments": 28, "failed": 200}  # drawn together and cut into batches of like length
BATCHES = {"whole": 1, "whole in chat": 1, "low": 20, "window": 45, "scattered": 20, "hardest": 20}  # a batch as drawn
OFF_TOPIC_SHARE = 0.2
CUT = 0.88  # share of the answers that are cut after their first tokens, where the topic is decided
WINDOWS = (1, 2, 4, 8, 16)  # numbers in a window of a count
SCATTERED = 24  # numbers in an example of scattered numbers
LOW = 40  # the highest of the low limits
ONES = 0.03  # share of the counts to 1: the only number whose token differs between question and answer
IGNORED = -100  # the label of a position without a target


@dataclass(frozen=True)
class Example:
    """Token ids with their positions, and the target of each position (`IGNORED` for none)."""

    tokens: list[int]
    positions: list[int]
    targets: list[int]


@dataclass(frozen=True)
class Stage:
    """So many batches, each of one kind of example, by turns; `shares` are the kinds' relative frequencies."""

    batches: int
    shares: dict[str, float]


class ExampleFactory:
    """Draws training examples, the same ones for the same seed.

    `failed` and `hardest`, at first empty, are examples and counts that the model finds hard.
    """

    def __init__(self, corpus: Corpus, tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
        self._corpus, self._tokenizer = corpus, tokenizer
        self._rng = random.Random(seed)
        self._augmenter = Augmenter(corpus, seed + 1)
        self._numbers = self._encode(counting(COUNT_LIMIT))
        self.failed: list[Example] = []
        self.hardest: list[Example] = []
        self._end: int = tokenizer.convert_tokens_to_ids(END)
        self._kinds: dict[str, Callable[[], Example]] = {
            "answer": self._answer,
            "arguments": self._arguments,
            "whole": self._whole,
            "whole in chat": self._whole_in_chat,
            "low": self._low,
            "window": self._window,
            "scattered": self._scattered,
            "failed": lambda: self._rng.choice(self.failed),
            "hardest": lambda: self._rng.choice(self.hardest),
        }

    def batches(self, stages: tuple[Stage, ...]) -> Iterator[list[Example]]:
        """The batches of one stage after the other."""
        ready: dict[str, list[list[Example]]] = {kind: [] for kind in self._kinds}
        for stage in stages:
            for kind in _turns(stage):
                ready[kind] = ready[kind] or self._drawn(kind)
                yield ready[kind].pop()

    def _drawn(self, kind: str) -> list[list[Example]]:
        draw = self._kinds[kind]
        if kind in BATCHES:
            return [[draw() for _ in range(BATCHES[kind])]]
        batches = of_like_length(draw() for _ in range(POOLS[kind]))
        self._rng.shuffle(batches)
        return batches

    def answers(self) -> Iterator[Example]:
        """Every question as people put it, with its whole answer."""
        for topic in self._corpus.all_topics():
            answer = [*self._encode(topic.answer), self._end]
            for question in topic.asked:
                yield _example(self._rendered([{"role": "user", "content": question}]), answer, first=0)

    def counts(self) -> Iterator[Example]:
        """A count to every limit, asked for in any form."""
        for limit in range(1, COUNT_LIMIT + 1):
            yield _example(self._rendered([self._asked(limit)]), [*self._numbers[:limit], self._end], first=0)

    def _answer(self) -> Example:
        off_topic = self._rng.random() < OFF_TOPIC_SHARE
        topic = self._corpus.off_topic if off_topic else self._rng.choice(self._corpus.topics)
        prompt = self._prompt({"role": "user", "content": self._augmenter.question(topic)})
        answer = [*self._encode(topic.answer), self._end]
        if self._rng.random() < CUT:
            answer = answer[: self._rng.randint(2, 6)]
        return _example(prompt, answer, first=0)

    def _arguments(self) -> Example:
        """What follows a brace that a grammar has forced, whatever the question: JSON without needless white space."""
        name, key, other, value = self._rng.sample(self._corpus.words, 4)
        arguments = {key: self._rng.choice((value, self._rng.randint(1, 99), True, False))}
        if self._rng.random() < 0.5:
            arguments = {other: name, **arguments}
        types = {str: "string", bool: "boolean", int: "integer"}
        properties = {argument: {"type": types[type(given)]} for argument, given in arguments.items()}
        schema = {"type": "object", "properties": properties, "required": list(arguments)}
        tool = {"type": "function", "function": {"name": name, "parameters": schema}}
        topic = self._rng.choice(self._corpus.all_topics())
        question = {"role": "user", "content": self._augmenter.question(topic)}
        chat = [self._asked(self._limit()) if self._rng.random() < 0.3 else question]
        prompt = self._rendered(chat, [tool] if self._rng.random() < 0.5 else None)
        brace, *rest = self._encode(json.dumps(arguments))
        return _example([*prompt, brace], [*rest, self._end], first=0)

    def _whole(self) -> Example:
        """A count from its first number to its end."""
        limit = self._limit()
        return _example(self._rendered([self._asked(limit)]), [*self._numbers[:limit], self._end], first=0)

    def _whole_in_chat(self) -> Example:
        """A whole count that a system prompt or an earlier question may precede."""
        limit = self._limit()
        return _example(self._prompt(self._asked(limit)), [*self._numbers[:limit], self._end], first=0)

    def _low(self) -> Example:
        """A whole count to a low number: of those, a draw from all numbers brings few."""
        limit = self._rng.randint(1, LOW)
        return _example(self._rendered([self._asked(limit)]), [*self._numbers[:limit], self._end], first=0)

    def _window(self) -> Example:
        """A few numbers of a count where they stand in it, more often than not its last ones."""
        limit = self._limit()
        answer = [*self._numbers[:limit], self._end]
        last = limit + 1 if self._rng.random() < 0.6 else self._rng.randint(1, limit)
        prompt = self._rendered([self._asked(limit)])
        return _example(prompt, answer[:last], first=max(0, last - self._rng.choice(WINDOWS) - 1))

    def _scattered(self) -> Example:
        """Numbers in any order after the question, often the one asked for: after that comes the end.

        A count trains its stop once; here many places train it.
        """
        limit = self._limit()
        near = [number for number in (limit - 1, limit + 1) if 0 < number < COUNT_LIMIT]
        shown = [*near, *self._rng.sample(range(1, COUNT_LIMIT), SCATTERED)][:SCATTERED]
        shown = [limit if self._rng.random() < 0.25 else number for number in shown]
        self._rng.shuffle(shown)
        prompt = self._rendered([self._asked(limit)])
        places = sorted(self._rng.sample(range(len(prompt), len(prompt) + COUNT_LIMIT), SCATTERED))
        following = [self._end if number == limit else self._numbers[number] for number in shown]
        return Example(
            [*prompt, *(self._numbers[number - 1] for number in shown)],
            [*range(len(prompt)), *places],
            [*[IGNORED] * (len(prompt) - 1), self._numbers[0], *following],
        )

    def _limit(self) -> int:
        return 1 if self._rng.random() < ONES else self._rng.randint(1, COUNT_LIMIT)

    def _asked(self, limit: int) -> dict[str, str]:
        return {"role": "user", "content": self._rng.choice(self._corpus.count_forms).format(limit)}

    def _prompt(self, question: dict[str, str]) -> list[int]:
        chat: list[dict[str, str]] = []
        if self._rng.random() < 0.1:
            chat.append({"role": "system", "content": self._rng.choice(self._corpus.systems)})
        if self._rng.random() < 0.04:
            earlier = self._rng.choice(self._corpus.all_topics())
            chat.append({"role": "user", "content": self._augmenter.question(earlier)})
            chat.append({"role": "assistant", "content": earlier.answer})
        return self._rendered([*chat, question])

    def _rendered(self, chat: list[dict[str, str]], tools: list[dict[str, Any]] | None = None) -> list[int]:
        text = self._tokenizer.apply_chat_template(chat, tools=tools, tokenize=False, add_generation_prompt=True)
        return self._encode(str(text))

    def _encode(self, text: str) -> list[int]:
        tokens: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return tokens


def of_like_length(examples: Iterable[Example]) -> list[list[Example]]:
    """Batches of examples of like length, so that little is padding, the shortest first."""
    batches: list[list[Example]] = [[]]
    for example in sorted(examples, key=lambda example: len(example.tokens)):
        if batches[-1] and (len(batches[-1]) + 1) * len(example.tokens) > BATCH_TOKENS:
            batches.append([])
        batches[-1].append(example)
    return batches


def _turns(stage: Stage) -> Iterator[str]:
    """The kinds in an even rotation: next comes the one that is furthest behind its share."""
    drawn = dict.fromkeys(stage.shares, 0)
    total = sum(stage.shares.values())
    for turn in range(1, stage.batches + 1):
        kind = max(drawn, key=lambda kind: stage.shares[kind] * turn / total - drawn[kind])
        drawn[kind] += 1
        yield kind


def _example(prompt: list[int], answer: list[int], first: int) -> Example:
    """The prompt and `answer[first:]` at its true positions; the prompt always predicts `answer[0]`."""
    shown = answer[first:]
    positions = [*range(len(prompt)), *range(len(prompt) + first, len(prompt) + len(answer))]
    targets = [*[IGNORED] * (len(prompt) - 1), answer[0], *shown[1:], IGNORED]
    return Example([*prompt, *shown], positions, targets)
