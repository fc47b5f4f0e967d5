"""Run the micro-batches of a step: one after the other, or through a pipeline; and what crosses ranks in doing so."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from internlm.data.batch import Batch
from internlm.model.heads import TokenOutputs
from internlm.model.moe import SideLosses, mixtures
from internlm.model.transformer import Transformer
from internlm.parallel import collectives, shard
from internlm.parallel.context import own_tokens
from internlm.parallel.mesh import Mesh, ParallelConfig
from internlm.parallel.replicate import Replicas

if TYPE_CHECKING:
    from internlm.parallel.pipeline import Pipeline

Loss = Callable[[Tensor, Batch], Tensor]
"""Hidden states and their micro-batch → a scalar; with a gradient, to train."""


class Runner:
    """Runs micro-batches through this rank's part of a model: the whole of it, or pipeline stages.

    `autocast`: in which matrix products are made, where the weights are not in it already.
    """

    def __init__(
        self,
        parts: list[Transformer],
        config: ParallelConfig,
        mesh: Mesh | None = None,
        replicas: Replicas | None = None,
        pipeline: Pipeline | None = None,
        autocast: torch.autocast | None = None,
    ) -> None:
        self.parts, self.config, self.mesh, self.replicas, self.pipeline = parts, config, mesh, replicas, pipeline
        self.autocast = autocast or contextlib.nullcontext()

    @property
    def sides(self) -> dict[int, SideLosses]:
        """Side losses of this rank's mixtures of experts, by layer."""
        found = {layer: mixture.sides for part in self.parts for layer, mixture in mixtures(part).items()}
        return {layer: sides for layer, sides in found.items() if sides is not None}

    @property
    def has_loss(self) -> bool:
        """Whether this rank computes losses: it has the last stage."""
        return self.pipeline is None or self.pipeline.has_last

    @property
    def micro_rows(self) -> int | None:
        """Rows that every micro-batch must have, None for any number."""
        return None if self.pipeline is None else self.pipeline.hidden.shape[0]

    def train(self, batches: Sequence[Batch], loss: Loss, token_share: Tensor | None = None) -> Tensor:
        """Run forward and backward; gradients are then complete on every rank.

        Args:
            batches: the micro-batches of the step, equally large.
            loss: divided by the count of the whole step already.
            token_share: what a token's side losses are multiplied by, a scalar; a model with experts needs it.

        Returns:
            The sum of this rank's losses, without a gradient; 0 where it computes none.
        """
        total = torch.zeros((), device=batches[0].tokens.device)
        for sides in self.sides.values():
            assert token_share is not None, "a mixture of experts has side losses"
            # Tensor ranks see the same tokens, and their gradients are summed.
            sides.share.copy_(token_share / (1 if self.mesh is None else self.mesh.layout.tensor))

        def counted(hidden: Tensor, batch: Batch) -> Tensor:
            value = loss(hidden, batch)
            total.add_(value.detach())
            return value

        if self.pipeline is not None:
            tokens, positions, documents = (torch.cat(parts) for parts in zip(*map(self._inputs, batches), strict=True))
            self.pipeline.train(tokens, positions, documents, lambda hidden, number: counted(hidden, batches[number]))
        else:
            (model,) = self.parts
            for number, batch in enumerate(batches):
                is_last = number == len(batches) - 1
                shard.begin_backward(model, self.config, is_last=is_last)
                if self.replicas is not None:
                    self.replicas.begin_backward(is_last=is_last)
                counted(self._hidden(model, batch), batch).backward()
        for part in self.parts:
            shard.finish_backward(part)
        if self.replicas is not None:
            self.replicas.finish()
        return total

    @torch.no_grad()
    def forward(self, batches: Sequence[Batch], loss: Loss) -> None:
        """Run forward only; `loss` is called where the hidden states are, for what it does with them."""
        for number, batch in enumerate(batches):
            if self.pipeline is not None:
                self.pipeline.forward(number, self._inputs(batch), lambda hidden, number: loss(hidden, batches[number]))
            else:
                loss(self._hidden(self.parts[0], batch), batch)

    def score(self, hidden: Tensor, labels: Tensor, coefficients: Tensor | None) -> TokenOutputs:
        """Return what the head says of all tokens of each row, from this rank's hidden states.

        Labels and coefficients [B, T] are those of all ranks.
        """
        with self.autocast:
            out = self.parts[-1].head(
                hidden, self._own(labels), None if coefficients is None else self._own(coefficients)
            )
        if self.mesh is None or self.mesh.layout.context == 1:
            return out
        group = self.mesh.group("context")
        logp, logz = (collectives.collect(x, group, 1) for x in (out.logp, out.logz))
        correct = collectives.collect(out.correct.to(torch.uint8), group, 1).bool()
        weighted = None if out.weighted is None else collectives.total(out.weighted, group)
        return TokenOutputs(logp, logz, correct, weighted)

    def _hidden(self, model: Transformer, batch: Batch) -> Tensor:
        with self.autocast:
            return model(*self._inputs(batch))

    def _inputs(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Return this rank's tokens and positions, and the documents of all."""
        return self._own(batch.tokens), self._own(batch.positions), batch.documents

    def _own(self, x: Tensor) -> Tensor:
        if self.mesh is None or self.mesh.layout.context == 1:
            return x
        return own_tokens(x, self.mesh.at.context, self.mesh.layout.context)
