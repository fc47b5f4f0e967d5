"""Blocks over stages, and the order in which micro-batches pass through them, on torch.distributed.pipelining.

    4 stages, 4 micro-batches, 1f1b        rank 0   F0 F1 F2 F3 .  .  .  B0 .  B1 .  B2 .  B3
                                           rank 3   .  .  .  F0 B0 F1 B1 F2 B2 F3 B3

A stage is the same Transformer with some of its blocks, and with no embedding or head where it is not the first or
last; names stay what they were. The loss is computed in the last stage, where the number of the micro-batch, which is
all that the schedule hands over, finds its Batch. With interleaved, zero-bubble and zbv a rank has several stages.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)

from internlm.model.transformer import Transformer
from internlm.parallel.mesh import ParallelConfig

if TYPE_CHECKING:
    from internlm.parallel.apply import Setting

_SINGLE = {"1f1b": Schedule1F1B, "gpipe": ScheduleGPipe}
_SEVERAL = {
    "interleaved": ScheduleInterleaved1F1B,
    "zero-bubble": ScheduleInterleavedZeroBubble,
    "zbv": ScheduleZBVZeroBubble,
}
Loss = Callable[[Tensor, int], Tensor]
"""The hidden states of the last stage and the number of their micro-batch → a scalar with a gradient."""


def stages_of(config: ParallelConfig, place: int) -> list[int]:
    """Return the stages of a pipeline rank: every P-th, or for zbv the two arms of a V."""
    count, per_rank = config.pipeline, config.stages_per_rank
    if config.schedule == "zbv":
        return [place, 2 * count - 1 - place]
    return [place + turn * count for turn in range(per_rank)]


def take(model: Transformer, stage: int, layers: list[int]) -> None:
    """Leave only one stage of a model on the meta device, in place; `layers`: how many blocks each stage has."""
    bounds = list(itertools.accumulate(layers, initial=0))
    kept = range(bounds[stage], bounds[stage + 1])
    model.blocks = nn.ModuleDict({name: block for name, block in model.blocks.items() if int(name) in kept})
    if stage > 0:
        model.embedding = None  # type: ignore[assignment]
    if stage < len(layers) - 1:
        model.norm = model.head = None  # type: ignore[assignment]


class Pipeline:
    """The stages of this rank, in the order of `stages_of`, and their schedule."""

    def __init__(
        self, parts: list[Transformer], config: ParallelConfig, group: dist.ProcessGroup, setting: Setting
    ) -> None:
        self.parts, self.config, self.group, self.micro_batches = parts, config, group, setting.micro_batches
        self.place, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.numbers, self.total = stages_of(config, self.place), config.pipeline * config.stages_per_rank
        self.has_first, self.has_last = 0 in self.numbers, self.total - 1 in self.numbers
        tokens = torch.empty(setting.micro_rows, setting.seq_len // config.context, dtype=torch.int64, device="meta")
        apart = config.tensor if config.sequence else 1
        shape = (setting.micro_rows, tokens.shape[1] // apart, parts[0].config.hidden_size)
        self.hidden = hidden = torch.empty(shape, dtype=setting.dtype, device="meta", requires_grad=True)
        """What passes between stages, without memory: [rows of a micro-batch, tokens, D]."""
        stages = [
            PipelineStage(
                part, number, self.total, setting.device, tokens if number == 0 else hidden, hidden, group=group
            )
            for part, number in zip(parts, self.numbers, strict=True)
        ]
        self._loss: Loss | None = None
        made: Any = _SINGLE.get(config.schedule) or _SEVERAL[config.schedule]
        staged = stages[0] if config.schedule in _SINGLE else stages
        self.schedule = made(staged, setting.micro_batches, loss_fn=self._loss_of, scale_grads=False)

    def train(self, tokens: Tensor, positions: Tensor, documents: Tensor, loss: Loss) -> None:
        """Pass the micro-batches of a step through all stages, forward and backward.

        Args:
            tokens, positions: [B, T], all micro-batches one after the other.
            documents: [B, all tokens of a row].
            loss: called in the last stage.
        """
        self._loss = loss
        inputs = (tokens,) if self.has_first else ()
        target = torch.arange(self.micro_batches)
        self.schedule.step(*inputs, target=target, positions=positions, documents=documents, return_outputs=False)
        self._loss = None

    @torch.no_grad()
    def forward(self, number: int, inputs: tuple[Tensor, Tensor, Tensor], loss: Loss) -> None:
        """Pass one micro-batch forward only: tokens, positions, documents. The last stage calls `loss` with its number.

        Ranks go on to the next as soon as they have sent it on.
        """
        tokens, positions, documents = inputs
        x = tokens
        for stage, part in zip(self.numbers, self.parts, strict=True):
            if stage > 0 and self._rank_of(stage - 1) != self.place:
                x = torch.empty_like(self.hidden, device=tokens.device)
                dist.recv(x, group=self.group, group_src=self._rank_of(stage - 1))
            x = part(x, positions, documents)
            if stage == self.total - 1:
                loss(x, number)
            elif self._rank_of(stage + 1) != self.place:
                dist.send(x.contiguous(), group=self.group, group_dst=self._rank_of(stage + 1))

    def _rank_of(self, stage: int) -> int:
        return next(place for place in range(self.size) if stage in stages_of(self.config, place))

    def _loss_of(self, hidden: Tensor, number: Tensor) -> Tensor:
        assert self._loss is not None, "set for the time of a run"
        return self._loss(hidden, int(number))
