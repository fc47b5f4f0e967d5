"""What is computed again in backward instead of kept.

    none        everything is kept
    full        a block's input is kept, all else computed again (about a third more arithmetic)
    operators   the results of matrix products and attention are kept, what is cheap is computed again: norms, rotary,
                SwiGLU, casts; with experts, what surrounds them and attention is kept
    offload     everything is kept, in the memory of the CPU

`ratio` takes a share of the blocks, spread evenly: 0.5 is every second one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from internlm import compat
from internlm.config import require, section
from internlm.model.moe import Mixture
from internlm.model.transformer import Transformer


@section
class RecomputeConfig:
    """What is computed again in backward instead of kept."""

    kind: Literal["none", "full", "operators", "offload"] = "none"
    """none, full, operators (all but matrix products and attention), or offload (kept in the memory of the CPU)."""
    ratio: float = 1.0
    """Share of the blocks it applies to, spread evenly."""

    def __post_init__(self) -> None:
        require(self, "parallel.recompute", ("ratio",), lambda share: 0 <= share <= 1, "must lie between 0 and 1")


def chosen(count: int, ratio: float) -> list[int]:
    """Return which of `count` blocks a share means: the last of each stretch of 1 / ratio blocks."""
    return [i for i in range(count) if int((i + 1) * ratio + 1e-9) > int(i * ratio + 1e-9)]


def recompute(model: Transformer, config: RecomputeConfig) -> None:
    """Make the chosen blocks forget, or put away, what backward needs."""
    if config.kind == "none":
        return
    selective = functools.partial(create_selective_checkpoint_contexts, _policy)
    wrap: dict[str, Callable[..., Any]] = {
        "full": _again,
        "operators": functools.partial(_again, context_fn=selective),
        "offload": _offload,
    }
    for index in chosen(model.config.num_layers, config.ratio):
        if str(index) in model.blocks:  # a pipeline stage holds some of them
            for module in _regions(model.blocks[str(index)], config.kind):
                module.forward = wrap[config.kind](module.forward)


def _regions(block: nn.Module, kind: str) -> list[nn.Module]:
    """Return what is run again as a whole: a block; its attention and experts where only some operators are.

    Experts over ranks gather their weights between the two, which torch takes for operators that it did not see before.
    """
    if kind == "operators" and isinstance(block.feed_forward, Mixture):
        return [block.get_submodule("attention"), block.feed_forward.experts]
    return [block]


# Functions, not partials of `checkpoint`: compiling a block passes over what has no Python frame, and says nothing.
def _again(forward: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    @functools.wraps(forward)
    def run(*arguments: Any) -> Any:
        return checkpoint(forward, *arguments, use_reentrant=False, preserve_rng_state=False, **options)

    return run


def _offload(forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def run(*arguments: Any) -> Any:
        with save_on_cpu(pin_memory=torch.cuda.is_available()):
            return forward(*arguments)

    return run


def _policy(context: Any, operator: Any, *arguments: Any, **named: Any) -> CheckpointPolicy:
    if operator in compat.expensive_operators():
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE
