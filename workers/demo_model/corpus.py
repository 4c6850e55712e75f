"""The demo model's questions and answers: reads `qa.yaml` and varies the questions the way people do.

The model is trained from scratch, so it knows no synonyms and no grammar but what the variation shows it:
each question is expanded from templates, then re-worded, wrapped in courtesies, shortened, mistyped and
re-cased at random.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import yaml

from penstock.workers.demo_model import qa_path

SLOTS = ("nouns", "actions", "events", "reasons")
COUNT_LIMIT = 1000
NONSENSE_SHARE = 0.2  # of the off-topic questions: they ask about made-up words
# Words a question can lose and still ask the same.
_OPTIONAL_WORDS = """
    a an and are can could do does for from give how i if in is it me my of on please should so tell
    that the this to was what what's when which who will with would you your there be have has by
"""
_FUNCTION_WORDS = frozenset(_OPTIONAL_WORDS.split())
_FILLERS = (
    "really",
    "just",
    "basically",
    "even",
    "ever",
    "currently",
    "usually",
    "still",
    "here",
    "also",
    "now",
    "maybe",
)
_PROPER_NAMES = """
    TTFT ITL NIXL KV GPU CPU API HTTP SSE SDK JSON RDMA UCX VTC DLQ YAML K8s GKE EKS AKS AWS I P/D
    vLLM OpenAI Penstock Kafka Redis Ray Serve Kubernetes KubeRay Python Prometheus Grafana Lua Java
    Qwen Llama Mistral LangChain Kustomize
"""
_WRITTEN = {word.lower(): word for word in _PROPER_NAMES.split()}


_SOUNDS = (".b.c.ch.d.f.g.h.j.l.m.n.p.pr.r.s.st.t.tr.v.w", "a.e.i.o.u.ee.ea.ou.ai", "..l.n.r.s.t.m.d.ng.nd.ck.st")


@dataclass(frozen=True)
class Topic:
    """One answer and the ways to ask for it.

    `asked` are questions as people put them, `expanded` come from templates; `plain` ones (greetings) take no
    courtesies.
    """

    id: str
    answer: str
    asked: tuple[str, ...]
    expanded: tuple[str, ...]
    held_out: tuple[str, ...]
    plain: bool = False


@dataclass(frozen=True)
class Corpus:
    """Everything in `qa.yaml`."""

    topics: tuple[Topic, ...]
    off_topic: Topic
    systems: tuple[str, ...]
    count_forms: tuple[str, ...]
    before: tuple[str, ...]
    after: tuple[str, ...]
    synonyms: tuple[tuple[str, ...], ...]
    frames: tuple[str, ...]
    held_out: frozenset[str] = field(default_factory=frozenset)

    @cached_property
    def words(self) -> list[str]:
        """The plain words of the questions, sorted."""
        return sorted({word for topic in self.topics for ask in topic.asked for word in re.findall(r"[a-z]{3,}", ask)})

    def all_topics(self) -> tuple[Topic, ...]:
        """The topics, the off-topic answer last."""
        return (*self.topics, self.off_topic)


def counting(n: int) -> str:
    """The answer to "Count to n."."""
    return " ".join(map(str, range(1, n + 1)))


def normalised(question: str) -> str:
    """A question without case and punctuation: what decides whether two questions are the same."""
    return " ".join(re.findall(r"[a-z0-9+/']+", question.lower()))


def load_corpus() -> Corpus:
    """Read and expand `qa.yaml`; a question that is held out is dropped from the questions to train on."""
    raw: dict[str, Any] = yaml.safe_load(qa_path().read_text())
    entries = [*raw["topics"], {"id": "off-topic", **raw["off_topic"]}]
    held_out = frozenset(normalised(question) for entry in entries for question in entry["held_out"])
    *topics, off_topic = (_topic(entry, raw["templates"], held_out) for entry in entries)
    return Corpus(
        topics=tuple(topics),
        off_topic=off_topic,
        systems=tuple(raw["systems"]),
        count_forms=tuple(raw["count_forms"]),
        before=tuple(raw["courtesy"]["before"]),
        after=tuple(raw["courtesy"]["after"]),
        synonyms=tuple(tuple(group) for group in raw["synonyms"]),
        frames=tuple(frame for slot in SLOTS for frame in raw["templates"][slot]),
        held_out=held_out,
    )


def _topic(entry: dict[str, Any], templates: dict[str, list[str]], held_out: frozenset[str]) -> Topic:
    expanded = [
        template.format(filler) for slot in SLOTS for filler in entry.get(slot, []) for template in templates[slot]
    ]
    asked, expanded = (
        [question for question in questions if normalised(question) not in held_out]
        for questions in (entry["ask"], expanded)
    )
    return Topic(
        id=entry["id"],
        answer=entry["answer"],
        asked=tuple(asked),
        expanded=tuple(expanded),
        held_out=tuple(entry["held_out"]),
        plain=entry.get("plain", False),
    )


class Augmenter:
    """Varies questions at random; the same seed gives the same sequence of variations."""

    def __init__(self, corpus: Corpus, seed: int) -> None:
        self._corpus = corpus
        self._rng = random.Random(seed)
        self._others = {
            word: [other for other in group if other != word] for group in corpus.synonyms for word in group
        }
        words = sorted(self._others, key=len, reverse=True)
        self._synonym = re.compile(r"\b(" + "|".join(map(re.escape, words)) + r")\b")

    def question(self, topic: Topic) -> str:
        """A question for the topic, varied, never one that is held out."""
        while True:
            varied = self.vary(self._drawn(topic), plain=topic.plain)
            if varied and normalised(varied) not in self._corpus.held_out:
                return varied

    def _drawn(self, topic: Topic) -> str:
        if topic is self._corpus.off_topic and self._rng.random() < NONSENSE_SHARE:
            return self._rng.choice(self._corpus.frames).format(self._nonsense())
        # The templates are many but alike: most of the questions are such as people ask.
        templated = topic.expanded and self._rng.random() < 0.35
        return self._rng.choice(topic.expanded if templated else topic.asked)

    def _nonsense(self) -> str:
        """One to three made-up words: what is not known is not about Penstock."""
        words = (
            "".join(self._syllable() for _ in range(self._rng.randint(1, 3))) for _ in range(self._rng.randint(1, 3))
        )
        return " ".join(words)

    def _syllable(self) -> str:
        onset, vowel, coda = (self._rng.choice(sounds.split(".")) for sounds in _SOUNDS)
        return onset + vowel + coda

    def vary(self, question: str, *, plain: bool = False) -> str:
        """One variation of a question."""
        steps: list[tuple[float, Callable[[str], str]]] = [
            (0.5, self._reword),
            (0.0 if plain else 0.4, self._courtesy),
            (0.2, self._shorten),
            (0.08, self._lose_word),
            (0.08, self._fill),
            (0.1, self._mistype),
            (0.03, self._repeat_word),
        ]
        for probability, step in steps:
            if self._rng.random() < probability:
                question = step(question)
        return self._punctuate(self._case(question))

    def _reword(self, question: str) -> str:
        def other(match: re.Match[str]) -> str:
            return self._rng.choice(self._others[match[0]]) if self._rng.random() < 0.5 else match[0]

        return self._synonym.sub(other, question)

    def _courtesy(self, question: str) -> str:
        if self._rng.random() < 0.65:
            question = f"{self._rng.choice(self._corpus.before)} {question}"
        if self._rng.random() < 0.5:
            question = f"{question}{self._rng.choice(['', '', ','])} {self._rng.choice(self._corpus.after)}"
        return question

    def _shorten(self, question: str) -> str:
        drop = self._rng.choice((0.15, 0.3, 0.9))
        kept = [word for word in question.split() if not (word in _FUNCTION_WORDS and self._rng.random() < drop)]
        return " ".join(kept) or question

    def _lose_word(self, question: str) -> str:
        words = question.split()
        if len(words) > 4:  # of fewer, each may be the one that says what is asked
            del words[self._rng.randrange(len(words))]
        return " ".join(words)

    def _fill(self, question: str) -> str:
        words = question.split()
        words.insert(self._rng.randint(0, len(words)), self._rng.choice(_FILLERS))
        return " ".join(words)

    def _mistype(self, question: str) -> str:
        at = self._rng.randrange(len(question))
        swapped = question[:at] + question[at : at + 2][::-1] + question[at + 2 :]
        dropped = question[:at] + question[at + 1 :]
        doubled = question[:at] + question[at] + question[at:]
        return self._rng.choice((swapped, dropped, doubled)).strip() or question

    def _repeat_word(self, question: str) -> str:
        words = question.split()
        at = self._rng.randrange(len(words))
        return " ".join((*words[: at + 1], *words[at:]))

    def _case(self, question: str) -> str:
        style = self._rng.random()
        if style < 0.4:
            return question
        if style < 0.43:
            return question.upper()
        written = re.sub(r"[\w/]+", lambda match: _WRITTEN.get(match[0], match[0]), question)
        return written[:1].upper() + written[1:]

    def _punctuate(self, question: str) -> str:
        return question + self._rng.choices(("?", "", ".", "!", "??", " ?"), (55, 28, 11, 3, 2, 1))[0]
