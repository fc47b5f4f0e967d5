"""Writes checkpoints as InternLM v0.2 and InternEvo do, from what is known of their layout: cuts a model into files.

Nothing here imports the reader or the writer under test. What is done as there:
- a rank's parameters are in the order of its modules, and are views into one flat storage per group and zero rank
- tensors say that they were on a GPU; the config is of the framework's dict class, a group's mode of its enum
- norms are whole on every tensor rank, the bias of the output projection is on the first alone
"""

from __future__ import annotations

import contextlib
import enum
import itertools
import math
import sys
import types
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

Named = dict[str, Tensor]
SLICE = {(1, 1, True), (1, 3, False), (2, 2, True), (4, 2, False), (4, 3, True)}
"""Layouts that are tried always; the long proofs try all."""

every_layout = pytest.mark.parametrize(
    ("tensor", "pipeline", "split_hidden"),
    [
        pytest.param(
            *(tensor, pipeline, by_hidden),
            marks=[pytest.mark.proof] * ((tensor, pipeline, by_hidden) not in SLICE),
            id=f"{tensor}-{pipeline}-{'by hidden' if by_hidden else 'by vocabulary'}",
        )
        for tensor, pipeline, by_hidden in itertools.product([1, 2, 4], [1, 2, 3], [True, False])
    ],
)
"""For a test that takes ranks side by side and one after the other, and whether they cut the embedding by hidden."""


@dataclass(frozen=True)
class Old:
    """A run of the old framework."""

    heads: int
    kv_heads: int
    layers: int
    dialect: str = "INTERNLM"
    tensor: int = 1
    pipeline: int = 1
    chunks: int = 1
    zero: int = 1
    weight: int = 0
    """InternEvo's weight parallelism; 0: none."""
    embed_split_hidden: bool = True
    embedding_name: str = ""
    """Of the embedding's module, where it is not the usual one."""
    adapt_hf: bool = True
    w2_is_down: bool = False
    overlap_sync_param: bool = False
    inv_freq: bool = False
    one_group: bool = False
    """As before there was a group for fp32."""
    prefix: str = "model."
    config: dict[str, Any] = field(default_factory=dict)


class ParallelMode(enum.Enum):
    DATA = "data"


class Config(dict):
    pass


ParallelMode.__module__ = "internlm.core.context.process_group_initializer"
Config.__module__ = "internlm.core.context.parallel_context"


@contextlib.contextmanager
def framework() -> Iterator[None]:
    """Make pickles name the old framework's classes and a GPU, while the block runs."""
    modules = {}
    for cls in (ParallelMode, Config):
        modules[cls.__module__] = types.ModuleType(cls.__module__)
        setattr(modules[cls.__module__], cls.__name__, cls)
    tag = torch.serialization.location_tag
    sys.modules.update(modules)
    torch.serialization.location_tag = lambda storage: "cuda:0"
    try:
        yield
    finally:
        torch.serialization.location_tag = tag
        for name in modules:
            del sys.modules[name]


def stage_layers(old: Old) -> list[list[range]]:
    """Return the layers of every stage, chunk by chunk: each chunk is cut over all stages, the last get the rest."""
    per_chunk = old.layers // old.chunks
    assert per_chunk * old.chunks == old.layers
    assert per_chunk >= old.pipeline
    found: list[list[range]] = [[] for _ in range(old.pipeline)]
    at = 0
    for _ in range(old.chunks):
        for stage in range(old.pipeline):
            extra = stage >= old.pipeline - per_chunk % old.pipeline
            size = per_chunk // old.pipeline + extra
            found[stage].append(range(at, at + size))
            at += size
    return found


def rows(tensor: Tensor, rank: int, ranks: int) -> Tensor:
    size = tensor.shape[0] // ranks
    assert size * ranks == tensor.shape[0]
    return tensor[rank * size : (rank + 1) * size]


def columns(tensor: Tensor, rank: int, ranks: int) -> Tensor:
    return rows(tensor.t(), rank, ranks).t()


def neighbours(tensor: Tensor, heads: int) -> Tensor:
    """Return wq or wk as `adapt_hf=False` has it: element 2j of a head is our j, 2j + 1 our j + E/2."""
    width = tensor.shape[0] // heads
    order = [half * (width // 2) + j for j in range(width // 2) for half in (0, 1)]
    return torch.cat([tensor[head * width : (head + 1) * width][order] for head in range(heads)])


def by_group(q: Tensor, k: Tensor, v: Tensor, heads: int, kv_heads: int) -> Tensor:
    """Return the fused matrix of INTERNLM2: for each key-value head its queries, its key, its value."""
    width, each = q.shape[0] // heads, heads // kv_heads
    pieces = []
    for group in range(kv_heads):
        pieces.append(q[group * each * width : (group + 1) * each * width])
        pieces.append(k[group * width : (group + 1) * width])
        pieces.append(v[group * width : (group + 1) * width])
    return torch.cat(pieces)


def block(weights: Named, number: int, old: Old, tensor: int, weight: int) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters of a block on a rank, in the order of its modules."""
    own = {
        name.removeprefix(f"blocks.{number}."): t for name, t in weights.items() if name.startswith(f"blocks.{number}.")
    }
    is_isp = old.weight > 0
    rank, ranks = (weight, old.weight) if is_isp else (tensor, old.tensor)
    across = rows if is_isp else columns  # weight parallelism cuts whatever it is into rows
    internlm = old.dialect == "INTERNLM"
    kinds = [kind for kind in ("weight", "bias") if f"attention.wq.{kind}" in own]
    for kind in kinds:
        q, k, v = (own[f"attention.{name}.{kind}"] for name in ("wq", "wk", "wv"))
        if not internlm and not old.adapt_hf:
            q, k = neighbours(q, old.heads), neighbours(k, old.kv_heads)
        if internlm and is_isp:
            yield f"mixer.Wqkv.{kind}", rows(torch.cat([q, k, v]), rank, ranks)
        elif internlm:
            yield f"mixer.Wqkv.{kind}", torch.cat([rows(t, rank, ranks) for t in (q, k, v)])
        elif old.dialect == "INTERNLM2":
            yield f"attention.wqkv.{kind}", rows(by_group(q, k, v, old.heads, old.kv_heads), rank, ranks)
    if old.dialect == "LLAMA2":
        for name, heads in (("wq", old.heads), ("wk", old.kv_heads), ("wv", 0)):
            for kind in kinds:
                t = own[f"attention.{name}.{kind}"]
                yield (
                    f"attention.{name}.{kind}",
                    rows(neighbours(t, heads) if heads and not old.adapt_hf else t, rank, ranks),
                )
    output = "mixer.out_proj" if internlm else "attention.wo"
    yield f"{output}.weight", across(own["attention.wo.weight"], rank, ranks)
    if "bias" in kinds and is_isp:
        yield f"{output}.bias", rows(own["attention.wo.bias"], rank, ranks)
    elif "bias" in kinds and tensor == 0:
        yield f"{output}.bias", own["attention.wo.bias"]
    yield "norm1.weight" if internlm else "attention_norm.weight", own["attention_norm.weight"]
    yield "norm2.weight" if internlm else "ffn_norm.weight", own["feed_forward_norm.weight"]
    mlp = "mlp" if internlm else "feed_forward"
    down, up = ("w2", "w3") if old.w2_is_down else ("w3", "w2")
    matrices = {
        "w1": rows(own["feed_forward.w_gate.weight"], rank, ranks),
        up: rows(own["feed_forward.w_up.weight"], rank, ranks),
        down: across(own["feed_forward.w_down.weight"], rank, ranks),
    }
    for name in ("w1", "w2", "w3"):
        yield f"{mlp}.{name}.weight", matrices[name]


def parameters(weights: Named, old: Old, stage: int, tensor: int, weight: int = 0) -> Named:
    """Return the parameters of a rank by their names, in the order of its modules."""
    found: Named = {}
    internlm = old.dialect == "INTERNLM"
    usual = ("embedding" if internlm else "tok_embeddings") + ("" if old.embed_split_hidden else ".word_embeddings")
    for chunk, layers in enumerate(stage_layers(old)[stage]):
        prefix = (f"{chunk}." if old.chunks > 1 else "") + old.prefix
        if layers.start == 0:
            cut = columns if old.embed_split_hidden else rows
            found[f"{prefix}{old.embedding_name or usual}.weight"] = cut(
                weights["embedding.weight"], tensor, old.tensor
            )
        for local, number in enumerate(layers):
            for name, part in block(weights, number, old, tensor, weight):
                found[f"{prefix}{'blocks' if internlm else 'layers'}.{local}.{name}"] = part
        if layers.stop == old.layers:
            found[f"{prefix}norm.weight"] = weights["norm.weight"]
            found[f"{prefix}{'head' if internlm else 'output'}.weight"] = rows(
                weights["head.weight"], tensor, old.tensor
            )
    return found


def groups(named: Named, old: Old) -> list[list[str]]:
    """Return the names of the parameter groups `default` and `fp32`."""
    if old.one_group:
        return [list(named)]
    return [[name for name, t in named.items() if (t.dtype == torch.float32) == fp32] for fp32 in (False, True)]


def assignment(named: Named, names: list[str], old: Old) -> list[list[str]]:
    """Return which of a group's parameters each zero rank has, in the order of its flat tensor."""
    ordered = sorted(names, key=lambda name: named[name].numel(), reverse=True)
    owner: dict[str, int] = {}
    if old.overlap_sync_param:
        average = sum(t.numel() for t in named.values()) // old.zero
        held, rank = 0, 0
        for name in named:  # of all groups, block by block
            held += named[name].numel()
            if held > average * 1.01 and rank < old.zero - 1:
                rank, held = rank + 1, 0
            owner[name] = rank
    else:
        loads = [0] * old.zero
        for name in ordered:
            owner[name] = loads.index(min(loads))
            loads[owner[name]] += named[name].numel()
    return [[name for name in ordered if owner[name] == rank] for rank in range(old.zero)]


def flat(named: Named, names: list[str]) -> Tensor:
    return torch.cat([named[name].reshape(-1) for name in names]).clone()


def write_model(weights: Named, old: Old, folder: Path, stage: int, tensor: int, weight: int = 0) -> None:
    """Write a rank's model file: its parameters are views into the flat storages of their groups."""
    named = parameters(weights, old, stage, tensor, weight)
    views: Named = {}
    for names in groups(named, old):
        for owned in assignment(named, names, old):
            if owned:
                storage, at = flat(named, owned), 0
                for name in owned:
                    views[name] = storage[at : at + named[name].numel()].view(named[name].shape)
                    at += named[name].numel()
    states = OrderedDict((name, views[name]) for name in named)
    if old.inv_freq:
        for name in [name for name in states if name.endswith(("Wqkv.weight", "attention.wq.weight"))]:
            states[name.rsplit(".", 2)[0] + ".rotary_emb.inv_freq"] = torch.rand(4)
    part = f"_wp{weight}" if old.weight else ""
    torch.save(states, folder / f"model_tp{tensor}{part}_pp{stage}.pt")
    topology = {} if old.embed_split_hidden or stage else {"model.embedding.word_embeddings": {"dim": 0}}
    torch.save(topology, folder / f"topo_tp{tensor}{part}_pp{stage}.json")


def write_optimizer(states: dict[str, Named], weights: Named, old: Old, folder: Path, stage: int, tensor: int) -> None:
    """Write the optimizer files of all zero ranks of a rank: `states` has master, exp_avg, exp_avg_sq by our names."""
    named = parameters(weights, old, stage, tensor)
    cut = {kind: parameters(of_kind, old, stage, tensor) for kind, of_kind in states.items()}
    handed = [assignment(named, names, old) for names in groups(named, old)]
    plan = []
    for names, of_group in zip(groups(named, old), handed, strict=True):
        ordered = sorted(names, key=lambda name: named[name].numel(), reverse=True)
        label = {name: "_".join(map(str, [i, *named[name].shape])) for i, name in enumerate(ordered)}
        plan.append([[label[name] for name in owned] for owned in of_group])
    for rank in range(old.zero):
        flats, state, param_groups, next_id = {}, {}, [], 0
        for number, (names, of_group) in enumerate(zip(groups(named, old), handed, strict=True)):
            owned = of_group[rank]
            ids = [next_id] if owned else list(range(next_id, next_id + len(names)))  # none: the parameters stay listed
            next_id += len(ids)
            label = ("default", "fp32")[number]
            mode = {"dp_mode": ParallelMode.DATA, "dtype": named[names[0]].dtype if names else None}
            param_groups.append({"lr": 1e-4, "weight_decay": 0.01, "name": label, **mode, "params": ids})
            if owned:
                flats[number] = flat(cut["master"], owned).requires_grad_()
                means = {kind: flat(cut[kind], owned) for kind in ("exp_avg", "exp_avg_sq") if kind in cut}
                if means:
                    state[ids[0]] = {"step": torch.tensor(7.0), **means}
        content = {
            "grad_scaler": {"_scale": 65536.0, "_growth_step": 3, "_hysteresis_step": 0},
            "base_optim_states": {"state": state, "param_groups": param_groups},
            "flat_fp32_weights": flats,
            "zero_devide_optim_plan": plan,
        }
        torch.save(content, folder / f"optimizer_tp{tensor}_pp{stage}_zo{rank}.pt")
        world = old.tensor * old.pipeline * old.zero
        torch.save(plan, folder / f"gpus-{world}_pp-{stage}_tp-{tensor}_zo-{rank}.pt")


def write(weights: Named, old: Old, folder: Path, step: int = 7, states: dict[str, Named] | None = None) -> Path:
    """Write a checkpoint folder, and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    hidden = weights["norm.weight"].shape[0]
    config: dict[str, Any] = {
        "num_attention_heads": old.heads,
        "embed_split_hidden": old.embed_split_hidden,
        "vocab_size": weights["embedding.weight"].shape[0],
        "hidden_size": hidden,
        "num_layers": old.layers,
        "mlp_ratio": weights["blocks.0.feed_forward.w_gate.weight"].shape[0] / hidden,
        "apply_post_layer_norm": False,
        "dtype": torch.bfloat16,
        "norm_type": "rmsnorm",
        "layer_norm_epsilon": 1e-5,
        "use_flash_attn": True,
        "num_chunks": old.chunks,
    }
    if old.dialect != "INTERNLM":
        config |= {"num_kv_attention_heads": old.kv_heads, "no_bias": True, "adapt_hf": old.adapt_hf}
    with framework():
        for stage in range(old.pipeline):
            # Tensor and weight ranks both count the same processes, so only some pairs of them exist.
            for process in range(math.lcm(old.tensor, old.weight or 1)):
                write_model(weights, old, folder, stage, process % old.tensor, process % (old.weight or 1))
            for tensor in range(old.tensor if states is not None else 0):
                write_optimizer(states or {}, weights, old, folder, stage, tensor)
        torch.save(Config({**config, **old.config}), folder / "model_config.pt")
        torch.save("SEQ_LEN = 4096\nHIDDEN_SIZE = 32\nmodel = dict(a=1)\n", folder / "config_file.pt")
        context = {"batch_count": step - 1, "num_consumed_samples_in_epoch": 5, "num_consumed_tokens": step * 1000}
        torch.save({**context, "inf_nan_skip_batches": 1, "step_count": step}, folder / "context.pt")
        torch.save({"_last_lr": [3e-5, 3e-5], "base_lrs": [1e-4, 1e-4]}, folder / "schedulder.pt")
        torch.save({"step": step}, folder / f"{step}.step")
    return folder
