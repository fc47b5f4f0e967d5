"""The only place that touches private or version-dependent torch names (2.11 to 2.13).

Each function says which versions differ, and is the one line to change when they do.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

_P = ParamSpec("_P")
_R = TypeVar("_R")


@functools.cache
def has_varlen_attention() -> bool:
    """Return whether torch ships variable-length flash attention (from 2.10 on; CUDA, bf16 and fp16 only)."""
    try:
        from torch.nn.attention.varlen import varlen_attn  # noqa: F401
    except ImportError:
        return False
    return True


@functools.cache
def _varlen_options() -> dict[str, Any]:
    """Return the keyword that makes varlen_attn causal: `is_causal` up to 2.11, `window_size` from 2.12 on."""
    from torch.nn.attention.varlen import varlen_attn

    names = inspect.signature(varlen_attn).parameters
    options: dict[str, Any] = {"is_causal": True} if "is_causal" in names else {"window_size": (-1, 0)}
    if "enable_gqa" in names:
        options["enable_gqa"] = True
    return options


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, max_length: int) -> Tensor:
    """Causal attention over documents laid end to end.

    Args:
        q: [N, H, E]; k, v: [N, K, E].
        starts: int32 offsets of the documents, the last N.
        max_length: length of the longest document, or any bound on it.
    """
    from torch.nn.attention.varlen import varlen_attn

    options = dict(_varlen_options())
    if q.shape[1] != k.shape[1] and "enable_gqa" not in options:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    elif q.shape[1] == k.shape[1]:
        options.pop("enable_gqa", None)
    out = varlen_attn(q, k, v, starts, starts, max_length, max_length, **options)
    return out[0] if isinstance(out, tuple) else out


def document_block_mask(ids: Tensor) -> Any:
    """Return FlexAttention's block mask: causal, inside a document. ids: [B, T]."""
    from torch.nn.attention.flex_attention import create_block_mask

    def same_document_and_earlier(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (ids[batch, query] == ids[batch, key])

    batch, length = ids.shape
    return create_block_mask(same_document_and_earlier, batch, None, length, length, device=ids.device.type)


def flex_attention(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
    """FlexAttention over [B, heads, T, E], compiled on CUDA (eager FlexAttention holds all scores)."""
    return _flex(q.device.type)(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])


@functools.cache
def _flex(device_type: str) -> Any:
    from torch.nn.attention.flex_attention import flex_attention as flex

    return torch.compile(flex) if device_type == "cuda" else flex


def attention_and_mass(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return attention without a mask [B, H, Q, E] and the log of its denominators [B, H, Q], where torch tells them.

    The operator of scaled_dot_product_attention on CPUs, which throws the second away (2.11 to 2.13).

    Args:
        q: [B, H, Q, E].
        k, v: [B, H, T, E].
    """
    if q.device.type != "cpu" or not hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu"):
        return None
    out, mass = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    return out, mass


def as_products(x: Tensor) -> Tensor:
    """Return x in the dtype in which autocast makes products here; x itself without it. On meta torch cannot say."""
    device = x.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return x
    return x.to(torch.get_autocast_dtype(device))


def without_autocast(x: Tensor) -> Any:
    """Return a context in which products with x are made in its own dtype. There is none for meta, nor a need."""
    return contextlib.nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


def outside_graphs(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Return the function as one that compiled graphs call and do not look into.

    `torch.compiler.disable` does the same and imports the compiler at once, more than a second for who never compiles;
    torch's own lazy form (2.11 to 2.13) does at the first call.
    """
    from torch._compile import _disable_dynamo

    return _disable_dynamo(function)


@functools.cache
def has_onednn_linear() -> bool:
    """Return whether torch's oneDNN product for fp32 linear layers can be called here (x86 and Arm CPU builds)."""
    if not torch.backends.mkldnn.is_available():
        return False
    x, w = torch.ones(2, 4, device="cpu"), torch.ones(3, 4, device="cpu")  # also when models are built on meta
    try:
        return torch.equal(onednn_linear(x, w), x @ w.t())
    except (RuntimeError, AttributeError, NotImplementedError):
        return False


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x [..., K] · weight [N, K] transposed + bias [N], through oneDNN instead of MKL; fp32, CPU, no gradient.

    torch sends fp32 products to MKL, which does not use AVX-512 on AMD: 122-194 GFLOP/s there against 193-217 from
    oneDNN (2 threads of a Zen 4, the shapes of `benchmarks/train_cpu.py`). The op is the one inductor calls; it takes
    plain strided weights.
    """
    if torch.compiler.is_compiling():
        # inductor takes this op for frozen weights only; behind an op of our own it leaves it alone
        return _opaque_linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


@torch.library.custom_op("internlm::onednn_linear", mutates_args=())
def _opaque_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


@_opaque_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@functools.cache
def has_packed_onednn_linear() -> bool:
    """Return whether oneDNN takes fp32 weights in an order of its own here."""
    if not has_onednn_linear():
        return False
    x, w = torch.ones(2, 4, device="cpu"), torch.ones(3, 4, device="cpu")
    try:
        return torch.equal(onednn_linear(x, pack_onednn_linear(w)), x @ w.t())
    except (RuntimeError, AttributeError, NotImplementedError):
        return False


def pack_onednn_linear(weight: Tensor) -> Tensor:
    """Return a copy of a weight [N, K], fp32, in the order that suits oneDNN; only `onednn_linear` can read it."""
    return torch.ops.mkldnn._reorder_linear_weight(weight, None)


@functools.cache
def has_fp16_linear() -> bool:
    """Return whether fbgemm multiplies fp32 rows by packed fp16 weights here (x86 builds)."""
    x, w = torch.ones(2, 4, device="cpu"), torch.ones(3, 4, device="cpu")
    try:
        return torch.equal(fp16_linear(x, pack_fp16_linear(w, None)), x @ w.t())
    except (RuntimeError, AttributeError, NotImplementedError):
        return False


def pack_fp16_linear(weight: Tensor, bias: Tensor | None) -> Any:
    """Return a weight [N, K] and a bias [N], both fp32, packed for `fp16_linear`; the weight is rounded to fp16."""
    return torch.ops.quantized.linear_prepack_fp16(weight, bias)


def fp16_linear(x: Tensor, packed: Any) -> Tensor:
    """Return x [..., K], fp32, times a packed weight + bias; products and sums are in fp32."""
    return torch.ops.quantized.linear_dynamic_fp16(x, packed)


@functools.cache
def has_bf16_linear() -> bool:
    """Return whether oneDNN multiplies bf16 rows by bf16 weights here, and the processor has instructions for it.

    Without them (AVX512-BF16 or AMX) such products are converted to fp32 one by one, and nine times slower than that.
    """
    if not (_cpu_has("_is_avx512_bf16_supported") or _cpu_has("_is_amx_tile_supported")):
        return False
    x, w = torch.ones(2, 4, device="cpu"), torch.ones(3, 4, device="cpu")
    try:
        return torch.equal(bf16_linear(x, pack_bf16_linear(w)), x @ w.t())
    except (RuntimeError, AttributeError, NotImplementedError):
        return False


def pack_bf16_linear(weight: Tensor) -> Tensor:
    """Return a copy of a weight [N, K] in bf16, in the order that suits oneDNN; only `bf16_linear` can read it."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.bfloat16(), None)


def bf16_linear(x: Tensor, packed: Tensor) -> Tensor:
    """Return x [..., K] times a packed weight, fp32; x and what comes out are rounded to bf16, sums are in fp32."""
    return torch.ops.mkldnn._linear_pointwise(x.bfloat16(), packed, None, "none", [], "").float()


def _cpu_has(question: str) -> bool:
    """Return what a private function of torch says of the processor; no where it is missing."""
    return bool(getattr(torch.cpu, question, bool)())


@functools.cache
def has_int8_linear() -> bool:
    """Return whether oneDNN multiplies 7-bit rows by 8-bit weights here, and without an error at the largest values.

    Instructions before VNNI add pairs of products in 16 bits: 255 · 127 · 2 does not fit there, 127 · 127 · 2 does.
    """
    x = torch.full((3, 64), 127, dtype=torch.uint8, device="cpu")
    x[1:] = 0
    w = torch.full((5, 64), 127, dtype=torch.int8, device="cpu")
    w[1:] = -127
    try:
        out = int8_linear(x, pack_int8_linear(w), torch.ones(5, device="cpu"))
    except (RuntimeError, AttributeError, NotImplementedError):
        return False
    return torch.equal(out.double(), (x.double() - 64) @ w.double().t())


def pack_int8_linear(weight: Tensor) -> Tensor:
    """Return a copy of a weight [N, K], int8, in the order that suits oneDNN."""
    return torch.ops.onednn.qlinear_prepack(weight, None)


def int8_linear(x: Tensor, packed: Tensor, scales: Tensor) -> Tensor:
    """Return (x − 64) [M, K] times a packed weight, each column times its scale [N], fp32.

    Sums are made in 32-bit integers: a row's result does not depend on the others, nor on the order.

    Args:
        x: uint8, at most 127.
        packed: of `pack_int8_linear`, all within ±127.
        scales: fp32.
    """
    zeros = torch.zeros(len(scales), dtype=torch.int64)
    return torch.ops.onednn.qlinear_pointwise(
        x, 1.0, 64, packed, scales, zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )


def has_grouped_product(*factors: Tensor) -> bool:
    """Return whether one kernel multiplies groups of rows by a matrix each.

    On GPUs from the A100 on, in bf16, with rows of multiples of 16 bytes, and if there are rows at all.
    """
    first = factors[0]
    fits = all(x.dtype == torch.bfloat16 and x.numel() and all(n % 8 == 0 for n in x.shape[1:]) for x in factors)
    return first.is_cuda and fits and torch.cuda.get_device_capability(first.device) >= (8, 0)


def grouped_product(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    """Return the products of groups: rows of a [R, K] by b [E, K, N], or columns of a [M, R] by rows of b [R, N].

    Private before 2.10. Rows after the last end are not computed.
    """
    import torch.nn.functional as F

    public = getattr(F, "grouped_mm", None)
    return public(a, b, offs=ends) if public is not None else torch._grouped_mm(a, b, offs=ends)


@functools.cache
def expensive_operators() -> frozenset[Any]:
    """Return the operators whose results selective recomputation keeps: matrix products and attention."""
    names = [
        "aten.mm.default", "aten.addmm.default", "aten.bmm.default", "aten.linear.default",
        "aten._scaled_mm.default",
        "aten._scaled_dot_product_flash_attention.default", "aten._scaled_dot_product_efficient_attention.default",
        "aten._scaled_dot_product_cudnn_attention.default",
        "aten._scaled_dot_product_flash_attention_for_cpu.default",
        "torch_attn._varlen_attn.default", "internlm.onednn_linear.default", "internlm.grouped_product.default",
        "mkldnn._linear_pointwise.default",
    ]  # fmt: skip
    found = []
    for name in names:
        with contextlib.suppress(AttributeError, RuntimeError):  # this build has no such kernel
            found.append(functools.reduce(getattr, name.split("."), torch.ops))
    return frozenset(found)


def all_gather(out: Tensor, x: Tensor, group: Any) -> None:
    """Fill `out` with the x of all ranks of a group, one after the other along dim 0. Renamed in 2.13."""
    import torch.distributed as dist

    getattr(dist, "all_gather_single", dist.all_gather_into_tensor)(out, x, group=group)


def reduce_scatter(out: Tensor, x: Tensor, group: Any) -> None:
    """Fill `out` with this rank's part along dim 0 of the sum of x over a group. Renamed in 2.13."""
    import torch.distributed as dist

    getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)(out, x, group=group)


def traced_gather(x: Tensor, group: Any, dim: int) -> Tensor:
    """Return the x of all ranks joined along a dim, in the form that inductor finds and fuses with products."""
    from torch.distributed import _functional_collectives as functional

    gathered = getattr(functional, "all_gather_single", functional.all_gather_tensor)
    return gathered(x.contiguous(), dim, group)


def traced_scatter(x: Tensor, group: Any, dim: int) -> Tensor:
    """Return this rank's part along a dim of the sum of x over a group, in the form that inductor finds and fuses."""
    from torch.distributed import _functional_collectives as functional

    scattered = getattr(functional, "reduce_scatter_single", functional.reduce_scatter_tensor)
    return scattered(x, "sum", dim, group)


def fuse_collectives(group: Any) -> None:
    """Make inductor run the gathers and scatters of a group in pieces, beside the products before or after them.

    Names of torch's asynchronous tensor parallelism, all private; from 2.13 on the first call only warns.
    """
    import torch._inductor.config as inductor
    from torch.distributed import _symmetric_memory

    _symmetric_memory.enable_symm_mem_for_group(group.group_name)
    inductor._micro_pipeline_tp = True


def shards(placement: Any, dim: int) -> bool:
    """Return whether a placement cuts a dim. torch's strided placement is private, and in 2.13 not a Shard."""
    return not placement.is_replicate() and not placement.is_partial() and placement.dim == dim


def shard_inside(dim: int, parts: int) -> Any:
    """Return the placement of a mesh axis that cuts each of the `parts` equal parts that later axes cut a dim into."""
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor.placement_types import _StridedShard

    return Shard(dim) if parts == 1 else _StridedShard(dim, split_factor=parts)


def weight_stream(model: Any) -> Any:
    """Return the stream on which `fully_shard` reads weights to gather them; None where that is not known.

    A private name; the public `set_post_optim_event` knows one event for the whole model.
    """
    context = getattr(model._get_fsdp_state(), "_comm_ctx", None)
    return getattr(context, "all_gather_copy_in_stream", None)


def limit_waits(seconds: float) -> None:
    """Set how long an exchange may take in every group of this process: groups inherit it from no other."""
    import datetime

    from torch.distributed import distributed_c10d as c10d

    for group in list(c10d._world.pg_map):
        c10d._set_pg_timeout(datetime.timedelta(seconds=seconds), group)


def abort_groups() -> None:
    """Give up every group of this process without waiting for other ranks, who may never come."""
    from torch.distributed import distributed_c10d as c10d

    c10d._abort_process_group()


@contextlib.contextmanager
def launcher_agent(make: Callable[..., Any]) -> Iterator[None]:
    """Let torch's launcher use, inside the block, another agent for its ranks: it has no public place to say so."""
    api: Any = importlib.import_module("torch.distributed.launcher.api")
    before = api.LocalElasticAgent
    api.LocalElasticAgent = make
    try:
        yield
    finally:
        api.LocalElasticAgent = before


def flight_record() -> bytes | None:
    """Return the last exchanges of this process as torch recorded them, for `torchfrtrace`; None where it does not.

    A private name, which the CPU builds before 2.13 lack. Some 2000 exchanges, unless TORCH_FR_BUFFER_SIZE says else.
    """
    dump = getattr(getattr(torch._C, "_distributed_c10d", None), "_dump_fr_trace", None)
    if dump is None:
        dump = getattr(getattr(torch._C, "_distributed_c10d", None), "_dump_nccl_trace", None)
    return None if dump is None else bytes(dump())


def scaled_product(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a [M, K] · b [K, N] of 8-bit floats times both scales, in `dtype`.

    `torch._scaled_mm` is private, and `F.scaled_mm` exists from 2.13 on only. A device without such products, and fp32
    results, which it does not give, get plain ones of the same rounded numbers.
    """
    capable = a.is_cuda and torch.cuda.get_device_capability(a.device) >= (8, 9)
    if capable and dtype in (torch.bfloat16, torch.float16):
        return torch._scaled_mm(a, b, scale_a=a_scale, scale_b=b_scale, out_dtype=dtype, use_fast_accum=False)
    return (a.float() @ b.float() * (a_scale * b_scale)).to(dtype)


def start_profiler(device: torch.device, *, cpu_too: bool = False) -> Any:
    """Return a running profiler of this device, and of the CPU where that is the device or wanted too."""
    from torch.profiler import ProfilerActivity, profile

    is_gpu = device.type == "cuda"
    kinds = [ProfilerActivity.CUDA] * is_gpu + [ProfilerActivity.CPU] * (cpu_too or not is_gpu)
    profiler = profile(activities=kinds)
    with _quiet():
        profiler.start()
    return profiler


def stop_profiler(profiler: Any) -> list[tuple[str, int, int, bool, int]]:
    """Return what ran: name, begin and end in nanoseconds, whether on a GPU, number of the thread that called it.

    Read from a private name: `events()` builds a tree of objects first, which takes a minute for a large step.
    """
    with _quiet():
        profiler.stop()
    found = profiler.profiler.kineto_results.events()
    return [(e.name(), e.start_ns(), e.end_ns(), e.device_type().name != "CPU", e.start_thread_id()) for e in found]


def record_memory(entries: int) -> None:
    """Note from now on who allocates on the GPU, with stacks, and keep the last entries; 0: no more. Private names."""
    torch.cuda.memory._record_memory_history("all" if entries else None, stacks="python", max_entries=entries or 1)


def dump_memory(path: str) -> None:
    """Write what lies in the GPU's memory, and what was noted about it, for pytorch.org/memory_viz. Private names."""
    torch.cuda.memory._dump_snapshot(path)


def is_compiled(module: Any) -> bool:
    """Return whether calls of a module go to a compiled graph. A private name."""
    return module._compiled_call_impl is not None


def wrap_call(module: Any, around: Callable[..., Any]) -> Callable[[], None]:
    """Let `around(call, *arguments)` run for every call, as hooks of compiled ones cannot; return what ends that."""
    before = module._compiled_call_impl
    module._compiled_call_impl = functools.partial(around, before or module._call_impl)
    return lambda: setattr(module, "_compiled_call_impl", before)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Drop what libraries write to stderr: 2.13's profiler tells there, whatever its settings, that it starts."""
    import os
    import sys

    if sys.stderr is None:  # closed
        yield
        return
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def join_fake_group(rank: int, world_size: int) -> None:
    """Start a process group of which only this rank is there: collectives do nothing. Its store is a private name."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())


def leave_fake_group() -> None:
    """End it, with what torch remembers about its meshes, whose names the next group would use again."""
    import torch.distributed as dist
    from torch.distributed.tensor import DTensor

    dist.destroy_process_group()
    getattr(torch._C, "_clear_DTensor_sharding_propagator_cache", lambda: None)()
    propagator = getattr(getattr(DTensor, "_op_dispatcher", None), "sharding_propagator", None)
    getattr(getattr(propagator, "propagate_op_sharding", None), "cache_clear", lambda: None)()


def fake_tensors() -> Any:
    """Return the mode in which operators work out shapes only; it takes real tensors too."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode(allow_non_fake_inputs=True)


def exchange_of(operator: Any, arguments: tuple[Any, ...]) -> tuple[str, str, Tensor | None] | None:
    """Return what an operator of the dispatcher sends between ranks: (operation, name of the group, tensor).

    The tensor is the whole one: what an all-gather makes, what the others are given. None for every other operator.
    """
    import torch.distributed as dist

    namespace, _, name = operator.name().partition("::")
    if namespace == "_c10d_functional" and name == "all_reduce":
        return "all_reduce", arguments[2], arguments[0]
    if namespace != "c10d" or name in ("monitored_barrier_", "barrier"):
        return None
    group = next((a for a in arguments if isinstance(a, torch.ScriptObject)), None)
    assert group is not None, f"{name} has a group"
    first = arguments[0][0] if isinstance(arguments[0], list | tuple) else arguments[0]
    whole = arguments[1] if name == "_reduce_scatter_base_" else first
    return name.strip("_"), dist.ProcessGroup.unbox(group).group_name, whole
