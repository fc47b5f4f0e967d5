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
    length: int | None = None
    """Most tokens of prompt and answer together; None: the model's context."""
    cache_tokens: int | None = None
    """Tokens whose keys and values fit into the cache. None: on a CPU 4 GiB or a quarter of the free memory, on a GPU
    nine tenths of what is left; never more than `batch` + 1 texts of full length need."""
    cache_bytes: int | None = None
    """The same as memory, in the place of `cache_tokens`."""
    block: int = 32
    """Tokens of a block: only whole blocks are shared."""
    step_tokens: int = 256
    """Most tokens of a step: a longer prompt is computed in chunks, and those who write go on between them."""
    share: bool = True
    """Whether texts that begin alike share blocks."""
    cache: Literal["plain", "int8"] = "plain"
    """Form of keys and values: the model's dtype, or 8 bits with a scale for each token and head."""
    paged: bool | None = None
    """Whether texts that go on by one token are attended in one call; None: on a GPU that can."""

    @classmethod
    def on(cls, device: str | torch.device, **changes: Any) -> Limits:
        """Return the limits that suit a device, but for those that are given and not None."""
        own = {"batch": _GPU_BATCH, "step_tokens": _GPU_STEP_TOKENS} if torch.device(device).type == "cuda" else {}
        return cls(**own | {name: value for name, value in changes.items() if value is not None})

    def check(self) -> None:
        """Check the ranges; EngineError names the first value outside."""
        for name in ("batch", "length", "cache_tokens", "cache_bytes", "block", "step_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise EngineError("must be at least 1", where=name, got=value)
        if self.cache_tokens is not None and self.cache_bytes is not None:
            raise EngineError("cannot be given together with cache_tokens", where="cache_bytes", got=self.cache_bytes)
        if self.cache not in CACHES:
            raise EngineError("is no form of keys and values", where="cache", got=self.cache, allowed=CACHES)

    def check_on(self, device: torch.device) -> None:
        """Check the ranges, and that a device has the memory that is asked for in bytes."""
        self.check()
        if self.cache_bytes is not None:
            _check_memory(self.cache_bytes, device, "cache_bytes")


def _check_memory(asked: int, device: torch.device, where: str) -> None:
    """Check that a device has room for so many bytes."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # given back when asked
        free = torch.cuda.mem_get_info(device)[0] + unused
    else:
        free = runtime.available_memory()
    if asked > free:
        problem = f"{asked / 2**30:.3g} GiB are asked for, and only {free / 2**30:.1f} GiB are free on {device}"
        raise EngineError(problem, where=where, do="Give less, or leave it out: memory says it then.")


def cache_tokens(model: Transformer, limits: Limits, context: int) -> int:
    """Return how many tokens the cache of a model, with its weights in place, shall hold: limits or memory say it."""
    device = model.embedding.weight.device
    per_token = Cache.bytes_per_token(model, rounded=limits.cache == "int8")
    if limits.cache_tokens is not None:
        _check_memory(limits.cache_tokens * per_token, device, "cache_tokens")
        return limits.cache_tokens
    if limits.cache_bytes is not None:
        _check_memory(limits.cache_bytes, device, "cache_bytes")
        return limits.cache_bytes // per_token
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        room = free - (1 - _GPU_CACHE_SHARE) * total
    else:
        room = min(_CPU_CACHE_BYTES, _CPU_CACHE_SHARE * runtime.available_memory())
    return min((limits.batch + 1) * (context + limits.block), max(int(room) // per_token, 0))
