"""The demo model before its training: a Llama of four million weights that can already find a repeated token.

To stop a count, the model must notice that the number it stands on is the one in the prompt. That takes two heads,
one on top of the other, and random weights do not find them in reasonable time. So they are there from the start:
the marking head of the first layer looks for the assistant's role and marks what comes after it; the matching head
of the second looks for the token it stands on (as an induction head does, Olsson et al. 2022) and reads the marks,
which differ if the prompt holds that token too. What to make of the finding, and all else, is learnt.
"""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import LlamaAttention

from penstock.workers.demo_model.tokenization import ASSISTANT

MAX_POSITIONS = 4096
ROPE_BASE = 1e6  # slow rotations: a number must match itself in the prompt a thousand positions away
HEAD_DIM = 64
_HALF = HEAD_DIM // 2
# The dimensions of a head that a thousand positions hardly turn.
_SLOW = torch.tensor([*range(_HALF // 2, _HALF), *range(_HALF + _HALF // 2, HEAD_DIM)])
_QUIET = 0.05  # layers that add little at first leave the matching head the embeddings to compare

# Dimensions of the residual stream that the two heads talk through.
_ALWAYS, _ROLE, _MARK, _FOUND = range(4)
_RESERVED = 4
_WIDE = 3  # factor on the embeddings: training must not drown what tells the tokens apart
_CONSTANT = 0.12  # of every token, so that a query can be the same everywhere; embeddings deviate by 0.06
_ROLE_SIZE = 0.48


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """A Llama of about four million weights, freshly initialised, with the two heads in place."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=HEAD_DIM,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_BASE},
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        _reserve(model, tokenizer.convert_tokens_to_ids(ASSISTANT))
        _mark_answers(model.model.layers[0].self_attn)
        _match_tokens(model.model.layers[1].self_attn, config.hidden_size)
    return model


def _reserve(model: LlamaForCausalLM, assistant: int) -> None:
    """Give the two heads their dimensions of the residual stream, and quiet the layers."""
    embeddings = model.model.embed_tokens.weight
    embeddings.mul_(_WIDE)
    embeddings[:, :_RESERVED] = 0
    embeddings[:, _ALWAYS] = _CONSTANT
    embeddings[assistant, _ROLE] = _ROLE_SIZE
    for layer in model.model.layers:
        for projection in (layer.self_attn.o_proj, layer.mlp.down_proj):
            projection.weight.mul_(_QUIET)
            projection.weight[:_RESERVED] = 0


def _mark_answers(attention: LlamaAttention) -> None:
    """Query head 2 attends to the assistant's role wherever it is in sight, and says so."""
    query, key = 2 * HEAD_DIM, HEAD_DIM  # two query heads share a key head
    attention.q_proj.weight[query : query + HEAD_DIM] = 0
    attention.k_proj.weight[key : key + HEAD_DIM] = 0
    attention.q_proj.weight[query + _SLOW, _ALWAYS] = 0.46
    attention.k_proj.weight[key + _SLOW, _ROLE] = 0.46
    attention.v_proj.weight[key] = 0
    attention.v_proj.weight[key, _ROLE] = 0.3
    attention.o_proj.weight[_MARK, query] = 0.06


def _match_tokens(attention: LlamaAttention, hidden: int) -> None:
    """Query head 0 attends to the token it stands on, wherever else it is, and reads its mark."""
    same = torch.randn(_HALF, hidden) * 0.14
    same[:, :_RESERVED] = 0
    for projection in (attention.q_proj, attention.k_proj):
        projection.weight[:HEAD_DIM] = 0
        projection.weight[_SLOW] = same
    attention.v_proj.weight[0] = 0
    attention.v_proj.weight[0, _MARK] = 0.5
    attention.o_proj.weight[_FOUND, 0] = 0.15
