"""Measure the demo model: `python -m penstock.workers.demo_model.evaluate`; exits 1 below a goal.

A greedy answer is exact if and only if each of the right answer's tokens is the most likely one after those
before it. So one forward pass over question and answer says whether greedy decoding would give the answer, a
thousand tokens at once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

from penstock.workers.demo_model import demo_model_path
from penstock.workers.demo_model.corpus import COUNT_LIMIT, Corpus, Topic, counting, load_corpus

SEEN_GOAL = 0.98
HELD_OUT_GOAL = 0.90
OFF_TOPIC_GOAL = 0.90
COUNTING_GOAL = 1.0
COUNT_STRIDE = 37
COUNT_EDGES = (*range(1, 31), *range(50, COUNT_LIMIT + 1, 50), 997, 999)


@dataclass(frozen=True)
class Case:
    """A question and the only answer that counts as right."""

    question: str
    answer: str


@dataclass(frozen=True)
class Score:
    """The result of one group of cases."""

    name: str
    goal: float
    tried: int
    failures: tuple[Case, ...]

    @property
    def accuracy(self) -> float:
        """Share of exact answers, 0 to 1."""
        return 1 - len(self.failures) / self.tried

    @property
    def reached(self) -> bool:
        """Whether the goal is reached."""
        return self.accuracy >= self.goal


class Judge:
    """The saved model; its bfloat16 weights are computed with in `dtype`."""

    def __init__(self, path: Path, dtype: torch.dtype) -> None:
        self._tokenizer = AutoTokenizer.from_pretrained(path)
        self._model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()

    def score(self, name: str, goal: float, cases: Iterable[Case]) -> Score:
        """Try every case."""
        tried = list(cases)
        return Score(name, goal, len(tried), tuple(case for case in tried if not self.is_exact(case)))

    def is_exact(self, case: Case) -> bool:
        """Whether greedy decoding answers the question with exactly this answer, and then stops."""
        chat = [{"role": "user", "content": case.question}]
        prompt = self._encode(self._tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))
        answer = [*self._encode(case.answer), self._tokenizer.eos_token_id]
        with torch.inference_mode():
            hidden = self._model.model(input_ids=torch.tensor([[*prompt, *answer]])).last_hidden_state[0]
            predicted = self._model.lm_head(hidden[len(prompt) - 1 : -1]).argmax(-1)
        return bool((predicted == torch.tensor(answer)).all())

    def _encode(self, text: str) -> list[int]:
        tokens: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return tokens


def seen(corpus: Corpus) -> Iterator[Case]:
    """Every fourth question people ask of each topic, as it stands in the corpus."""
    return (Case(question, topic.answer) for topic in corpus.topics for question in topic.asked[::4])


def held_out(topics: Iterable[Topic]) -> Iterator[Case]:
    """Questions the model was never trained on."""
    return (Case(question, topic.answer) for topic in topics for question in topic.held_out)


def counts(corpus: Corpus, stride: int) -> Iterator[Case]:
    """Counts to every `stride`-th limit and to the edge cases, the forms of the question by turns."""
    limits = sorted({*range(1, COUNT_LIMIT + 1, stride), *COUNT_EDGES})
    forms = corpus.count_forms
    return (Case(forms[turn % len(forms)].format(n), counting(n)) for turn, n in enumerate(limits))


def evaluate(path: Path, stride: int, dtype: torch.dtype) -> list[Score]:
    """All groups' scores."""
    corpus, judge = load_corpus(), Judge(path, dtype)
    return [
        judge.score("seen questions", SEEN_GOAL, seen(corpus)),
        judge.score("held-out questions", HELD_OUT_GOAL, held_out(corpus.topics)),
        judge.score("held-out off-topic questions", OFF_TOPIC_GOAL, held_out([corpus.off_topic])),
        judge.score("counting", COUNTING_GOAL, counts(corpus, stride)),
    ]


def table(scores: list[Score]) -> Table:
    """The scores as a table."""
    result = Table("group", "questions", "exact answers", "goal", "", title="demo model")
    for score in scores:
        verdict = "[green]reached" if score.reached else "[red]missed"
        result.add_row(score.name, str(score.tried), f"{score.accuracy:.1%}", f"{score.goal:.0%}", verdict)
    return result


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=demo_model_path(), help="directory of the model")
    parser.add_argument(
        "--stride",
        type=int,
        default=COUNT_STRIDE,
        help="try every n-th count, 1 for all (default: %(default)s)",
    )
    parser.add_argument(
        "--precision",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of the arithmetic; many CPUs are slow at bfloat16 (default: %(default)s)",
    )
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    scores = evaluate(arguments.model, arguments.stride, getattr(torch, arguments.precision))
    Console().print(table(scores))
    sys.exit(0 if all(score.reached for score in scores) else 1)


if __name__ == "__main__":
    main()
