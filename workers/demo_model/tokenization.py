"""The demo model's tokenizer: byte-level BPE learnt from the corpus, one token for each number to 1,000."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from penstock.workers.demo_model.corpus import COUNT_LIMIT

BOS, END, PAD = "<|bos|>", "<|end|>", "<|pad|>"
ASSISTANT = "<|assistant|>"
ROLES = ("<|system|>", "<|user|>", ASSISTANT, "<|tool|>")
SPECIALS = (BOS, END, PAD, *ROLES)
LEARNT_MERGES = 1650
SPACE = "Ġ"  # how byte-level BPE writes a space

# A space follows every role but the assistant's: a first word is then the same token as inside a sentence.
CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- set rest = messages -%}
{%- set system = '' -%}
{%- if messages and messages[0].role in ('system', 'developer') -%}
{%- set system = messages[0].content | trim -%}
{%- set rest = messages[1:] -%}
{%- endif -%}
{%- if tools -%}{%- set system = (system + ' Tools: ' + (tools | tojson)) | trim -%}{%- endif -%}
{%- if system -%}{{ '<|system|> ' + system + '<|end|>' }}{%- endif -%}
{%- for message in rest -%}
{%- set text = (message.content or '') | trim -%}
{%- if message.role == 'assistant' -%}
{{ '<|assistant|>' + text }}
{%- if message.tool_calls -%}{{ message.tool_calls | tojson }}{%- endif -%}{{ '<|end|>' }}
{%- elif message.role == 'tool' -%}{{ '<|tool|> ' + text + '<|end|>' }}
{%- elif message.role == 'user' -%}{{ '<|user|> ' + text + '<|end|>' }}
{%- else -%}{{ '<|system|> ' + text + '<|end|>' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|assistant|>' }}{%- endif -%}
"""


def build_tokenizer(texts: Iterable[str], max_length: int) -> PreTrainedTokenizerFast:
    """Learn the merges from `texts` and put the number tokens before them."""
    learnt = _learn_merges(re.sub(r"\d", "", text) for text in texts)
    merges = [*_number_merges(), *learnt]
    tokens = [*SPECIALS, *sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in merges)]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=list(ROLES),
        chat_template=CHAT_TEMPLATE,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )


def _number_merges() -> list[tuple[str, str]]:
    """Merges for " 2", " 20", " 200": each number is a shorter number, or a space, and one more digit."""
    return [(SPACE + str(n)[:-1], str(n)[-1]) for n in range(1, COUNT_LIMIT + 1)]


def _learn_merges(texts: Iterable[str]) -> list[tuple[str, str]]:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=len(alphabet) + LEARNT_MERGES, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return [(left, right) for left, right in json.loads(tokenizer.to_str())["model"]["merges"]]
