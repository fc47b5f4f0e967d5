"""The peers of `gpu_train.py`: each gives a function that takes one step and returns its loss.

All train on random ids, read the loss after every step, clip at 1.0 and use torch's fused AdamW.
"""

from __future__ import annotations

import contextlib
import importlib.util
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torchtitan_llama
from gpu_cases import LEARNING_RATE, Case
from llama import llama_config
from shapes import Shape
from torch.profiler import record_function

Step = Callable[[], float]


def build_llama(case: Case, device: torch.device) -> Any:
    """Return transformers' Llama in the case's shape, with SDPA; biases as in ours where it can have them."""
    from transformers import LlamaForCausalLM

    config = llama_config(case.shape, case.seq_len, use_cache=False, attn_implementation="sdpa")
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if case.library == "transformers-bf16" else torch.float32)
    try:
        with device:
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    model.train()
    if case.recompute != "none":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # the name changes in 6, and the new one is not in all of 5
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def llama_loss(model: Any, ids: torch.Tensor, case: Case) -> torch.Tensor:
    """Return the loss of rows [B, T]; with several documents in a row their positions start again.

    transformers then makes a mask [B, 1, T, T] from the positions, with which SDPA takes a slower kernel.
    """
    low = case.dtype == "bfloat16" and case.library == "transformers"
    context = torch.autocast(ids.device.type, torch.bfloat16) if low else contextlib.nullcontext()
    more: dict[str, Any] = {}
    if case.documents > 1:
        positions = torch.arange(case.seq_len, device=ids.device) % (case.seq_len // case.documents)
        more["position_ids"] = positions.expand(ids.shape[0], -1)
    with context:
        return model(input_ids=ids, labels=ids, **more).loss


def transformers_step(case: Case, folder: Path) -> tuple[Step, int]:
    """Return the step of a plain loop around transformers' Llama, and its number of parameters."""
    device = torch.device(case.device)
    model = build_llama(case, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    if "compile" in case.switches:
        model.compile()
    generator = torch.Generator().manual_seed(0)
    parameters, vocab_size = list(model.parameters()), case.shape.vocab_size
    rows = (case.micro_batches, case.micro_rows, case.seq_len)

    def step() -> float:
        total = torch.zeros((), device=device)
        for ids in torch.randint(vocab_size, rows, generator=generator):
            loss = llama_loss(model, ids.to(device), case) / case.micro_batches
            loss.backward()
            total += loss.detach()
        with record_function("benchmark/optimizer"):
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        return float(total)

    return step, sum(p.numel() for p in parameters)


def torchtitan_step(case: Case, folder: Path) -> tuple[Step, int]:
    """Return a step of torchtitan's Trainer on random rows.

    Never run on a GPU yet. The model gets its SDPA, as in the CPU benchmark, hence whole rows only; it has no biases.
    What it recomputes is its own default, or nothing where ours recomputes nothing.

    Raises:
        RuntimeError: it cannot be imported, or the case is beyond it.
    """
    if importlib.util.find_spec("torchtitan") is None:
        raise RuntimeError("torchtitan is not installed")
    if case.documents > 1 or case.micro_batches > 1 or case.device != "cuda":
        raise RuntimeError("torchtitan: only whole rows and one micro-batch, on a GPU")
    shape = Shape.of(case.shape, case.seq_len, case.micro_rows)
    more: dict[str, Any] = {"activation_checkpoint": None} if case.recompute == "none" else {}
    trainer = torchtitan_llama.trainer(
        shape, folder, LEARNING_RATE, "compile" in case.switches, {"steps": 1000}, **more
    )  # fmt: skip
    losses: list[float] = []
    trainer.metrics_processor.log = lambda step, loss, *rest, **named: losses.append(float(loss))
    batches = trainer.batch_generator(trainer.dataloader)

    def step() -> float:
        trainer.stepper.step += 1
        trainer.train_step(batches)
        return losses[-1]

    return step, sum(p.numel() for p in trainer.model_parts[0].parameters())


STEPS = {
    "transformers": transformers_step,
    "transformers-bf16": transformers_step,
    "torchtitan": torchtitan_step,
}
"""Library → what makes its step."""
