"""The official Python clients, unchanged, against the running stack."""

from __future__ import annotations

import json

import anthropic
import openai
import pytest

from tests.stack.conftest import MODEL

pytestmark = [pytest.mark.stack, pytest.mark.timeout(700)]

QUESTION = [{"role": "user", "content": "Count to 20."}]
COUNTED = " ".join(str(n) for n in range(1, 21))


@pytest.fixture
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)


def test_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0)
    assert answer.choices[0].message.content == COUNTED
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens >= 20


def test_chat_stream_with_usage(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model=MODEL, messages=QUESTION, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == COUNTED
    assert chunks[-1].usage.completion_tokens >= 20
    assert len(chunks) > 10, "tokens arrived in one lump"


@pytest.mark.parametrize("tier", ["priority", "default", "flex", "auto"])
def test_service_tiers(client: openai.OpenAI, tier: str) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0, service_tier=tier)
    assert answer.choices[0].message.content == COUNTED


def test_n_and_stop_and_logprobs(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=QUESTION, temperature=0.01, n=3, stop=[" 7"], logprobs=True, top_logprobs=2
    )
    assert [choice.message.content for choice in answer.choices] == ["1 2 3 4 5 6"] * 3
    for choice in answer.choices:
        assert choice.finish_reason == "stop"
        assert all(len(token.top_logprobs) == 2 for token in choice.logprobs.content)
        assert all(token.logprob <= 0 for token in choice.logprobs.content)


def test_logprobs_equal_across_the_hand_over(client: openai.OpenAI) -> None:
    """The first token's log probabilities come from the prefill engine, the others from decode."""
    answer = client.chat.completions.create(
        model=MODEL, messages=QUESTION, temperature=0, logprobs=True, top_logprobs=3
    )
    tokens = answer.choices[0].logprobs.content
    assert "".join(token.token for token in tokens).strip().startswith("1 2 3")
    assert all(token.top_logprobs[0].logprob == pytest.approx(token.logprob) for token in tokens)


def test_seeded_sampling_repeats(client: openai.OpenAI) -> None:
    def ask() -> str:
        answer = client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "Tell me anything at all, at length."}],
            temperature=1.5, seed=11, max_tokens=24,
        )  # fmt: skip
        return answer.choices[0].message.content

    assert ask() == ask()


def test_penalties_and_min_tokens(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=QUESTION, temperature=0, frequency_penalty=0.5, presence_penalty=0.5, max_tokens=12,
        extra_body={"min_tokens": 12},
    )  # fmt: skip
    assert answer.usage.completion_tokens == 12


def test_json_schema(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"colour": {"enum": ["red", "green"]}, "ok": {"type": "boolean"}},
        "required": ["colour", "ok"],
        "additionalProperties": False,
    }
    answer = client.chat.completions.create(
        model=MODEL, messages=QUESTION, temperature=0, max_tokens=60,
        response_format={"type": "json_schema", "json_schema": {"name": "thing", "schema": schema, "strict": True}},
    )  # fmt: skip
    parsed = json.loads(answer.choices[0].message.content)
    assert set(parsed) == {"colour", "ok"}
    assert parsed["colour"] in {"red", "green"}


def test_tool_call(client: openai.OpenAI) -> None:
    """A forced function: the grammar makes the call, the parser finds it.

    Its arguments are JSON, no more: held to the schema, a model that never learnt JSON fills them with white space.
    """
    tool = {
        "type": "function",
        "function": {
            "name": "scale",
            "parameters": {
                "type": "object",
                "properties": {"replicas": {"type": "integer", "minimum": 1, "maximum": 9}},
                "required": ["replicas"],
                "additionalProperties": False,
            },
        },
    }
    answer = client.chat.completions.create(
        model=MODEL, messages=QUESTION, temperature=0, max_tokens=60, tools=[tool],
        tool_choice={"type": "function", "function": {"name": "scale"}},
    )  # fmt: skip
    (call,) = answer.choices[0].message.tool_calls
    assert call.function.name == "scale"
    json.loads(call.function.arguments)


def test_completions_stream_and_echo_of_token_ids(client: openai.OpenAI) -> None:
    stream = client.completions.create(
        model=MODEL,
        prompt="1 2 3 4",
        max_tokens=5,
        temperature=0,
        stream=True,
        extra_body={"return_token_ids": True, "ignore_eos": True},
    )
    extras = [choice.model_extra or {} for chunk in stream for choice in chunk.choices]
    assert sum(len(extra.get("token_ids") or ()) for extra in extras) == 5


def test_prompt_logprobs(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model=MODEL, prompt="1 2 3 4 5 6", max_tokens=2, temperature=0, extra_body={"prompt_logprobs": 1}
    )
    assert len(answer.choices[0].model_extra["prompt_logprobs"]) >= 6


def test_responses(client: openai.OpenAI) -> None:
    answer = client.responses.create(model=MODEL, input="Count to 20.", temperature=0)
    assert answer.output_text == COUNTED


def test_responses_stream(client: openai.OpenAI) -> None:
    events = list(client.responses.create(model=MODEL, input="Count to 20.", temperature=0, stream=True))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == COUNTED
    assert events[-1].type == "response.completed"


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]


def test_unknown_model(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as error:
        client.chat.completions.create(model="nobody", messages=QUESTION)
    assert "nobody" in error.value.message


def test_anthropic_messages(url: str) -> None:
    client = anthropic.Anthropic(base_url=url, api_key="none", max_retries=0, timeout=120)
    greedy = {"temperature": 0}
    answer = client.messages.create(model=MODEL, max_tokens=64, messages=QUESTION, extra_body=greedy)
    assert answer.content[0].text == COUNTED
    with client.messages.stream(model=MODEL, max_tokens=64, messages=QUESTION, extra_body=greedy) as stream:
        assert "".join(stream.text_stream) == COUNTED
