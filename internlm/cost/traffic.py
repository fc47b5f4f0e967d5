"""What the ranks of a run send each other in one optimizer step: how often, and how many bytes, by axis and kind.

Written for a rank with L blocks, M micro-batches, A = rows · tokens / context · hidden · bytes (one activation of all
tokens of a tensor group), G groups of weights (each block, embedding, head, final norm; with tied tables the norm and
the table are one), W bytes of a group in the dtype of products and F in fp32:

    axis        kind             calls per step                                             bytes of each
    shard       all-gather       1 (zero 1, 2)   M (2-gather)   2 M, the norm M (3)         W, of each group
                reduce-scatter   1 (zero 1)   M (others)                                    F
    replicate   all-reduce       1                                                          F / shard / context
    tensor      all-gather       M (4 L + 2)     + 2 M a recomputed block                   A
                reduce-scatter   M (4 L + 2)     + M a recomputed block                     A
                all-reduce       head: 2 M a chunk of logits; norms, biases of `wo`: one a reduction
    context     all-to-all       8 M L           + 4 M a recomputed block                   A / tensor; less of few keys
                all-gather       3 M: log-probabilities, log-normalisers, hits              4, 4, 1 a token
                all-reduce       M: loss                                                    4
    pipeline    send             M a boundary and direction                                 A / tensor
    world       all-reduce       1: numbers of tokens, trained and all; wishes to stop      24
                all-reduce       1: loss and norm                                           16

A pipeline makes of the first two lines 1, whatever `zero` is: torch neither frees weights nor sums gradients between
its micro-batches. Whole copies alone sum their gradients in buckets instead, and sliced optimizer states turn the
all-reduce into its two halves. Without `sequence` an all-reduce takes the place of each reduce-scatter of the tensor
axis, nothing is gathered, and of the norms only those of heads are summed. Where context does not divide the heads,
keys and values are gathered instead of traded.

The lines are equal, number for number, to what the real step asks of the process group
(`tests/parallel/test_traffic.py`). "Recomputed" has three quarters of a tensor block's collectives because torch ends
recomputation at the last tensor that backward needs, before the block's last sum.

Bytes are those of the whole tensor (what an all-gather makes, what a reduction is given).

Limits: AdamW (Muon gathers its matrices), no experts, a loss that is linear in log-probabilities (z_loss 0), steps
after the first. Schedules that part the backward of weights from that of inputs (zero-bubble, zbv) are exact but for
tensor ranks, some of whose norms are summed in the dtype of products; with recompute torch then computes a block again
for every group of weights in it, and the lines do not hold.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

from internlm.cost.flops import stage_layers
from internlm.model.config import ModelConfig

Axis = Literal["pipeline", "replicate", "shard", "context", "tensor", "world"]
Kind = Literal["all-gather", "reduce-scatter", "all-reduce", "all-to-all", "send"]
Exchanges = dict[tuple[int, int, Kind], tuple[int, int]]
"""Size of the group, distance of neighbours in it, kind → calls, and bytes of whole tensors of all calls together."""
CHUNK_LOGITS = 1 << 22
"""`heads.CHUNK_LOGITS`, without its import of torch."""
REDUCE_BYTES = 4
"""Gradients are summed, and weights kept, in fp32."""
BUCKET_BYTES = 25 * 2**20
"""At which whole copies close a bucket of gradients (Li et al. 2020, PyTorch Distributed)."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """What decides the traffic of a step; names and meanings are those of the recipe."""

    model: ModelConfig
    seq_len: int
    """Tokens per row."""
    micro_rows: int
    """Rows of a micro-batch on one rank."""
    micro_batches: int
    """Per step."""
    pipeline: int = 1
    replicate: int = 1
    shard: int = 1
    context: int = 1
    tensor: int = 1
    sequence: bool = True
    zero: Literal["1", "2", "2-gather", "3"] = "2"
    sliced: bool = False
    """Optimizer states are cut over replicas too (`parallel.optimizer` all)."""
    plain: bool = True
    """Whether copies, without other axes, are plain models: they are not offloaded."""
    schedule: str = "1f1b"
    stages_per_rank: int = 1
    recompute: Literal["none", "full", "operators", "offload"] = "none"
    recompute_ratio: float = 1.0
    dtype_bytes: int = 2
    """Of matrix products, and so of activations and gathered weights."""

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch that a tensor group's products see."""
        return self.micro_rows * self.seq_len // self.context

    @property
    def cut(self) -> int:
        """Ranks that a weight is cut over beside the tensor axis."""
        return self.shard * self.context

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.pipeline * self.replicate * self.cut * self.tensor

    @property
    def is_copies_only(self) -> bool:
        """Whether ranks hold whole plain models."""
        return self.replicate == self.world_size and self.plain and not self.sliced

    @property
    def reductions(self) -> int:
        """How often a step sums gradients in the shard axis."""
        return 1 if self.zero == "1" or self.pipeline > 1 else self.micro_batches

    def span(self, axis: Axis) -> tuple[int, int]:
        """Return the number of ranks of an axis and how far they are apart."""
        inner = self.cut * self.tensor
        return {
            "tensor": (self.tensor, 1),
            "context": (self.context, self.tensor),
            "shard": (self.cut, self.tensor),
            "replicate": (self.replicate, inner),
            "pipeline": (self.pipeline, inner * self.replicate),
            "world": (self.world_size, 1),
        }[axis]


@dataclass(frozen=True)
class Collective:
    """What one rank does on an axis in a step, all calls of a kind and size together.

    Two answers to how much of it uses the network between machines of g GPUs:

    - `sent_bytes` where `spans_nodes`: what each GPU moves at the speed of its slowest link, and what the network
      carries if the algorithm knows no machines.
    - `crossing_bytes`: what leaves the machine when a ring visits its ranks one after the other, as NCCL's do: then one
      hop in g crosses. The mean over ranks; what all network cards together carry.

    Both look at the group of rank 0: all lie alike where group sizes and g divide each other. Trees cross as often as
    rings or less.
    """

    axis: Axis
    kind: Kind
    calls: int
    bytes: int
    """Of all calls together, whole tensors."""
    ranks: int
    """In the group."""
    stride: int
    """Distance of neighbours in the group."""

    @property
    def sent_bytes(self) -> float:
        """Bytes that this rank sends in rings (Patarasuk and Yuan 2009): the least there can be unless switches add."""
        if self.kind == "send":
            return self.bytes
        return self.bytes * (self.ranks - 1) / self.ranks * (2 if self.kind == "all-reduce" else 1)

    @property
    def steps(self) -> int:
        """Messages that must follow each other in rings, all calls together: what latency is multiplied by."""
        if self.kind == "send":
            return self.calls
        return self.calls * (self.ranks - 1) * (2 if self.kind == "all-reduce" else 1)

    def spans_nodes(self, gpus_per_node: int) -> bool:
        """Return whether the group is on several machines."""
        return (self.ranks - 1) * self.stride >= gpus_per_node

    def crossing_bytes(self, gpus_per_node: int) -> float:
        """Return the bytes that leave the machine, the mean over the group's ranks."""
        nodes = [place * self.stride // gpus_per_node for place in range(self.ranks)]
        if self.kind == "all-to-all":  # each rank sends a part to each other
            pairs = sum(a != b for a in nodes for b in nodes)
            return self.bytes * pairs / self.ranks**2
        hops = list(itertools.pairwise(nodes if self.kind == "send" else [*nodes, 0]))  # a pipeline is no ring
        return self.sent_bytes * sum(a != b for a, b in hops) / len(hops)


class Total(NamedTuple):
    """Sums over collectives, for one rank and step."""

    calls: int
    steps: int
    sent_bytes: float
    spanning_bytes: float
    """Sent in groups that span machines."""
    crossing_bytes: float


def total(collectives: Iterable[Collective], gpus_per_node: int) -> Total:
    """Return the sums over collectives."""
    every = list(collectives)
    return Total(
        sum(each.calls for each in every),
        sum(each.steps for each in every),
        sum(each.sent_bytes for each in every),
        sum(each.sent_bytes for each in every if each.spans_nodes(gpus_per_node)),
        sum(each.crossing_bytes(gpus_per_node) for each in every),
    )


def step_traffic(run: Run, rank: int = 0) -> list[Collective]:
    """Return what a rank does in a step."""
    place = rank // (run.world_size // run.pipeline)
    stages = _stages(run, place)
    found = [
        *_shard(run, stages),
        *_replicate(run, stages, rank // run.tensor % run.cut),
        *_tensor(run, stages),
        *_context(run, stages),
        *_pipeline(run, place, stages),
        ("world", "all-reduce", 1, 24),  # in fp64: what is trained on, tokens, wishes to stop
        ("world", "all-reduce", 1, 16),  # loss and squared norm
    ]
    return [
        Collective(axis, kind, calls, calls * size, *run.span(axis))
        for axis, kind, calls, size in found
        if calls and run.span(axis)[0] > 1
    ]


def by_axis(collectives: Iterable[Collective]) -> dict[tuple[Axis, Kind], tuple[int, int]]:
    """Return calls and bytes of whole tensors, by axis and kind."""
    found: dict[tuple[Axis, Kind], tuple[int, int]] = {}
    for each in collectives:
        calls, size = found.get((each.axis, each.kind), (0, 0))
        found[each.axis, each.kind] = (calls + each.calls, size + each.bytes)
    return found


def by_group(collectives: Iterable[Collective]) -> Exchanges:
    """Return calls and bytes of whole tensors, by group and kind: axes of the same ranks are not told apart."""
    found: Exchanges = {}
    for each in collectives:
        calls, size = found.get((each.ranks, each.stride, each.kind), (0, 0))
        found[each.ranks, each.stride, each.kind] = (calls + each.calls, size + each.bytes)
    return found


Line = tuple[Axis, Kind, int, int]
"""Axis, kind, calls, bytes of each."""


class Weight(NamedTuple):
    """A parameter, and the dim that the tensor axis cuts, if any."""

    shape: tuple[int, ...]
    dim: int | None

    def on(self, ranks: int) -> tuple[int, ...]:
        """Return the shape of a tensor rank's part."""
        return tuple(size // ranks if i == self.dim else size for i, size in enumerate(self.shape))


@dataclass(frozen=True)
class Stage:
    """A model, or a pipeline stage of it."""

    layers: range
    has_first: bool
    has_last: bool


def _stages(run: Run, place: int) -> list[Stage]:
    count = run.pipeline * run.stages_per_rank if run.pipeline > 1 else 1
    ends = list(itertools.accumulate(stage_layers(run.model, count, run.seq_len), initial=0))
    return [Stage(range(ends[i], ends[i + 1]), i == 0, i == count - 1) for i in _numbers(run, place)]


def _numbers(run: Run, place: int) -> list[int]:
    """Return the numbers of a rank's stages: every P-th, or the two arms of a V."""
    if run.pipeline == 1:
        return [0]
    if run.schedule == "zbv":
        return [place, 2 * run.pipeline - 1 - place]
    return [place + turn * run.pipeline for turn in range(run.stages_per_rank)]


def block_weights(model: ModelConfig) -> list[Weight]:
    """Return the parameters of a block, in the model's order."""
    hidden, ffn = model.hidden_size, model.ffn_size
    heads, kv = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    weights = [Weight((hidden,), None)]
    for width in (heads, kv, kv):
        weights += [Weight((width, hidden), 0), *[Weight((width,), 0)] * model.qkv_bias]
    weights += [Weight((hidden, heads), 1), *[Weight((hidden,), None)] * model.output_bias]
    weights += [Weight((model.head_dim,), None)] * (2 * model.qk_norm)
    weights += [Weight((hidden,), None), Weight((ffn, hidden), 0), Weight((ffn, hidden), 0), Weight((hidden, ffn), 1)]
    return weights


def _groups(run: Run, stage: Stage) -> list[tuple[str, list[Weight], int]]:
    """Return what is gathered at once: a name, the weights, how many such groups there are."""
    table, norm = Weight((run.model.vocab_size, run.model.hidden_size), 0), Weight((run.model.hidden_size,), None)
    groups = [("block", block_weights(run.model), len(stage.layers))]
    if run.model.tie_embeddings:
        return [*groups, ("rest", [table, norm], 1)]
    if stage.has_first:
        groups.append(("embedding", [table], 1))
    if stage.has_last:
        groups += [("head", [table], 1), ("rest", [norm], 1)]
    return groups


def _elements(run: Run, weights: list[Weight]) -> int:
    """Return the elements on one tensor rank, each weight's rows padded to the ranks it is cut over."""
    shapes = [weight.on(run.tensor) for weight in weights]
    return sum(-(-rows // run.cut) * run.cut * math.prod(rest) for rows, *rest in shapes)


def _shard(run: Run, stages: list[Stage]) -> Iterator[Line]:
    if run.is_copies_only:
        return
    for stage in stages:
        for name, weights, count in _groups(run, stage):
            elements = _elements(run, weights)
            gathers = 1
            if run.pipeline == 1 and run.zero in ("2-gather", "3"):
                gathers = run.micro_batches * (2 if run.zero == "3" and name != "rest" else 1)
            yield "shard", "all-gather", count * gathers, elements * run.dtype_bytes
            yield "shard", "reduce-scatter", count * run.reductions, elements * REDUCE_BYTES


def _replicate(run: Run, stages: list[Stage], part: int) -> Iterator[Line]:
    """Yield what sums gradients over copies, and with sliced states spreads the new weights."""
    if run.is_copies_only:
        model = run.model
        table, norm = Weight((model.vocab_size, model.hidden_size), 0), Weight((model.hidden_size,), None)
        every = [table, *block_weights(model) * model.num_layers, norm, *[table] * (not model.tie_embeddings)]
        buckets: list[int] = []
        for weight in reversed(every):
            if not buckets or buckets[-1] >= BUCKET_BYTES:
                buckets.append(0)
            buckets[-1] += math.prod(weight.shape) * REDUCE_BYTES
        yield from (("replicate", "all-reduce", 1, size) for size in buckets)
        return
    for stage in stages:
        for _, weights, count in _groups(run, stage):
            if not run.sliced:
                yield "replicate", "all-reduce", count, _elements(run, weights) // run.cut * REDUCE_BYTES
                continue
            pieces = [_piece(run, weight, part) for weight in weights]
            parted = sum(size for size, is_parted in pieces if is_parted) * REDUCE_BYTES
            yield "replicate", "reduce-scatter", count * bool(parted), parted
            yield "replicate", "all-gather", count * bool(parted), parted
            whole = [size for size, is_parted in pieces if not is_parted]
            yield "replicate", "all-reduce", count * bool(whole), sum(whole) * REDUCE_BYTES


def _piece(run: Run, weight: Weight, part: int) -> tuple[int, bool]:
    """Return the elements of a weight's part (the last may be short), padded to replicas, and whether they part it.

    As in `parallel.optimizer_shard`: along the last dim that the other axes cut evenly, with an entry for each replica.
    """
    shape = list(weight.on(run.tensor))
    rows = -(-shape[0] // run.cut)
    shape[0] = min(rows, max(0, shape[0] - part * rows))
    for dim in reversed(range(len(shape))):
        ways = (run.tensor if dim == weight.dim else 1) * (run.cut if dim == 0 else 1)
        if weight.shape[dim] % ways == 0 and weight.shape[dim] // ways >= run.replicate:
            shape[dim] = -(-shape[dim] // run.replicate) * run.replicate
            return math.prod(shape), True
    return math.prod(shape), False


def _recomputed(run: Run, stage: Stage) -> int:
    """Return how many blocks run forward again in backward."""
    if run.recompute in ("none", "offload"):
        return 0
    taken = [int(layer * run.recompute_ratio + 1e-9) for layer in range(run.model.num_layers + 1)]
    return sum(taken[layer + 1] > taken[layer] for layer in stage.layers)


def _tensor(run: Run, stages: list[Stage]) -> Iterator[Line]:
    """Yield what brings tokens together before cut matrices, and adds up partial sums after them."""
    activation = run.tokens * run.model.hidden_size * run.dtype_bytes
    for stage in stages:
        both = 4 * len(stage.layers) + stage.has_first + stage.has_last  # forward and backward
        again = _recomputed(run, stage)
        micro = run.micro_batches
        summed_late = run.reductions < micro
        gradient = REDUCE_BYTES if summed_late else run.dtype_bytes
        if run.model.qk_norm:  # every rank has the norms of its heads whole
            yield "tensor", "all-reduce", run.reductions * 2 * len(stage.layers), run.model.head_dim * gradient
        if run.sequence:
            yield "tensor", "all-gather", micro * (both + 2 * again), activation
            yield "tensor", "reduce-scatter", micro * (both + again), activation
            # Weights that every rank has whole, and that saw a part of the tokens.
            vectors = (2 + run.model.output_bias) * len(stage.layers) + stage.has_last
            yield "tensor", "all-reduce", run.reductions * vectors, run.model.hidden_size * gradient
        else:
            yield "tensor", "all-reduce", micro * (both + again), activation
        if stage.has_last:
            rows = max(1, CHUNK_LOGITS // (run.model.vocab_size // run.tensor))
            for chunk, count in ((rows, run.tokens // rows), (run.tokens % rows, 1)):
                if chunk and count:  # the largest logit; the sum of exponentials with the label's logit
                    yield "tensor", "all-reduce", micro * count, 4 * chunk
                    yield "tensor", "all-reduce", micro * count, 8 * chunk


def _context(run: Run, stages: list[Stage]) -> Iterator[Line]:
    """Yield what trades tokens for heads, or brings all keys and values, and what gathers the head's outputs."""
    heads, kv = run.model.num_heads // run.tensor, run.model.num_kv_heads // run.tensor
    head = run.tokens * run.model.head_dim * run.dtype_bytes
    for stage in stages:
        passes = 2 * len(stage.layers) + _recomputed(run, stage)  # forward, backward, again
        forwards = passes - len(stage.layers)
        if heads % run.context == 0 and heads % math.lcm(kv, run.context) == 0:
            yield "context", "all-to-all", 2 * run.micro_batches * passes, heads * head
            yield "context", "all-to-all", 2 * run.micro_batches * passes, math.lcm(kv, run.context) * head
        else:
            yield "context", "all-gather", 2 * run.micro_batches * forwards, kv * head * run.context
            yield "context", "reduce-scatter", 2 * run.micro_batches * len(stage.layers), kv * head * run.context
        if stage.has_last:
            row = run.micro_rows * run.seq_len
            yield "context", "all-gather", 2 * run.micro_batches, 4 * row
            yield "context", "all-gather", run.micro_batches, row
            yield "context", "all-reduce", run.micro_batches, 4


def _pipeline(run: Run, place: int, stages: list[Stage]) -> Iterator[Line]:
    if run.pipeline == 1:
        return
    last = run.pipeline * run.stages_per_rank - 1
    own = _numbers(run, place)
    sends = sum((number < last and number + 1 not in own) + (number > 0 and number - 1 not in own) for number in own)
    apart = run.tensor if run.sequence else 1
    size = run.tokens // apart * run.model.hidden_size * run.dtype_bytes
    yield "pipeline", "send", run.micro_batches * sends, size
