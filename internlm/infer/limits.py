"""How much an engine takes on at once, and the room that its memory has for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from internlm import runtime
from internlm.errors import EngineError
from internlm.infer.cache import Cache
from internlm.model.transformer import Transformer

_CPU_CACHE_BYTES = 4 * 2**30
_CPU_CACHE_SHARE = 0.25
_GPU_CACHE_SHARE = 0.9
_GPU_BATCH = 256
_GPU_STEP_TOKENS = 2048
"""On a GPU a step reads all weights, whatever it computes: more tokens cost little up to about here."""
CACHES = ("plain", "int8")


@dataclass(frozen=True)
class Limits:
    """How much the engine takes on at once."""

    batch: int = 16
    """Most sequences that run at once."""
    length: int | None = None
    """Most tokens of prompt and answer together; None: the model's context."""
    cache_tokens: int | None = None
    """Tokens whose keys and values fit into the cache. None: on a CPU 4 GiB or a quarter of the free memory, on a GPU
    nine tenths of what is left; never more than `batch` + 1 texts of full length need."""
    cache_bytes: int | None = None
    """The same as memory, in the place of `cache_tokens`."""
    block: int = 32
    """Tokens of a block: what is shared is shared in whole blocks."""
    step_tokens: int = 256
    """Most tokens of a step: a longer prompt is computed in chunks, and those who write go on between them."""
    share: bool = True
    """Whether texts that begin alike share blocks."""
    cache: Literal["plain", "int8"] = "plain"
    """Form of keys and values: the model's dtype, or 8 bits with a scale for each token and head, in half the memory
    (a quarter of fp32's)."""
    paged: bool | None = None
    """Whether all texts that go on by one token are attended in one call, and a step of nothing else is one CUDA graph;
    None: on a GPU that can."""

    @classmethod
    def on(cls, device: str | torch.device, **changes: Any) -> Limits:
        """Return the limits that suit a device, but for those that are given and not None."""
        own = {"batch": _GPU_BATCH, "step_tokens": _GPU_STEP_TOKENS} if torch.device(device).type == "cuda" else {}
        return cls(**own | {name: value for name, value in changes.items() if value is not None})

    def check(self) -> None:
        """Check the ranges.

        Raises:
            EngineError: naming the first value outside.
        """
        for name in ("batch", "length", "cache_tokens", "cache_bytes", "block", "step_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise EngineError("must be at least 1", where=name, got=value)
        if self.cache_tokens is not None and self.cache_bytes is not None:
            raise EngineError("cannot be given together with cache_tokens", where="cache_bytes", got=self.cache_bytes)
        if self.cache not in CACHES:
            raise EngineError("is no form of keys and values", where="cache", got=self.cache, allowed=CACHES)

    def check_on(self, device: torch.device) -> None:
        """Check the ranges, and that a device has the memory that is asked for in bytes.

        Raises:
            EngineError: naming the first value outside.
        """
        self.check()
        if self.cache_bytes is not None and self.cache_bytes > (free := free_memory(device)):
            raise _too_much(self.cache_bytes, free, device, "cache_bytes")


def free_memory(device: torch.device) -> int:
    """Return the bytes that may still be taken on a device."""
    if device.type != "cuda":
        return runtime.available_memory()
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # torch gives it back when asked
    return int(torch.cuda.mem_get_info(device)[0]) + unused


def _too_much(asked: int, free: int, device: torch.device, where: str) -> EngineError:
    return EngineError(
        f"{asked / 2**30:.3g} GiB are asked for, and only {free / 2**30:.1f} GiB are free on {device}",
        where=where,
        do="Give less, or leave it out: memory says it then.",
    )


def cache_tokens(model: Transformer, limits: Limits, context: int) -> int:
    """Return how many tokens the cache shall hold.

    Args:
        model: with its weights, where they will be used.
        limits: say it, or memory does.
        context: most tokens of a text.

    Raises:
        EngineError: the limits ask for more than there is.
    """
    device = model.embedding.weight.device
    per_token = Cache.bytes_per_token(model, rounded=limits.cache == "int8")
    asked = limits.cache_bytes if limits.cache_tokens is None else limits.cache_tokens * per_token
    if asked is not None:
        free = free_memory(device)
        if asked > free:
            raise _too_much(asked, free, device, "cache_bytes" if limits.cache_tokens is None else "cache_tokens")
        return asked // per_token
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        room = free - (1 - _GPU_CACHE_SHARE) * total
    else:
        room = min(_CPU_CACHE_BYTES, _CPU_CACHE_SHARE * runtime.available_memory())
    return min((limits.batch + 1) * (context + limits.block), max(int(room) // per_token, 0))
