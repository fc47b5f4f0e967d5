"""Gathers and scatters of the tensor axis are in the form that inductor fuses with products."""

from __future__ import annotations

import copy
from collections.abc import Callable
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, fx

from internlm.compat import groups
from internlm.errors import ConfigError
from internlm.model.config import ModelConfig
from internlm.parallel.apply import Parallel, Setting
from internlm.parallel.mesh import ParallelConfig

SHAPE = ModelConfig(vocab_size=64, hidden_size=64, num_layers=1, num_heads=4, ffn_size=128)
SETTING = Setting(
    torch.device("cpu"), torch.bfloat16, "dense", compile=False, seq_len=32, micro_rows=2, micro_batches=1
)


def test_the_exchanges_of_a_block_are_fused_with_products() -> None:
    # Seconds of imports, which whoever collects tests need not wait for.
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.fx_passes.micro_pipeline_tp import micro_pipeline_tp_pass
    from torch._inductor.fx_passes.post_grad import view_to_reshape
    from torch.distributed._symmetric_memory import _test_mode

    graphs: list[list[str]] = []

    def look(graph: fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        before = copy.deepcopy(graph)  # what this machine can run
        view_to_reshape(graph)
        with _test_mode(), mock.patch.object(dist, "is_nccl_available", return_value=True):
            micro_pipeline_tp_pass(graph.graph)
        graphs.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return make_boxed_func(before.forward)

    groups.join_fake_group(0, 2)
    try:
        parallel = Parallel(SHAPE, ParallelConfig(tensor=2), SETTING)
        parallel.initialize(0)
        (model,) = parallel.parts
        backend = aot_autograd(fw_compiler=look, bw_compiler=look, decompositions=select_decomp_table())
        model.blocks["0"].compile(backend=backend, fullgraph=True)
        model(torch.zeros(2, 32, dtype=torch.int64)).sum().backward()
    finally:
        groups.leave_fake_group()
        torch.compiler.reset()
    gather, scatter = "fused_all_gather_matmul", "fused_matmul_reduce_scatter"
    plain = ("all_gather_into_tensor", "reduce_scatter_tensor")
    counts = [[sum(name in target for target in graph) for name in (gather, scatter, *plain)] for graph in graphs]
    # In backward a scatter is given the sum of several products, which no fused operator makes.
    assert counts == [[2, 2, 0, 0], [2, 0, 0, 2]]


def test_what_it_needs_is_named() -> None:
    groups.join_fake_group(0, 2)
    try:
        with pytest.raises(ConfigError, match=r"async_tensor: needs parallel.sequence and runtime.compile and a CUDA"):
            Parallel(SHAPE, ParallelConfig(tensor=2, async_tensor=True, sequence=False), SETTING)
    finally:
        groups.leave_fake_group()
