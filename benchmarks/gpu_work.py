"""What `gpu_train.py` does in processes of their own: everything that touches the device. This file is the worker."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu_device
import gpu_parity
import gpu_peers
import torch
import workers
from gpu_cases import Case, recipe_tree, write_data
from gpu_device import Clock, memory, synchronize
from gpu_trace import OPTIMIZER, profile
from torch.profiler import record_function

from internlm import config
from internlm.recipe import Recipe, prepare

PROFILED_STEPS = 2


def do(job: dict[str, Any]) -> dict[str, Any]:
    """Return the result of a job: `device`, `parity`, or the `ceilings` or the steps of a case."""
    if job["task"] == "parity":
        return {"rows": gpu_parity.compare(job["device"])}
    if job["task"] == "device":
        return gpu_device.facts(job["device"])
    case = Case(**job["case"])
    if job["task"] == "case":
        return run_case(case)
    return gpu_device.ceilings(torch.device(case.device), case.dtype, case.shape, case.seq_len * case.micro_rows)


def run_case(case: Case) -> dict[str, Any]:
    """Train as the case says; return times, memory, losses and where the time went.

    Raises:
        RuntimeError: a loss is not finite, or the model is not that of the case.
    """
    make = ours_step if case.library == "ours" else gpu_peers.STEPS[case.library]
    device = torch.device(case.device)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        step, parameters = make(case, Path(folder))
        built_s = time.perf_counter() - began
        losses = [step()]
        synchronize(device)
        first_s = time.perf_counter() - began - built_s
        losses += [step() for _ in range(case.warmup - 1)]
        synchronize(device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        clock = Clock(device)
        began = time.perf_counter()
        clock.mark()
        for _ in range(case.steps):
            losses.append(step())
            clock.mark()
        step_s = clock.seconds()
        wall_s = time.perf_counter() - began
        held = memory(device)
        where = profile(step, device, PROFILED_STEPS)
    if not all(map(math.isfinite, losses)):
        raise RuntimeError(f"losses {losses}")
    return {
        "build_s": round(built_s, 2),
        "first_step_s": round(first_s, 3),
        "step_s": step_s,
        "wall_s": wall_s,
        "losses": losses,
        "parameters": parameters,
        "same_model": parameters == case.shape.num_parameters,
        **held,
        "breakdown": where,
    }


def ours_step(case: Case, folder: Path) -> tuple[Callable[[], float], int]:
    """Return the step of the Trainer that a recipe gives, and the number of parameters."""
    write_data(case, folder, case.warmup + case.steps + PROFILED_STEPS + 1)
    trainer = prepare(config.decode(Recipe, recipe_tree(case, folder)))
    update, expected = trainer.stepper.optimizer.step, case.flops

    def update_in_range(rate: float) -> None:
        with record_function(OPTIMIZER):
            update(rate)

    trainer.stepper.optimizer.step = update_in_range  # type: ignore[method-assign]

    def step() -> float:
        trainer.meter.clear()
        loss = trainer.stepper.step()["train/step_loss"]
        if not math.isclose(trainer.meter.flops, expected, rel_tol=1e-9):
            raise RuntimeError(f"the trainer counted {trainer.meter.flops} operations and the case has {expected}")
        if trainer.progress.skipped_steps:
            raise RuntimeError("a step was skipped: its gradient was not finite")
        return loss

    return step, sum(p.numel() for p in trainer.model.parameters())


if __name__ == "__main__":
    workers.answer(do)
