"""What runs in a process of its own for `gpu_train.py`: one contender, the parity of the device, or its ceilings."""

from __future__ import annotations

import functools
import importlib.metadata
import math
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gpu_cases import Case, recipe_tree, write_data
from gpu_trace import OPTIMIZER, profile
from torch.profiler import record_function

PROFILED_STEPS = 2


class Clock:
    """Marks between steps, on the device's own clock where it has one.

    Marks are events in the stream in which the steps run: one is passed when all before it is done. The time between
    two is a step with its gaps, whenever the CPU queued it; nothing waits for the device but the steps themselves.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.marks: list[Any] = []

    def mark(self) -> None:
        """Note the present place in the stream."""
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Return the times between the marks, once the last one is passed."""
        synchronize(self.device)
        pairs = zip(self.marks, self.marks[1:], strict=False)
        if self.device.type == "cuda":
            return [before.elapsed_time(after) / 1e3 for before, after in pairs]
        return [after - before for before, after in pairs]


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def run_case(case: Case) -> dict[str, Any]:
    """Train as the case says; return times, memory, losses and where the time went.

    Raises:
        RuntimeError: a loss is not finite, or the model is not that of the case.
    """
    device = torch.device(case.device)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        step, parameters = _maker(case.library)(case, Path(folder))
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
        memory = _memory(device)
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
        **memory,
        "breakdown": where,
        "versions": versions(case.library.split("-")[0]),
    }


def ours_step(case: Case, folder: Path) -> tuple[Callable[[], float], int]:
    """Return the step of the Trainer that a recipe gives, and the number of parameters."""
    from internlm import config
    from internlm.recipe import Recipe, prepare

    write_data(case, folder, case.warmup + case.steps + PROFILED_STEPS + 1)
    trainer = prepare(config.decode(Recipe, recipe_tree(case, folder)))
    update, expected = trainer.optimizer.step, case.flops

    def update_in_range(rate: float) -> None:
        with record_function(OPTIMIZER):
            update(rate)

    trainer.optimizer.step = update_in_range  # type: ignore[method-assign]

    def step() -> float:
        trainer.meter.clear()
        loss = trainer.step()["train/step_loss"]
        if not math.isclose(trainer.meter.flops, expected, rel_tol=1e-9):
            raise RuntimeError(f"the trainer counted {trainer.meter.flops} operations and the case has {expected}")
        if trainer.progress.skipped_steps:
            raise RuntimeError("a step was skipped: its gradient was not finite")
        return loss

    return step, sum(p.numel() for p in trainer.model.parameters())


def _maker(library: str) -> Callable[[Case, Path], tuple[Callable[[], float], int]]:
    if library == "ours":
        return ours_step
    import gpu_peers

    return gpu_peers.STEPS[library]


def _memory(device: torch.device) -> dict[str, float]:
    """Return the most memory that was held since it was last asked to forget; of the process without a GPU."""
    from internlm import runtime

    peak, size = runtime.peak_memory_bytes(device)
    found = {"peak_gib": peak / 2**30, "device_gib": size / 2**30}
    if device.type == "cuda":
        found["reserved_gib"] = torch.cuda.max_memory_reserved(device) / 2**30
    return found


def ceilings(case: Case) -> dict[str, Any]:
    """Return what matrix products reach on this device, in TFLOPS: a square one, and those of the model's blocks.

    Each is repeated until it has run for about a fifth of a second, in three batches; the median batch counts.
    """
    from internlm.compat import products

    device, dtype = torch.device(case.device), getattr(torch, case.dtype)
    shape, tokens = case.shape, case.seq_len * case.micro_rows
    size = 8192 if device.type == "cuda" else 256
    sizes = {
        "square": (size, size, size),
        "attention": (tokens, shape.hidden_size, shape.hidden_size),
        "gate and up": (tokens, shape.ffn_size, shape.hidden_size),
        "down": (tokens, shape.hidden_size, shape.ffn_size),
    }
    found: dict[str, dict[str, float]] = {case.dtype: {}}
    for name, (m, n, k) in sizes.items():
        a, b = (torch.randn(*dims, device=device, dtype=dtype) for dims in ((m, k), (n, k)))
        found[case.dtype][name] = _tflops(functools.partial(torch.mm, a, b.t()), 2 * m * n * k, device)
        if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9):
            one = torch.ones((), device=device)
            a8, b8 = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn)
            product = functools.partial(products.scaled_product, a8, b8.t(), one, one, torch.bfloat16)
            found.setdefault("float8", {})[name] = _tflops(product, 2 * m * n * k, device)
    return {"tflops": found, "best": {name: max(rates.values()) for name, rates in found.items()}}


def _tflops(product: Callable[[], Any], operations: float, device: torch.device) -> float:
    def run(times: int) -> float:
        clock = Clock(device)
        clock.mark()
        for _ in range(times):
            product()
        clock.mark()
        return clock.seconds()[0]

    run(3)
    times = max(3, min(200, int(0.2 / max(run(3) / 3, 1e-6))))
    if device.type == "cpu":
        times = min(times, 10)
    return operations * times / statistics.median(run(times) for _ in range(3)) / 1e12


def versions(library: str) -> dict[str, str]:
    """Return the versions that matter to a contender."""
    from internlm.recipe import versions as ours

    found = {"python": platform.python_version(), "torch": torch.__version__, "cuda": str(torch.version.cuda)}
    if torch.backends.cudnn.is_available():
        found["cudnn"] = str(torch.backends.cudnn.version())
    if library == "ours":
        return found | ours()
    try:
        found[library] = importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        found[library] = "unknown"
    return found


def hardware(device_name: str) -> dict[str, Any]:
    """Return what the device and its driver say of themselves."""
    from train_cpu import machine

    from internlm import runtime

    device = torch.device(device_name)
    facts: dict[str, Any] = {"device": runtime.device_name(device), "host": machine()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "memory_gib": round(properties.total_memory / 2**30, 2),
            "capability": list(torch.cuda.get_device_capability(device)),
            "multiprocessors": properties.multi_processor_count,
            "driver": _driver(),
        }
    return facts


def _driver() -> str:
    """Return name, driver, power limit and top clock as nvidia-smi has them, or why not."""
    import subprocess

    query = "name,driver_version,power.limit,clocks.max.sm"
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"], capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"unknown: {error}"
    return done.stdout.strip() or done.stderr.strip()
