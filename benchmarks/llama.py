"""Transformers' Llama in a shape of ours; a file that peers run, without `internlm`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from shapes import Shape

    from internlm.model.config import ModelConfig


def llama_config(shape: Shape | ModelConfig, length: int, **more: Any) -> Any:
    """Return the `LlamaConfig` of a decoder for so many tokens, with untied embeddings and no special ids."""
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=shape.hidden_size, num_hidden_layers=shape.num_layers, num_attention_heads=shape.num_heads,
        num_key_value_heads=getattr(shape, "num_kv_heads", shape.num_heads), intermediate_size=shape.ffn_size,
        vocab_size=shape.vocab_size, max_position_embeddings=length, tie_word_embeddings=False,
        attention_bias=getattr(shape, "qkv_bias", False), bos_token_id=None, eos_token_id=None, pad_token_id=None,
        **more,
    )  # fmt: skip


@torch.inference_mode()
def generate(model: Any, prompts: list[list[int]], new: int, **options: Any) -> list[list[int]]:
    """Return its own greedy answers of exactly `new` tokens to prompts of one length."""
    ids = torch.tensor(prompts, device=model.device)
    exactly = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
    out = model.generate(ids, attention_mask=torch.ones_like(ids), **exactly, **options)
    return out[:, ids.shape[1] :].tolist()
