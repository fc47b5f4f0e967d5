"""torchtitan's Trainer on one process, with its Llama 3 in a shape of ours and random rows. Written for version 0.3.

Peers run this file, without `internlm`. The functions say why torchtitan needs what they do.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from shapes import Shape


def trainer(
    shape: Shape, folder: Path, rate: float, compiled: bool, training: dict[str, Any], **more: Any
) -> Any:  # fmt: skip
    """Return its Trainer: FSDP2 over one rank, chunked loss, fused AdamW, the loss logged after each step.

    `training` is more of its `TrainingConfig`, `more` of its `Trainer.Config`; `rate` is that of learning.
    """
    _stand_in_for_torchrun()
    from torchtitan.components.loss import ChunkedLossWrapper, CrossEntropyLoss
    from torchtitan.components.metrics import MetricsProcessor
    from torchtitan.components.optimizer import LRSchedulersContainer, default_adamw
    from torchtitan.config.configs import CompileConfig, TrainingConfig
    from torchtitan.trainer import Trainer

    dataloader, tokenizer = _data(shape)
    return Trainer(
        Trainer.Config(
            model_spec=_model(shape),
            dump_folder=str(folder),
            loss=ChunkedLossWrapper.Config(loss_fn=CrossEntropyLoss.Config(global_vocab_size=shape.vocab_size)),
            optimizer=default_adamw(lr=rate),
            lr_scheduler=LRSchedulersContainer.Config(warmup_steps=0),
            training=TrainingConfig(local_batch_size=shape.batch_rows, seq_len=shape.seq_len, max_norm=1.0, **training),
            dataloader=dataloader,
            tokenizer=tokenizer,
            metrics=MetricsProcessor.Config(log_freq=1),
            compile=CompileConfig(enable=compiled),
            **more,
        )
    )


def _stand_in_for_torchrun() -> None:
    """Say that this is the one rank; port 0 is any free one, so that nothing else is in its way."""
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")


def run_on_cpu() -> None:
    """Give torchtitan what it takes for granted; nothing here touches the arithmetic of a step.

    Must be called before anything of it is imported.
    """
    import torch._utils

    _stand_in_for_torchrun()
    # It asks torch for the accelerator and takes "cuda" where there is none.
    torch._utils._get_available_device_type = lambda: "cpu"

    # Its memory monitor asks the device for things that torch.cpu does not know.
    properties = types.SimpleNamespace(
        name="cpu", total_memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    )
    answers: dict[str, Any] = {
        "get_device_name": lambda *_: "cpu",
        "get_device_properties": lambda *_: properties,
        "memory_stats": lambda *_: {},
        "reset_peak_memory_stats": lambda *_: None,
        "empty_cache": lambda: None,
    }
    for name, answer in answers.items():
        if not hasattr(torch.cpu, name):
            setattr(torch.cpu, name, answer)

    # Its expert-parallel kernels import triton when the package is loaded, though dense models use none of them. Only
    # that one module is replaced: a false `triton` would mislead torch.compile.
    if importlib.util.find_spec("triton") is None:
        name = "torchtitan.distributed.minimal_async_ep.kernels"
        sys.modules[name] = _Absent(name)

    # After the first step it shortens the time-outs behind a barrier with device ids, which gloo refuses.
    from torchtitan.distributed import utils

    utils.set_pg_timeouts = lambda *_, **__: None


class _Absent(types.ModuleType):
    """A module that can be imported from, and whose functions cannot be called."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def refuse(*_: Any, **__: Any) -> None:
            raise RuntimeError(f"{self.__name__}.{name} is not available here")

        return refuse


def _model(shape: Shape) -> Any:
    """Return its Llama 3 in our shape, with fused qkv as in its own sizes.

    Attention is its `ScaledDotProductAttention`, causal: its language models now offer only FlexAttention and varlen,
    which are written for GPUs. With one document per row the result is the same.
    """
    from torchtitan.models.common import ComplexRoPE, Embedding, Linear, RMSNorm
    from torchtitan.models.common.attention import ScaledDotProductAttention
    from torchtitan.models.common.config_utils import make_ffn_config, make_gqa_config
    from torchtitan.models.llama3 import Llama3Model, parallelize_llama
    from torchtitan.models.llama3.model import Llama3TransformerBlock
    from torchtitan.protocols.model_spec import ModelSpec

    size, vocab = shape.hidden_size, shape.vocab_size
    start = {"weight": partial(torch.nn.init.normal_, std=0.02)}

    def norm() -> Any:
        return RMSNorm.Config(normalized_shape=size, param_init={"weight": torch.nn.init.ones_})

    def block() -> Any:
        attention = make_gqa_config(
            dim=size, n_heads=shape.num_heads, wqkv_param_init=start, wo_param_init=start, fuse_qkv=True,
            inner_attention=ScaledDotProductAttention.Config(),
            rope=ComplexRoPE.Config(dim=size // shape.num_heads, max_seq_len=shape.seq_len),
        )  # fmt: skip
        ffn = make_ffn_config(dim=size, hidden_dim=shape.ffn_size, w1_param_init=start, w2w3_param_init=start)
        return Llama3TransformerBlock.Config(
            attention_norm=norm(), ffn_norm=norm(), attention=attention, feed_forward=ffn
        )

    model = Llama3Model.Config(
        dim=size,
        vocab_size=vocab,
        tok_embeddings=Embedding.Config(num_embeddings=vocab, embedding_dim=size, param_init=start),
        norm=norm(),
        lm_head=Linear.Config(in_features=size, out_features=vocab, param_init=start),
        layers=[block() for _ in range(shape.num_layers)],
    )
    return ModelSpec(
        name="llama3", flavor="benchmark", model=model, parallelize_fn=parallelize_llama, pipelining_fn=None,
        post_optimizer_build_fn=None, state_dict_adapter=None,
    )  # fmt: skip


def _data(shape: Shape) -> tuple[Any, Any]:
    """Return the configurations of a dataloader of random rows and of a tokenizer that is never asked.

    Its own dataloaders read text from Hugging Face data sets and tokenise it.
    """
    from torchtitan.components.dataloader import BaseDataLoader
    from torchtitan.components.tokenizer import BaseTokenizer

    class RandomRows(BaseDataLoader):
        @dataclass(kw_only=True, slots=True)
        class Config(BaseDataLoader.Config):
            pass

        def __init__(self, config: Any, **_: Any) -> None:
            pass

        def __iter__(self) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
            while True:
                ids = torch.randint(shape.vocab_size, (shape.batch_rows, shape.seq_len + 1))
                yield {"input": ids[:, :-1].contiguous()}, ids[:, 1:].contiguous()

        def state_dict(self) -> dict[str, Any]:
            return {}

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            pass

    class NoTokenizer(BaseTokenizer):
        @dataclass(kw_only=True, slots=True)
        class Config(BaseTokenizer.Config):
            pass

        def __init__(self, config: Any, **_: Any) -> None:
            super().__init__()

        def encode(self, *_: Any, **__: Any) -> list[int]:
            raise NotImplementedError

        def decode(self, *_: Any, **__: Any) -> str:
            raise NotImplementedError

        def get_vocab_size(self) -> int:
            return shape.vocab_size

    return RandomRows.Config(), NoTokenizer.Config()
