"""Train the demo model on one CPU core: `python -m penstock.workers.demo_model.train [--out DIR]`.

Three savings make minutes out of an hour. Only the answers' tokens go through the output layer. Most answers
are cut after their first tokens, for that is where the topic is decided. Most counting examples show a short
window of the count at its true positions, or numbers in any order whose every place trains the stop: a few
whole counts are enough.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from penstock.workers.demo_model import demo_model_path, qa_hash
from penstock.workers.demo_model.corpus import (
    COUNT_LIMIT,
    COUNT_LIMITS,
    COUNT_REFUSAL,
    Augmenter,
    Corpus,
    counting,
    load_corpus,
)
from penstock.workers.demo_model.tokenization import END, PAD, build_tokenizer

SEED = 7
STEPS = 3000
BATCH_TOKENS = 800
POOL = 400  # short examples drawn together and sorted by length
SHARES = (0.68, 0.2, 0.12)  # of the batches: answers, stops, windows of counts
WHOLE_EVERY = 25  # one batch in so many is one whole count
CUT = 0.8  # share of the answers that are cut after their first tokens, where the topic is decided
LAST_TARGETS = 3
OTHER_TARGETS = 5
SHOWN = 40  # numbers in an example of stops
PEAK_RATE = 1.5e-3
WARM_UP = 100
MAX_POSITIONS = 4096
ROPE_BASE = 1e6  # slow rotations: the question is seen from a thousand positions away
REPORT_EVERY = 250  # steps between lines of progress where no terminal shows the bar
IGNORED = -100  # the label of a position without a target


@dataclass(frozen=True)
class Example:
    """Token ids with their positions, and the target of each position (`IGNORED` for none)."""

    tokens: list[int]
    positions: list[int]
    targets: list[int]


class ExampleFactory:
    """Draws training examples, the same ones for the same seed."""

    def __init__(self, corpus: Corpus, tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
        self._corpus, self._tokenizer = corpus, tokenizer
        self._rng = random.Random(seed)
        self._augmenter = Augmenter(corpus, seed + 1)
        self._numbers = self._encode(counting(COUNT_LIMIT))
        self._end: int = tokenizer.convert_tokens_to_ids(END)

    def batches(self, count: int) -> Iterator[list[Example]]:
        """`count` batches of about `BATCH_TOKENS` tokens each, each of one kind of example."""
        kinds = (self._answer, self._stops, self._window)
        ready: dict[Callable[[], Example], list[list[Example]]] = {kind: [] for kind in kinds}
        for index in range(count):
            if index % WHOLE_EVERY == WHOLE_EVERY - 1:
                yield [self._whole()]
                continue
            (kind,) = self._rng.choices(kinds, SHARES)
            ready[kind] = ready[kind] or self._of_like_length(kind)
            yield ready[kind].pop()

    def _of_like_length(self, draw: Callable[[], Example]) -> list[list[Example]]:
        """Batches of examples of like length, so that little is padding, in random order."""
        batches: list[list[Example]] = [[]]
        for example in sorted((draw() for _ in range(POOL)), key=lambda example: len(example.tokens)):
            if batches[-1] and (len(batches[-1]) + 1) * len(example.tokens) > BATCH_TOKENS:
                batches.append([])
            batches[-1].append(example)
        self._rng.shuffle(batches)
        return batches

    def _answer(self) -> Example:
        off_topic = self._rng.random() < 0.18
        topic = self._corpus.off_topic if off_topic else self._rng.choice(self._corpus.topics)
        prompt = self._prompt(self._augmenter.question(topic))
        answer = [*self._encode(topic.answer), self._end]
        if self._rng.random() < CUT:
            answer = answer[: self._rng.randint(3, 8)]
        return _example(prompt, answer, first=0)

    def _whole(self) -> Example:
        """A count from its first number to its end."""
        limit = self._rng.choice(COUNT_LIMITS)
        return self._sparse(_example(self._asked(limit), [*self._numbers[:limit], self._end], first=0))

    def _window(self) -> Example:
        """A few numbers of a count, where they stand in it; or why it is not begun."""
        limit = self._rng.randint(1, COUNT_LIMIT)
        if limit not in COUNT_LIMITS:
            return _example(self._asked(limit), [*self._encode(COUNT_REFUSAL), self._end], first=0)
        limit = self._rng.choice(COUNT_LIMITS)
        answer = [*self._numbers[:limit], self._end]
        length = self._rng.choice((2, 2, 8, 8, 40, 120))
        last = len(answer) if self._rng.random() < 0.6 else self._rng.randint(1, len(answer))
        return self._sparse(_example(self._asked(limit), answer[:last], first=max(0, last - length)))

    def _stops(self) -> Example:
        """Numbers in any order after the question, half of them the one asked for: after that comes the end.

        A count trains its stop once; here every place trains it.
        """
        limit = self._rng.choice(COUNT_LIMITS)
        near = [number for number in (limit - 1, limit + 1) if 0 < number < COUNT_LIMIT]
        others = [number for number in (*COUNT_LIMITS, *near, *near) if number not in (limit, COUNT_LIMIT)]
        others += self._rng.choices(range(1, COUNT_LIMIT), k=len(others))
        others = [number for number in others if number != limit]
        shown = [limit if self._rng.random() < 0.4 else self._rng.choice(others) for _ in range(SHOWN)]
        prompt = self._asked(limit)
        places = sorted(self._rng.sample(range(len(prompt), len(prompt) + COUNT_LIMIT), len(shown)))
        following = [self._end if number == limit else self._numbers[number] for number in shown]
        return Example(
            [*prompt, *(self._numbers[number - 1] for number in shown)],
            [*range(len(prompt)), *places],
            [*[IGNORED] * len(prompt), *following],
        )

    def _asked(self, limit: int) -> list[int]:
        return self._prompt(self._rng.choice(self._corpus.count_forms).format(limit))

    def _sparse(self, example: Example) -> Example:
        """Targets at the end and at a few places of a long count only.

        The other numbers are there to be mistaken for the one in the prompt. Were they targets too, the one that
        matters, to stop, would drown among them.
        """
        wanted = [place for place, target in enumerate(example.targets) if target != IGNORED]
        kept = {*wanted[-LAST_TARGETS:], *self._rng.sample(wanted, min(len(wanted), OTHER_TARGETS))}
        targets = [target if place in kept else IGNORED for place, target in enumerate(example.targets)]
        return Example(example.tokens, example.positions, targets)

    def _prompt(self, question: str) -> list[int]:
        messages: list[dict[str, str]] = []
        if self._rng.random() < 0.2:
            messages.append({"role": "system", "content": self._rng.choice(self._corpus.systems)})
        if self._rng.random() < 0.06:
            earlier = self._rng.choice(self._corpus.all_topics())
            messages.append({"role": "user", "content": self._augmenter.question(earlier)})
            messages.append({"role": "assistant", "content": earlier.answer})
        messages.append({"role": "user", "content": question})
        text = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return self._encode(str(text))

    def _encode(self, text: str) -> list[int]:
        tokens: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return tokens


def _example(prompt: list[int], answer: list[int], first: int) -> Example:
    """The prompt and `answer[first:]` at its true positions; the prompt always predicts `answer[0]`."""
    shown = answer[first:]
    positions = [*range(len(prompt)), *range(len(prompt) + first, len(prompt) + len(answer))]
    targets = [*[IGNORED] * (len(prompt) - 1), answer[0], *shown[1:], IGNORED]
    return Example([*prompt, *shown], positions, targets)


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama of about four million weights, freshly initialised."""
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_BASE},
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def loss_of(model: LlamaForCausalLM, examples: list[Example], pad: int) -> torch.Tensor:
    """Mean cross-entropy over the targets (a scalar); causal attention never sees padding on the right."""
    width = max(len(example.tokens) for example in examples)
    tokens = torch.tensor([_padded(example.tokens, width, pad) for example in examples])
    positions = torch.tensor([_padded(example.positions, width, 0) for example in examples])
    targets = torch.tensor([_padded(example.targets, width, IGNORED) for example in examples])
    # The mask of ones says that a jump in the positions is no border between packed sequences.
    hidden = model.model(
        input_ids=tokens, position_ids=positions, attention_mask=torch.ones_like(tokens)
    ).last_hidden_state
    wanted = targets != IGNORED
    return torch.nn.functional.cross_entropy(model.lm_head(hidden[wanted]), targets[wanted])


def _padded(values: list[int], width: int, filler: int) -> list[int]:
    return [*values, *[filler] * (width - len(values))]


def fit(model: LlamaForCausalLM, factory: ExampleFactory, pad: int, steps: int) -> None:
    """AdamW with warm-up and a cosine schedule; shows a progress bar, or lines where there is no terminal."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, betas=(0.9, 0.98), weight_decay=0.05, fused=True)
    warm_up = torch.optim.lr_scheduler.LinearLR(optimizer, 0.01, total_iters=WARM_UP)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps - WARM_UP)
    schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [warm_up, cosine], [WARM_UP])
    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TimeRemainingColumn(),
    )
    average = 0.0
    with Progress(*columns, disable=not sys.stdout.isatty()) as progress:
        task = progress.add_task("training", total=steps, loss=average)
        for step, batch in enumerate(factory.batches(steps)):
            optimizer.zero_grad()
            loss = loss_of(model, batch, pad)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            average = loss.item() if step == 0 else 0.98 * average + 0.02 * loss.item()
            progress.update(task, advance=1, loss=average)
            if not sys.stdout.isatty() and (step + 1) % REPORT_EVERY == 0:
                print(f"step {step + 1}/{steps} loss {average:.3f}", flush=True)


def tokenizer_texts(corpus: Corpus) -> list[str]:
    """What the tokenizer learns its words from: varied questions and the answers."""
    augmenter = Augmenter(corpus, SEED)
    questions = [augmenter.question(topic) for topic in corpus.all_topics() for _ in range(300)]
    return [
        *questions,
        *(topic.answer for topic in corpus.all_topics() for _ in range(20)),
        *corpus.systems,
        *corpus.count_forms,
    ]


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write the bfloat16 model, its tokenizer and the hash of its questions; replaces `out` as a whole."""
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        target = Path(scratch) / "weights"
        model.to(torch.bfloat16).save_pretrained(target)
        tokenizer.save_pretrained(target, save_jinja_files=False)
        greedy = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "temperature": 0.0}
        (target / "generation_config.json").write_text(json.dumps(greedy, indent=2) + "\n")
        (target / "qa.sha256").write_text(qa_hash() + "\n")
        (target / "model.safetensors").chmod(0o644)  # it is written for its owner alone
        shutil.rmtree(out, ignore_errors=True)
        target.rename(out)


def train(out: Path, steps: int = STEPS) -> None:
    """Train from scratch and write the model to `out`."""
    corpus = load_corpus()
    tokenizer = build_tokenizer(tokenizer_texts(corpus), MAX_POSITIONS)
    model = build_model(tokenizer)
    started = time.monotonic()
    fit(model, ExampleFactory(corpus, tokenizer, SEED), tokenizer.convert_tokens_to_ids(PAD), steps)
    save(model, tokenizer, out)
    print(f"{model.num_parameters():,} weights trained in {time.monotonic() - started:.0f} s: {out}")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=demo_model_path(), help="where the model is written")
    parser.add_argument("--steps", type=int, default=STEPS, help="training steps (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    train(arguments.out, arguments.steps)


if __name__ == "__main__":
    main()
