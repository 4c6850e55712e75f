"""Train the demo model on one CPU core: `python -m penstock.workers.demo_model.train [--out DIR]`.

Counting comes first. To stop at the right number the model must see that the number it has just written is the
one in the question: attention by equality, as in the induction heads of Olsson et al. (2022). Two heads of the
second layer start out as such (`_compare_tokens`), and the first stages train nothing but counts: numbers at random
and short windows, where every place trains the stop or the step, and then whole counts, where a thousand numbers
can be mistaken for the right one. Then answers join. At the mixture's high rate single numbers keep ending counts
they should not end; most of that goes away as the rate falls. The rest is mined (`mine`): what the model still
fails at the end is looked for among all it should know, and trained at a rate that falls from round to round.

Two savings: only targets go through the output layer, and most answers are cut after their first tokens, for that
is where the topic is decided.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import astuple, replace
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from penstock.workers.demo_model import demo_model_path, qa_hash
from penstock.workers.demo_model.corpus import COUNT_LIMIT, Augmenter, Corpus, load_corpus
from penstock.workers.demo_model.examples import IGNORED, SCATTERED, Example, ExampleFactory, Stage, of_like_length
from penstock.workers.demo_model.tokenization import build_tokenizer

SEED = 7
STEPS = 4804
COUNTING = (
    Stage(150, {"window": 1, "scattered": 1}),
    Stage(300, {"window": 2, "scattered": 1, "whole": 1}),
)
COUNTING_RATE = 1.5e-3
MIXTURE = {
    "answer": 0.72,
    "arguments": 0.01,
    "whole": 0.05,
    "whole in chat": 0.05,
    "low": 0.05,
    "window": 0.07,
    "scattered": 0.05,
}
MIXTURE_RATE = 8e-4
MINING = Stage(500, {**MIXTURE, "failed": 0.8, "hardest": 0.4})
MINING_RATE = 3e-4
MINING_DECAY = 0.6  # of the rate, from one round to the next: what is mended late must break little
ROUNDS = 5
MARGIN = 0.5  # logits by which the right token shall lead: engines do not add up in the same order
WARM_UP = 50
COOL_DOWN = 0.3  # share of the mixture's steps
LEAST_RATE = 0.05  # share of the peak at the end of a cosine
MAX_POSITIONS = 4096
ROPE_BASE = 1e8  # slow rotations: the question is seen from a thousand positions away
EMBEDDING_SCALE = 0.05
MATCH_SCALE = 0.08
MATCH_LAYER = 1
MATCH_TURN = 0.7  # radians a pair of dimensions may turn over a thousand positions and still serve to compare
REPORT_EVERY = 250  # steps between lines of progress where no terminal shows the bar


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
    model = LlamaForCausalLM(config)
    _compare_tokens(model)
    return model


def _compare_tokens(model: LlamaForCausalLM) -> None:
    """Let one head of each key group attend to tokens equal to the present one, wherever they stand.

    Its queries and keys are the same projection, in the dimensions that rotate too slowly to tell positions apart.
    Embeddings are large beside what the first layers add to them, so that they stay recognisable.
    """
    model.model.embed_tokens.weight.data *= EMBEDDING_SCALE / model.config.initializer_range
    for layer in model.model.layers:
        for projection in (layer.self_attn.o_proj, layer.mlp.down_proj):
            projection.weight.data /= (2 * len(model.model.layers)) ** 0.5
    attention, size = model.model.layers[MATCH_LAYER].self_attn, model.config.head_dim
    turns = COUNT_LIMIT * ROPE_BASE ** (-torch.arange(0, size, 2) / size)
    slow = (turns.repeat(2) < MATCH_TURN).nonzero().flatten()
    for group in range(model.config.num_key_value_heads):
        shared = torch.randn(len(slow), model.config.hidden_size) * MATCH_SCALE
        attention.k_proj.weight.data[group * size + slow] = shared
        attention.q_proj.weight.data[group * attention.num_key_value_groups * size + slow] = shared


def logits_of(model: LlamaForCausalLM, examples: list[Example]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (targets, vocabulary) and targets (examples, width); causal attention never sees padding on the right."""
    pad = model.config.pad_token_id
    width = max(len(example.tokens) for example in examples)
    tokens = torch.tensor([_padded(example.tokens, width, pad) for example in examples])
    positions = torch.tensor([_padded(example.positions, width, 0) for example in examples])
    targets = torch.tensor([_padded(example.targets, width, IGNORED) for example in examples])
    # The mask of ones says that a jump in the positions is no border between packed sequences.
    hidden = model.model(
        input_ids=tokens, position_ids=positions, attention_mask=torch.ones_like(tokens)
    ).last_hidden_state
    return model.lm_head(hidden[targets != IGNORED]), targets


def loss_of(model: LlamaForCausalLM, examples: list[Example]) -> torch.Tensor:
    """Mean cross-entropy over the targets (a scalar)."""
    logits, targets = logits_of(model, examples)
    return torch.nn.functional.cross_entropy(logits, targets[targets != IGNORED])


def _padded(values: list[int], width: int, filler: int) -> list[int]:
    return [*values, *[filler] * (width - len(values))]


def cosine(step: int, steps: int) -> float:
    """The learning rate at a step, as a share of its peak: up, then down along a cosine."""
    return min(1.0, (step + 1) / WARM_UP) * max(LEAST_RATE, 0.5 * (1 + math.cos(math.pi * step / steps)))


def plateau(step: int, steps: int) -> float:
    """The learning rate at a step, as a share of its peak: up, constant, down to nothing."""
    return min(1.0, (step + 1) / WARM_UP, (steps - step) / (COOL_DOWN * steps))


def adamw(model: LlamaForCausalLM, rate: float) -> torch.optim.AdamW:
    """AdamW that decays matrices and leaves the norms' scales alone."""
    matrices = [weight for weight in model.parameters() if weight.ndim > 1]
    scales = [weight for weight in model.parameters() if weight.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": scales, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98), fused=True)


def fit(
    model: LlamaForCausalLM,
    factory: ExampleFactory,
    stages: tuple[Stage, ...],
    peak: float,
    shape: Callable[[int, int], float],
) -> None:
    """Train through the stages at a rate of that peak and shape; shows a progress bar, or lines without a terminal."""
    steps = sum(stage.batches for stage in stages)
    optimizer = adamw(model, peak)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: shape(step, steps))
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
        for step, batch in enumerate(factory.batches(stages)):
            optimizer.zero_grad()
            loss = loss_of(model, batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            average = loss.item() if step == 0 else 0.98 * average + 0.02 * loss.item()
            progress.update(task, advance=1, loss=average)
            if not sys.stdout.isatty() and (step + 1) % REPORT_EVERY == 0:
                print(f"step {step + 1}/{steps} loss {average:.3f}", flush=True)


def leads(model: LlamaForCausalLM, examples: Iterable[Example]) -> list[tuple[Example, torch.Tensor]]:
    """Each example with the logits, per position, that the right token is ahead of all others; infinite off target."""
    with torch.inference_mode():
        return [found for batch in of_like_length(examples) for found in zip(batch, _leads(model, batch), strict=True)]


def _leads(model: LlamaForCausalLM, batch: list[Example]) -> torch.Tensor:
    logits, targets = logits_of(model, batch)
    wanted = targets != IGNORED
    right = targets[wanted].unsqueeze(1)
    lead = logits.gather(1, right) - logits.scatter(1, right, -torch.inf).amax(1, keepdim=True)
    return torch.full(targets.shape, torch.inf).masked_scatter(wanted, lead)


def failed(example: Example, lead: torch.Tensor) -> Example:
    """The example with no targets but those missed or nearly missed, and the end that is to come none the less."""
    end = len(example.targets) - 2
    kept = {*(lead < MARGIN).nonzero().flatten().tolist(), end}
    targets = [target if place in kept else IGNORED for place, target in enumerate(example.targets)]
    return replace(example, targets=targets)


def hardest(example: Example, lead: torch.Tensor) -> Example:
    """The count cut down to the numbers that are hardest to follow, where they stand, and its last one."""
    first = next(place for place, target in enumerate(example.targets) if target != IGNORED)
    last = len(example.tokens) - 2
    numbers = lead[first + 1 : last].argsort()[:SCATTERED] + first + 1
    shown = [*range(first + 1), *sorted(numbers.tolist()), last]
    return Example(*([values[place] for place in shown] for values in astuple(example)))


def mine(model: LlamaForCausalLM, factory: ExampleFactory) -> None:
    """Train on what still fails, amid the mixture, until nothing does or the rounds are over.

    Hard examples in the sense of Shrivastava et al. (2016). They are looked for with the weights that are written:
    rounding can turn what is nearly a tie. A count goes wrong at one number in thousands of pairs of numbers, and
    what mends it breaks others: so every count is trained, at its hardest numbers.
    """
    for turn in range(ROUNDS):
        model.to(torch.bfloat16).to(torch.float32)
        counts = leads(model, factory.counts())
        fails = [
            (example, lead) for example, lead in [*leads(model, factory.answers()), *counts] if lead.min() < MARGIN
        ]
        print(f"round {turn + 1}/{ROUNDS}: {len(fails)} examples fail or nearly do", flush=True)
        if not fails:
            return
        factory.failed = [failed(example, lead) for example, lead in fails]
        factory.hardest = [hardest(example, lead) for example, lead in counts]
        fit(model, factory, (MINING,), MINING_RATE * MINING_DECAY**turn, cosine)


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
    factory = ExampleFactory(corpus, tokenizer, SEED)
    fit(model, factory, COUNTING, COUNTING_RATE, cosine)
    fit(model, factory, (Stage(steps, MIXTURE),), MIXTURE_RATE, plateau)
    mine(model, factory)
    save(model, tokenizer, out)
    print(f"{model.num_parameters():,} weights trained in {time.monotonic() - started:.0f} s: {out}")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=demo_model_path(), help="where the model is written")
    parser.add_argument("--steps", type=int, default=STEPS, help="steps of the mixture (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    train(arguments.out, arguments.steps)


if __name__ == "__main__":
    main()
