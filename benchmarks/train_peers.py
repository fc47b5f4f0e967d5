"""The contenders of `train_cpu.py`: each trains for some steps and returns when every step ended.

This file is the worker. The interpreter that has the peers runs it, which need not have `internlm`: ours and each peer
are imported only where they are used. What a peer needs before it runs on a CPU is said where it is done.
"""

from __future__ import annotations

import math
import resource
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torchtitan_llama
import workers
from llama import llama_config
from shapes import LEARNING_RATE, Shape


def do(job: dict[str, Any]) -> dict[str, Any]:
    """Train as the job says; return the step times.

    Raises:
        RuntimeError: a step was left out, or a loss is not finite.
    """
    shape, steps = Shape(**job["shape"]), job["steps"] + 1
    library, _, mode = job["name"].partition("+")
    torch.set_num_threads(job["threads"])
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        trace = TRAIN[library](shape, steps, bool(mode), Path(folder))
    if len(trace.losses) != steps or not all(map(math.isfinite, trace.losses)):
        raise RuntimeError(f"took {len(trace.losses)} of {steps} steps, losses {trace.losses}")
    spent = [after - before for before, after in zip(trace.marks_s, trace.marks_s[1:], strict=False)]
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes on macOS, KiB on Linux
    return {
        "first_step_s": spent[0],
        "step_s": spent[1:],
        "losses": trace.losses,
        "parameters": trace.parameters,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
        "threads": torch.get_num_threads(),
    }


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
    from transformers import LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

    model = LlamaForCausalLM(llama_config(shape, shape.seq_len, use_cache=False))
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
    """Train its Llama 3 model with its own `Trainer`; FSDP2 runs over gloo.

    Steps end when its metrics processor has logged the loss, which it does after each.
    """
    torchtitan_llama.run_on_cpu()
    # bfloat16, its default, is emulated and far slower on most CPUs; CUDA graphs are on by default, and recomputation,
    # which no other contender does.
    training = {"steps": steps, "mixed_precision_param": "float32", "disable_cuda_graphs": True}
    trainer = torchtitan_llama.trainer(
        shape, folder, LEARNING_RATE, compiled, training, activation_checkpoint=None
    )  # fmt: skip
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


def train_ours(shape: Shape, steps: int, compiled: bool, folder: Path) -> Trace:
    """Train with the Trainer that a recipe gives."""
    import random_run

    random_run.write_shards(folder / "data", shape.vocab_size, shape.seq_len, steps * shape.batch_rows)
    trace = Trace()
    runtime = {"device": "cpu", "compile": compiled, "threads": torch.get_num_threads()}
    trainer = random_run.train(shape, steps, folder, trace.mark, runtime=runtime)
    trace.parameters = count(trainer.model)
    return trace


TRAIN = {
    "ours": train_ours,
    "transformers": train_transformers,
    "torchtitan": train_torchtitan,
    "litgpt": train_litgpt,
}
"""Library → what trains with it."""


if __name__ == "__main__":
    workers.answer(do)
