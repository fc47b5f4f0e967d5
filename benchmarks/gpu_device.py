"""The device that a GPU benchmark runs on: what it is, its clock, and the most that it can do.

Everything runs on a CPU too, so that the same lines can be tried without a GPU.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from internlm import runtime
from internlm.compat import kernels
from internlm.model.config import ModelConfig

SHEETS = {"A100-SXM4-80GB": 2.039e12, "A100 80GB PCIe": 1.935e12, "H100 80GB HBM3": 3.35e12, "H200": 4.8e12}
"""Bytes per second by data sheet; the key is a part of the driver's name for the card."""


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


def facts(name: str) -> dict[str, Any]:
    """Return what a device and its libraries say of themselves.

    Raises:
        RuntimeError: it is a GPU, and there is none.
    """
    device = torch.device(name)
    if device.type != "cuda":
        return {"name": runtime.device_name(device)}
    if not torch.cuda.is_available():
        raise RuntimeError("there is no GPU here: --device cpu measures the CPU")
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": runtime.device_name(device),
        "memory_gib": round(properties.total_memory / 2**30, 2),
        "capability": list(torch.cuda.get_device_capability(device)),
        "multiprocessors": properties.multi_processor_count,
        "cuda": str(torch.version.cuda),
        "cudnn": torch.backends.cudnn.version(),
    }


def memory(device: torch.device) -> dict[str, float]:
    """Return the most memory that was held since it was last asked to forget; of the process without a GPU."""
    peak, size = runtime.peak_memory_bytes(device)
    found = {"peak_gib": peak / 2**30, "device_gib": size / 2**30}
    if device.type == "cuda":
        found["reserved_gib"] = torch.cuda.max_memory_reserved(device) / 2**30
    return found


def ceilings(device: torch.device, dtype_name: str, shape: ModelConfig, tokens: int) -> dict[str, Any]:
    """Return what matrix products reach, in TFLOPS: a square one, and those of a model's blocks for so many tokens.

    Each is repeated until it has run for about a fifth of a second, in three batches; the median batch counts.
    """
    dtype = getattr(torch, dtype_name)
    size = 8192 if device.type == "cuda" else 256
    sizes = {
        "square": (size, size, size),
        "attention": (tokens, shape.hidden_size, shape.hidden_size),
        "gate and up": (tokens, shape.ffn_size, shape.hidden_size),
        "down": (tokens, shape.hidden_size, shape.ffn_size),
    }
    found: dict[str, dict[str, float]] = {dtype_name: {}}
    for name, (m, n, k) in sizes.items():
        a, b = (torch.randn(*dims, device=device, dtype=dtype) for dims in ((m, k), (n, k)))
        found[dtype_name][name] = _tflops(functools.partial(torch.mm, a, b.t()), 2 * m * n * k, device)
        if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9):
            one = torch.ones((), device=device)
            a8, b8 = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn)
            product = functools.partial(kernels.scaled_product, a8, b8.t(), one, one, torch.bfloat16)
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


def bandwidth(device: torch.device) -> float:
    """Return the bytes per second that are read and written in a large copy: the best of 8."""
    size = 2**31 if device.type == "cuda" else 2**24
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(8):
        synchronize(device)
        start = time.perf_counter()
        target.copy_(source)
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size / best


def sheet_bandwidth(device: torch.device) -> float | None:
    """Return the data sheet's bandwidth, where it is known."""
    name = torch.cuda.get_device_name() if device.type == "cuda" else ""
    return next((value for key, value in SHEETS.items() if key in name), None)
