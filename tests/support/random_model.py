"""A tiny Llama with random weights, for shapes the demo model does not have."""

from __future__ import annotations

import json
from pathlib import Path

VOCABULARY = 512


def random_model(folder: Path, *, dtype: str = "float32", max_positions: int = 4096, seed: int = 0) -> Path:
    """Write a random Llama (hidden 256, 4 layers, 4 heads, 2 KV heads) and its tokenizer into ``folder``.

    The tokenizer has one token a word ``w0`` … ``w511``. Greedy output is arbitrary but exact, which is all that a
    comparison of two engines needs.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w1", bos_token="w2", pad_token="w3")
    fast.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    fast.save_pretrained(folder)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=max_positions,
        tie_word_embeddings=True,
        initializer_range=0.2,
        bos_token_id=2,
        eos_token_id=1,
        pad_token_id=3,
    )
    model = LlamaForCausalLM(config).to(getattr(torch, dtype))
    model.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 1}))
    return folder
