"""Steps in which every text goes on by one token: on a GPU one CUDA graph, which is one call instead of hundreds.

    decoding = Decoding(cache, head, batch=256, length=4096)
    hidden, logits = decoding.run(pieces)

A graph repeats the same kernels on the same memory. So there is one for each of a few batch sizes, 1 2 4 8 16 24 32 …,
whose inputs are written into a tensor that stays: for each text its token, its place and its blocks. Rows that only
fill the batch are texts of one token in a block that belongs to nobody. A graph is made when its batch size comes up
for the first time (tenths of a second), or all of them beforehand (`warm_up`); they share their memory.

Where graphs cannot be made the same step runs kernel by kernel, also on a CPU.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from internlm.infer.cache import Cache, Paged, Piece, Step
from internlm.log import warn_once

logger = logging.getLogger(__name__)

_SMALL = (1, 2, 4)
_APART = 8
"""Larger batches are filled up to a multiple of this."""
_TOKEN, _PLACE, _TABLE = 0, 1, 2
"""Columns of the inputs; the table is all from there on."""


class Decoding:
    """Computes such steps.

    Args:
        cache: of the model.
        logits: hidden states [N, D] → logits [N, V] in fp32.
        batch: most texts of a step.
        length: most tokens of a text.
    """

    def __init__(self, cache: Cache, logits: Callable[[Tensor], Tensor], batch: int, length: int) -> None:
        self.cache, self.sizes = cache, batch_sizes(batch)
        self.uses_graphs = cache.device.type == "cuda"
        self._logits_of = logits
        config, device = cache.config, cache.device
        largest, blocks = self.sizes[-1], cache.blocks.needed(length)
        self._idle = torch.zeros(_TABLE + blocks, dtype=torch.int32)
        self._idle[_TABLE] = cache.blocks.count  # the block beyond, which belongs to no text
        self._inputs = self._idle.to(device).repeat(largest, 1)  # [batch, 2 + M]
        self._turns = cache.turns(1).repeat(largest, 1)  # [batch, E/2]
        self._turning: list[Tensor] = []
        """Whose turns those are."""
        self._hidden = torch.empty(largest, config.hidden_size, dtype=cache.dtype, device=device)
        self._logits = torch.empty(largest, config.vocab_size, device=device)
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}

    @torch.inference_mode()
    def run(self, pieces: Sequence[Piece]) -> tuple[Tensor, Tensor]:
        """Return the hidden states [N, D] and logits [N, V] of pieces of one token each, and store keys and values.

        Both are overwritten by the next step.
        """
        count = len(pieces)
        size = next(size for size in self.sizes if size >= count)
        # From pinned memory, which torch gives to nobody else before the copy is done.
        pinned = self.cache.device.type == "cuda"
        inputs = torch.empty(size, self._idle.shape[0], dtype=torch.int32, pin_memory=pinned)
        inputs[:, _TABLE:] = 0
        for row, piece in zip(inputs, pieces, strict=False):
            numbers = torch.tensor([piece.tokens[0], piece.past, *piece.table], dtype=torch.int32)
            row[: len(numbers)] = numbers
        inputs[count:] = self._idle
        self._inputs[:size].copy_(inputs, non_blocking=True)
        turning = [piece.turns for piece in pieces]
        if len(turning) > len(self._turning) or any(a is not b for a, b in zip(turning, self._turning, strict=False)):
            torch.stack(turning, out=self._turns[:count])
            self._turning = turning
        self._play(size)
        return self._hidden[:count], self._logits[:count]

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Make the graphs of all batch sizes, largest first, whose memory is the others' too."""
        for size in reversed(self.sizes):
            self._inputs[:size] = self._idle.to(self._inputs.device)
            self._play(size)

    def _play(self, size: int) -> None:
        """Compute the step of the inputs."""
        if self.uses_graphs and size not in self._graphs:
            self._capture(size)
        if self.uses_graphs:
            self._graphs[size].replay()
        else:
            self._step(size)

    def _capture(self, size: int) -> None:
        """Make the graph of a batch size; where that fails, there are none from now on."""
        device = self.cache.device
        current: torch.cuda.Stream | None = None
        try:
            current = torch.cuda.current_stream(device)
            # What is made at the first use, such as compiled kernels, cannot be made while kernels are recorded.
            aside = torch.cuda.Stream(device)
            aside.wait_stream(current)
            with torch.cuda.stream(aside):
                self._step(size)
            current.wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            pool = next(iter(self._graphs.values())).pool() if self._graphs else None
            # Other threads may use the GPU meanwhile.
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                self._step(size)
        except Exception as error:
            if current is not None:
                torch.cuda.set_stream(current)  # a capture that fails may leave its own
            self.uses_graphs = False
            self._graphs.clear()
            problem = f"no CUDA graph of a step can be made ({type(error).__name__}: {error})"
            warn_once(logger, f"{problem}: kernels are started one by one, which takes longer")
        else:
            self._graphs[size] = graph

    def _step(self, size: int) -> None:
        """Compute the first rows of the inputs, on the device alone."""
        cache, inputs = self.cache, self._inputs[:size]
        places, tables = inputs[:, _PLACE], inputs[:, _TABLE:]
        block = cache.blocks.size
        home = tables.gather(1, (places // block).long()[:, None]).squeeze(1)
        step = Step((home * block + places % block).long(), size, Paged(tables, places + 1), [], [])
        hidden = cache.compute(inputs[:, _TOKEN], places, self._turns[:size], step)
        self._hidden[:size] = hidden
        self._logits[:size] = self._logits_of(hidden)


def batch_sizes(most: int) -> list[int]:
    """Return the batch sizes that steps are filled up to; the last has room for `most` texts."""
    return [size for size in (*_SMALL, *range(_APART, most, _APART)) if size < most] + [most]
