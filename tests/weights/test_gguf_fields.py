"""GGUF files of another's making: what their fields say is read, or refused by name."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from internlm.errors import WeightsError
from internlm.model.config import YarnScaling
from internlm.weights.gguf import fields
from internlm.weights.gguf import model as gguf
from internlm.weights.talk import Talk
from tests.models import random_model
from tests.weights.test_gguf import SHAPE, YARN_TABLE, export, facts, stored

library = pytest.importorskip("gguf")


def written(path: Path, architecture: str, change: Callable[[Any], None], skipped: str = "") -> Path:
    """Return a file of another's making: a tiny model without biases of its own."""
    writer = library.GGUFWriter(path, architecture)
    writer.add_context_length(64)
    writer.add_embedding_length(8)
    writer.add_block_count(1)
    writer.add_feed_forward_length(12)
    writer.add_head_count(2)
    writer.add_layer_norm_rms_eps(1e-5)
    change(writer)
    generator = np.random.default_rng(0)
    rows = {"attn_norm": (8,), "ffn_norm": (8,), "ffn_gate": (12, 8), "ffn_up": (12, 8), "ffn_down": (8, 12)}
    rows |= {f"attn_{part}": (8, 8) for part in ("q", "k", "v", "output")}
    shapes_there = {f"blk.0.{name}.weight": shape for name, shape in rows.items()}
    shapes_there |= {"token_embd.weight": (20, 8), "output_norm.weight": (8,), "output.weight": (20, 8)}
    if architecture == "qwen2":
        shapes_there |= {f"blk.0.attn_{part}.bias": (8,) for part in ("q", "k", "v")}
    for name, shape in shapes_there.items():
        if name != skipped:
            writer.add_tensor(name, generator.standard_normal(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_qwen2_of_others_is_read_without_moving_rows(tmp_path: Path) -> None:
    file = written(tmp_path / "a.gguf", "qwen2", lambda writer: None)
    config = gguf.read_config(file)
    assert (config.qkv_bias, config.output_bias, config.head_dim, config.num_kv_heads) == (True, False, 4, 2)
    weights, there = gguf.open_weights(file), stored(file)
    assert torch.equal(weights["blocks.0.attention.wq.weight"].read(), there["blk.0.attn_q.weight"])
    assert torch.equal(weights["blocks.0.attention.wk.bias"].read(), there["blk.0.attn_k.bias"])
    assert gguf.read_talk(file) == Talk()


def test_files_that_this_decoder_cannot_read_are_refused_by_name(tmp_path: Path) -> None:
    table = np.full(2, 3.0, np.float32)
    for number, (architecture, change, message) in enumerate(
        [
            ("gemma", lambda writer: None, "gemma.*allowed: llama, qwen2"),
            ("llama", lambda writer: writer.add_sliding_window(512), r"attention\.sliding_window is not supported"),
            ("llama", lambda writer: writer.add_uint16("split.count", 2), "one part of several"),
            ("llama", lambda writer: (writer.add_key_length(4), writer.add_value_length(6)), "value_length"),
            ("llama", lambda writer: (writer.add_key_length(4), writer.add_rope_dimension_count(2)), "dimension_count"),
            ("llama", lambda writer: writer.add_tensor("rope_freqs.weight", table), "not that of Llama 3.1"),
            ("llama", lambda writer: writer.add_tensor("blk.0.extra.weight", table), r"blk\.0\.extra\.weight: no such"),
            ("llama", lambda writer: writer.add_head_count_kv([1, 2]), "num_kv_heads.*a list of 2"),
            ("llama", lambda writer: writer.add_string("llama.rope.scaling.factor", "x"), "describes no model"),
            ("llama", lambda writer: writer.add_block_count(10**9), "another number of blocks than the 1 it holds"),
            ("llama", lambda writer: writer.add_string("llama.rope.scaling.type", "longrope"), "longrope"),
            ("llama", lambda writer: writer.add_rope_dimension_count(2), "dimension_count must be the width of a head"),
            ("llama", lambda writer: writer.add_float32("llama.rope.scaling.attn_factor", 1.5), "must be 1 for this"),
        ]
    ):
        with pytest.raises(WeightsError, match=message):
            gguf.open_weights(written(tmp_path / f"{number}.gguf", architecture, change))
    with pytest.raises(WeightsError, match="no table of embeddings"):
        gguf.read_config(written(tmp_path / "b.gguf", "llama", lambda writer: None, "token_embd.weight"))
    with pytest.raises(WeightsError, match="holds 14 GGUF files"):
        gguf.read_config(tmp_path)


@pytest.mark.parametrize(
    ("key", "odd", "neutral"),
    [
        ("attention.causal", False, True),
        ("attention.clamp_kqv", 8.0, 0.0),
        ("attention.max_alibi_bias", 8.0, 0.0),
        ("attn_logit_softcapping", 50.0, 0.0),
        ("embedding_scale", 12.0, 1.0),
        ("expert_gating_func", 2, 1),
        ("expert_weights_norm", False, True),
        ("expert_weights_scale", 2.5, 1.0),
        ("final_logit_softcapping", 30.0, 0.0),
        ("logit_scale", 0.1, 1.0),
        ("residual_scale", 0.2, 1.0),
        ("rope.scale_linear", 2.0, 1.0),
        ("rope.scaling.yarn_attn_factor", 0.5, 1.0),
        ("rope.scaling.yarn_ext_factor", 0.5, 0.0),
        ("rope.scaling.yarn_log_multiplier", 0.1, 0.0),
        ("use_parallel_residual", True, False),
    ],
)
def test_a_field_that_changes_the_numbers_is_refused_and_read_where_it_changes_none(
    key: str, odd: float, neutral: float, tmp_path: Path
) -> None:
    kind = {bool: "BOOL", int: "UINT32", float: "FLOAT32"}[type(odd)]

    def file(name: str, value: float) -> Path:
        add = functools.partial(library.GGUFWriter.add_key_value, key=f"llama.{key}", val=value)
        return written(tmp_path / name, "llama", lambda writer: add(writer, vtype=library.GGUFValueType[kind]))

    gguf.read_config(file("neutral.gguf", neutral))
    with pytest.raises(WeightsError, match=rf"odd\.gguf: {re.escape(key)} is not supported \(got {odd}\)"):
        gguf.read_config(file("odd.gguf", odd))


def test_the_betas_of_a_yarn_of_others_are_read(tmp_path: Path) -> None:
    def yarn(writer: Any, **numbers: float) -> None:
        writer.add_rope_scaling_type(library.RopeScalingType.YARN)
        for name, value in ({"factor": 4.0} | numbers).items():
            writer.add_float32(f"llama.rope.scaling.{name}", value)

    def read(name: str, **numbers: float) -> object:
        return gguf.read_config(written(tmp_path / name, "llama", lambda w: yarn(w, **numbers))).rope.scaling

    assert read("a.gguf", yarn_ext_factor=1.0) == YarnScaling(factor=4.0, original_length=64), "its context"
    own = read("b.gguf", yarn_beta_fast=16.0, yarn_beta_slow=2.5)
    assert own == YarnScaling(factor=4.0, original_length=64, beta_fast=16.0, beta_slow=2.5)
    with pytest.raises(WeightsError, match="yarn_ext_factor is not supported"):
        read("c.gguf", yarn_ext_factor=0.0)
    with pytest.raises(WeightsError, match=r"d\.gguf: .*attention_factor: must be finite and over 0"):
        read("d.gguf", attn_factor=0.0)


def test_a_table_that_is_not_that_of_the_scaling_beside_it_is_refused(tmp_path: Path) -> None:
    file = export(random_model(replace(SHAPE, rope=YARN_TABLE)), tmp_path / "out")
    said, data = json.loads(facts(file)[fields.SCALING]), file.read_bytes()
    assert said == {"kind": "yarn", "factor": 4.0, "original_length": 16, "beta_fast": 2.0, "beta_slow": 1.0,
                    "attention_factor": 1.25}  # fmt: skip
    for old, new, message in (
        (b'"factor": 4.0', b'"factor": 9.0', r"rope_freqs\.weight is not that of what the file says"),
        (b'"attention_factor": 1.25', b'"attention_factor": 1.75', r"attn_factor must be 1\.75 for .* \(got 1\.25\)"),
        (b'"factor": 4.0', b'"factor": 4,0', "describes no model"),
    ):
        assert data.count(old) == 1
        file.write_bytes(data.replace(old, new))
        with pytest.raises(WeightsError, match=rf"out-f32\.gguf: .*{message}"):
            gguf.read_config(file)


def test_a_tensor_of_another_shape_is_named(tmp_path: Path) -> None:
    def odd(writer: Any) -> None:
        writer.add_tensor("blk.0.attn_q.bias", np.zeros(7, np.float32))

    with pytest.raises(WeightsError, match=r"blk\.0\.attn_q\.bias: is \(7,\), not \(8,\)"):
        gguf.open_weights(written(tmp_path / "a.gguf", "llama", odd))
