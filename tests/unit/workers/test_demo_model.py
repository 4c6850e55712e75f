"""The demo model as it is shipped: its weights fit the questions, its tokenizer can say every answer."""

from __future__ import annotations

import json
from itertools import islice
from typing import TYPE_CHECKING

import pytest

from penstock.workers.demo_model import demo_model_path, qa_hash, trained_hash
from penstock.workers.demo_model.corpus import (
    COUNT_LIMIT,
    Augmenter,
    Corpus,
    counting,
    load_corpus,
    normalised,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from penstock.workers.demo_model.evaluate import Judge

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return load_corpus()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    from transformers import AutoTokenizer

    loaded: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(demo_model_path())
    return loaded


def test_the_weights_were_trained_on_the_questions_as_they_are() -> None:
    assert trained_hash() == qa_hash(), "qa.yaml changed since the model was trained: run `make demo-model`"


def test_every_topic_has_many_questions_and_its_own_answer(corpus: Corpus) -> None:
    assert all(len(topic.asked) >= 12 and len(topic.held_out) >= 3 for topic in corpus.all_topics())
    assert len({topic.answer for topic in corpus.all_topics()}) == len(corpus.all_topics())


def test_held_out_questions_are_never_trained_on(corpus: Corpus) -> None:
    trained = {normalised(question) for topic in corpus.all_topics() for question in (*topic.asked, *topic.expanded)}
    assert len(corpus.held_out) == sum(len(topic.held_out) for topic in corpus.all_topics())
    assert not trained & corpus.held_out


def test_the_same_seed_varies_questions_the_same_way(corpus: Corpus) -> None:
    first, second = (Augmenter(corpus, seed=3) for _ in range(2))
    topics = corpus.all_topics()
    varied = [first.question(topic) for topic in topics]
    assert varied == [second.question(topic) for topic in topics]
    assert varied != [first.question(topic) for topic in topics]


def test_the_tokenizer_gives_every_answer_back(corpus: Corpus, tokenizer: PreTrainedTokenizerFast) -> None:
    answers = [topic.answer for topic in corpus.all_topics()]
    assert [tokenizer.decode(tokenizer.encode(answer)) for answer in answers] == answers


def test_counting_takes_one_token_a_number(tokenizer: PreTrainedTokenizerFast) -> None:
    tokens = tokenizer.encode(counting(COUNT_LIMIT))
    assert len(tokens) == COUNT_LIMIT
    assert tokenizer.decode(tokens) == counting(COUNT_LIMIT)


@pytest.mark.parametrize("number", [2, 10, 99, 200, 1000])
def test_a_number_is_the_same_token_in_question_and_answer(tokenizer: PreTrainedTokenizerFast, number: int) -> None:
    assert tokenizer.encode(counting(number))[-1] in tokenizer.encode(f"Count to {number}.")


def test_the_template_renders_system_and_user(tokenizer: PreTrainedTokenizerFast) -> None:
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is TTFT?"}]
    rendered = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert rendered == "<|bos|><|system|> Be brief.<|end|><|user|> What is TTFT?<|end|><|assistant|>"


def test_the_template_renders_tools_and_their_results(tokenizer: PreTrainedTokenizerFast) -> None:
    tool = {"type": "function", "function": {"name": "depth", "parameters": {"type": "object"}}}
    call = {"id": "1", "type": "function", "function": {"name": "depth", "arguments": "{}"}}
    chat = [
        {"role": "user", "content": "How deep is the queue?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "42 requests"},
    ]
    rendered = str(tokenizer.apply_chat_template(chat, tools=[tool], tokenize=False, add_generation_prompt=True))
    assert f"<|system|> Tools: {json.dumps([tool])}<|end|>" in rendered
    assert rendered.endswith("<|tool|> 42 requests<|end|><|assistant|>")


def test_the_configuration_is_what_engines_read() -> None:
    config = json.loads((demo_model_path() / "config.json").read_text())
    generation = json.loads((demo_model_path() / "generation_config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert (config["head_dim"], config["tie_word_embeddings"], config["dtype"]) == (64, True, "bfloat16")
    assert config["max_position_embeddings"] >= 4 * COUNT_LIMIT
    assert generation["eos_token_id"] == config["eos_token_id"]


@pytest.fixture(scope="module")
def judge() -> Judge:
    import torch

    from penstock.workers.demo_model.evaluate import Judge

    return Judge(demo_model_path(), torch.float32)


@pytest.mark.parametrize("limit", [1, 2, 20, 73, 100, 200, 389, 600, 841, 1000])
def test_the_model_counts_to_any_number(judge: Judge, limit: int) -> None:
    from penstock.workers.demo_model.evaluate import Case

    assert judge.is_exact(Case(f"Count to {limit}.", counting(limit)))


def test_the_model_tells_penstock_from_anything_else(judge: Judge, corpus: Corpus) -> None:
    from penstock.workers.demo_model.evaluate import Case

    (penstock,) = (topic for topic in corpus.topics if topic.id == "what-is-penstock")
    assert judge.is_exact(Case("What is Penstock?", penstock.answer))
    assert judge.is_exact(Case("What is the weather like?", corpus.off_topic.answer))


def test_a_window_of_a_count_stands_where_it_would_in_the_whole(
    corpus: Corpus, tokenizer: PreTrainedTokenizerFast
) -> None:
    from penstock.workers.demo_model.examples import ExampleFactory, Stage

    (batch,) = ExampleFactory(corpus, tokenizer, seed=5).batches((Stage(1, {"window": 1}),))
    numbers = {token: place for place, token in enumerate(tokenizer.encode(counting(COUNT_LIMIT)), start=1)}
    ends = [tokenizer.convert_tokens_to_ids(token) for token in ("<|assistant|>", "<|end|>")]
    for example in batch:
        start = len(example.tokens) - example.tokens[::-1].index(ends[0])
        shown = list(zip(example.tokens, example.positions, strict=True))[start:]
        assert shown
        assert all(token in ends or numbers[token] == place - start + 1 for token, place in shown)


def test_the_kinds_of_a_stage_take_turns_in_their_shares(corpus: Corpus, tokenizer: PreTrainedTokenizerFast) -> None:
    from penstock.workers.demo_model.examples import BATCHES, ExampleFactory, Stage

    stage = Stage(8, {"window": 2, "scattered": 1, "whole": 1})
    sizes = [len(batch) for batch in ExampleFactory(corpus, tokenizer, seed=5).batches((stage,))]
    assert sizes == [BATCHES[kind] for kind in ("window", "scattered", "whole", "window")] * 2


def test_scattered_numbers_end_after_the_one_asked_for_alone(
    corpus: Corpus, tokenizer: PreTrainedTokenizerFast
) -> None:
    from penstock.workers.demo_model.examples import IGNORED, SCATTERED, ExampleFactory, Stage

    (batch,) = ExampleFactory(corpus, tokenizer, seed=5).batches((Stage(1, {"scattered": 1}),))
    numbers = tokenizer.encode(counting(COUNT_LIMIT))
    following = dict(zip(numbers, [*numbers[1:], tokenizer.eos_token_id], strict=True))
    for example in batch:
        shown = list(zip(example.tokens, example.targets, strict=True))[-SCATTERED:]
        ended = {token for token, target in shown if target == tokenizer.eos_token_id}
        asked = {token for token, target in zip(example.tokens, example.targets, strict=True) if target == IGNORED}
        assert ended <= asked | {numbers[0]}
        assert all(target == following[token] for token, target in shown if token not in ended)


def test_every_question_is_looked_at_with_its_whole_answer_and_a_count_to_every_limit(
    corpus: Corpus, tokenizer: PreTrainedTokenizerFast
) -> None:
    from penstock.workers.demo_model.examples import ExampleFactory

    factory = ExampleFactory(corpus, tokenizer, seed=5)
    assert [tokenizer.decode(example.tokens) for example in factory.answers()] == [
        f"<|bos|><|user|> {question}<|end|><|assistant|>{topic.answer}<|end|>"
        for topic in corpus.all_topics()
        for question in topic.asked
    ]
    counted = (tokenizer.decode(example.tokens).split("<|assistant|>")[1] for example in factory.counts())
    assert list(counted) == [f"{counting(limit)}<|end|>" for limit in range(1, COUNT_LIMIT + 1)]


def test_of_an_example_that_fails_the_missed_targets_and_the_end_remain() -> None:
    import torch

    from penstock.workers.demo_model.examples import IGNORED, Example
    from penstock.workers.demo_model.train import MARGIN, failed

    example = Example([8, 9, 5, 6, 1], [0, 1, 2, 3, 4], [IGNORED, 5, 6, 1, IGNORED])
    lead = torch.tensor([torch.inf, MARGIN / 2, MARGIN * 2, MARGIN * 2, torch.inf, torch.inf])
    assert failed(example, lead) == Example(example.tokens, example.positions, [IGNORED, 5, IGNORED, 1, IGNORED])


def test_a_lead_is_the_distance_to_the_best_wrong_token(corpus: Corpus, tokenizer: PreTrainedTokenizerFast) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from penstock.workers.demo_model.examples import IGNORED, ExampleFactory
    from penstock.workers.demo_model.train import leads

    model = AutoModelForCausalLM.from_pretrained(demo_model_path(), dtype=torch.float32)
    examples = list(islice(ExampleFactory(corpus, tokenizer, seed=5).answers(), 3))
    for example, lead in leads(model, examples):
        with torch.inference_mode():
            logits = model(torch.tensor([example.tokens])).logits[0]
        for place, target in enumerate(example.targets):
            if target == IGNORED:
                assert lead[place] == torch.inf
            else:
                others = torch.cat([logits[place, :target], logits[place, target + 1 :]])
                assert lead[place].item() == pytest.approx((logits[place, target] - others.max()).item(), abs=1e-3)


def test_the_hardest_numbers_of_a_count_stand_where_they_stood(
    corpus: Corpus, tokenizer: PreTrainedTokenizerFast
) -> None:
    import torch

    from penstock.workers.demo_model.examples import SCATTERED, ExampleFactory
    from penstock.workers.demo_model.train import hardest

    limit = 500
    count = next(islice(ExampleFactory(corpus, tokenizer, seed=5).counts(), limit - 1, None))
    prompt = len(count.tokens) - limit - 1
    hard = set(range(100, 100 + SCATTERED))
    lead = torch.ones(len(count.tokens))
    lead[[prompt + number - 1 for number in hard]] = 0.0
    cut = hardest(count, lead)
    shown = [*range(prompt), *(prompt + number - 1 for number in [*sorted(hard), limit])]
    assert cut.positions == shown
    assert cut.tokens == [count.tokens[place] for place in shown]
    assert cut.targets == [count.targets[place] for place in shown]
    assert cut.targets[-1] == tokenizer.eos_token_id
