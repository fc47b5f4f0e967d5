"""The peers of `train_cpu.py`: each function trains for a few steps and returns when every step ended.

This file is run by the interpreter that has the peers, which need not have `internlm`: it imports nothing of it, and
each peer only where it is used. What a peer needs before it runs on a CPU is said, with the reason, where it is done.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import time
import types
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from train_cpu import Shape

LEARNING_RATE = 3e-4


@dataclass
class Trace:
    """What a contender did: a mark before the first step and after each, in seconds, and the loss of each step."""

    parameters: int = 0
    marks_s: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    def mark(self, loss: float | None = None) -> None:
        """Note the time; with a loss, the end of a step."""
        self.marks_s.append(time.perf_counter())
        if loss is not None:
            self.losses.append(loss)


def count(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def train_transformers(shape: Shape, steps: int, compiled: bool, folder: Path) -> Trace:
    """Train `LlamaForCausalLM` with the library's `Trainer`; fused AdamW and SDPA are its own defaults.

    Steps end when the Trainer has logged the loss, which it does after each (`logging_steps=1`).
    """
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

    config = LlamaConfig(
        hidden_size=shape.hidden_size, num_hidden_layers=shape.num_layers, num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_heads, intermediate_size=shape.ffn_size, vocab_size=shape.vocab_size,
        max_position_embeddings=shape.seq_len, tie_word_embeddings=False, use_cache=False,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    trace = Trace(count(model))

    class Recorder(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            trace.mark()

        def on_log(self, *_: Any, logs: dict[str, Any] | None = None, **__: Any) -> None:
            if logs and "loss" in logs:  # the summary at the end of the run has none
                trace.mark(float(logs["loss"]))

    arguments = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=shape.batch_rows, max_steps=steps, use_cpu=True,
        learning_rate=LEARNING_RATE, optim="adamw_torch_fused", max_grad_norm=1.0, torch_compile=compiled,
        logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    rows = [
        {"input_ids": ids, "labels": ids}
        for ids in torch.randint(shape.vocab_size, (steps * shape.batch_rows, shape.seq_len))
    ]
    Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[Recorder()]).train()
    return trace


def train_litgpt(shape: Shape, steps: int, compiled: bool, folder: Path) -> Trace:
    """Train its `GPT` with its `chunked_cross_entropy` in a plain loop.

    The loop stands for the one in its `pretrain`, which wants a tokenizer folder, a data module and a checkpoint folder
    around the same statements. It compiles the whole model and not the loss, and so does this. Its AdamW is fused on
    GPUs only; here it is fused, which favours it a little.
    """
    from litgpt.config import Config
    from litgpt.model import GPT
    from litgpt.utils import chunked_cross_entropy

    model: Any = GPT(
        Config(
            name="benchmark", block_size=shape.seq_len, n_layer=shape.num_layers, n_embd=shape.hidden_size,
            n_head=shape.num_heads, intermediate_size=shape.ffn_size, vocab_size=shape.vocab_size,
            padded_vocab_size=shape.vocab_size, norm_class_name="RMSNorm", mlp_class_name="LLaMAMLP", bias=False,
            parallel_residual=False, rotary_percentage=1.0,
        )
    )  # fmt: skip
    trace = Trace(count(model))
    if compiled:
        model = torch.compile(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.1, fused=True)
    rows = torch.randint(shape.vocab_size, (steps, shape.batch_rows, shape.seq_len + 1))
    trace.mark()
    for batch in rows:
        loss = chunked_cross_entropy(model(batch[:, :-1].contiguous()), batch[:, 1:].contiguous())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        trace.mark(loss.item())
    return trace


def train_torchtitan(shape: Shape, steps: int, compiled: bool, folder: Path) -> Trace:
    """Train its Llama 3 model with its own `Trainer`: FSDP2 over gloo with one rank, chunked loss, fused AdamW.

    Steps end when its metrics processor has logged the loss, which it does after each (`log_freq=1`).
    """
    _let_torchtitan_run_on_cpu()
    from torchtitan.components.loss import ChunkedLossWrapper, CrossEntropyLoss
    from torchtitan.components.metrics import MetricsProcessor
    from torchtitan.components.optimizer import LRSchedulersContainer, default_adamw
    from torchtitan.config.configs import CompileConfig, TrainingConfig
    from torchtitan.trainer import Trainer

    dataloader, tokenizer = _torchtitan_data(shape)
    trainer = Trainer(
        Trainer.Config(
            model_spec=_torchtitan_model(shape),
            dump_folder=str(folder),
            loss=ChunkedLossWrapper.Config(loss_fn=CrossEntropyLoss.Config(global_vocab_size=shape.vocab_size)),
            optimizer=default_adamw(lr=LEARNING_RATE),
            lr_scheduler=LRSchedulersContainer.Config(warmup_steps=0),
            training=TrainingConfig(
                local_batch_size=shape.batch_rows,
                seq_len=shape.seq_len,
                steps=steps,
                max_norm=1.0,
                mixed_precision_param="float32",  # its default, bfloat16, is emulated and far slower on most CPUs
                disable_cuda_graphs=True,  # on by default
            ),
            dataloader=dataloader,
            tokenizer=tokenizer,
            metrics=MetricsProcessor.Config(log_freq=1),
            activation_checkpoint=None,  # on by default; no other contender recomputes
            compile=CompileConfig(enable=compiled),
        )
    )
    trace = Trace(count(trainer.model_parts[0]))
    log = trainer.metrics_processor.log

    def log_and_mark(step: int, loss: float, *rest: Any, **named: Any) -> None:
        log(step, loss, *rest, **named)
        trace.mark(float(loss))

    trainer.metrics_processor.log = log_and_mark
    trace.mark()
    trainer.train()
    trainer.close()
    return trace


def _let_torchtitan_run_on_cpu() -> None:
    """Give torchtitan what it takes for granted; nothing here touches the arithmetic of a step.

    Written for version 0.3. Must be called before anything of it is imported.
    """
    import torch._utils

    # It wants to be started by torchrun. Port 0: any free one, so that nothing else is in its way.
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")

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


def _torchtitan_model(shape: Shape) -> Any:
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


def _torchtitan_data(shape: Shape) -> tuple[Any, Any]:
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


TRAIN = {"transformers": train_transformers, "torchtitan": train_torchtitan, "litgpt": train_litgpt}
"""Library → what trains with it."""
