"""A model that is packed while it is read: the same model, refused as before, in the memory of its packed weights."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from internlm.cli import main, serve
from internlm.errors import EngineError, WeightsError
from internlm.infer.engine import Engine
from internlm.infer.placement import Placement
from internlm.model import lora
from internlm.model.config import ExpertsConfig, ModelConfig
from internlm.model.quant import KINDS, Kind, PackedLinear
from internlm.model.transformer import Transformer, build, empty
from internlm.source import Source, open_source
from internlm.text.training import train_bpe
from internlm.weights import adapters, files, load
from internlm.weights import transformers as folders
from internlm.weights.load import fill, read_model
from internlm.weights.talk import Talk
from internlm.weights.transformers import ExportOptions
from internlm.weights.weight import Weights, of_tensors
from tests.models import pack, save_checkpoint

SHAPE = ModelConfig(
    vocab_size=300, hidden_size=64, num_layers=3, num_heads=4, num_kv_heads=2, ffn_size=256, qkv_bias=True
)
SHAPES = {
    "plain": SHAPE,
    "tied": replace(SHAPE, tie_embeddings=True),
    "norms": replace(SHAPE, qk_norm=True, qkv_bias=False),
    "experts": replace(SHAPE, experts=ExpertsConfig(count=4), qkv_bias=False),
}
IDS = torch.arange(30)[None]


def model_of(shape: ModelConfig) -> Transformer:
    """A model all of whose weights, norms and biases too, are random."""
    model = build(shape, 0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model


def assert_same(made: Transformer, wanted: Transformer) -> None:
    """Check that two packed models are the same, bit by bit."""
    own, others = dict(made.named_parameters()), dict(wanted.named_parameters())
    assert own.keys() == others.keys()
    assert all(torch.equal(own[name], others[name]) for name in own)
    assert not any(parameter.requires_grad for parameter in own.values())
    kinds, theirs = ([type(m) for m in model.modules() if isinstance(m, PackedLinear)] for model in (made, wanted))
    assert kinds == theirs
    with torch.inference_mode():
        assert torch.equal(made.head.logits(made(IDS)), wanted.head.logits(wanted(IDS)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a Transformers folder in small files, in which blocks are parted."""
    out = tmp_path_factory.mktemp("packed") / "folder"
    talk = Talk(train_bpe(["What is the sum of the numbers?"] * 3, 300), "internlm")
    small = ExportOptions(max_shard_bytes=50_000)
    folders.export(of_tensors(model_of(SHAPE).named_parameters()), SHAPE, out, talk, small)
    assert len(list(out.glob("*.safetensors"))) > 3
    return out


def converted(*options: str) -> object:
    def make(folder: Path, out: Path) -> None:
        if "gguf" in options:
            pytest.importorskip("gguf")
        assert main(["convert", str(folder), str(out), *options]) == 0

    return make


def as_bins(folder: Path, out: Path) -> None:
    """Write `.bin` files of which each has every second weight: all blocks are parted."""
    out.mkdir()
    weights = {name: weight.read() for name, weight in files.open_folder(folder).items()}
    where = {name: f"pytorch_model-{i % 2}.bin" for i, name in enumerate(sorted(weights))}
    for file in set(where.values()):
        torch.save({name: weights[name].clone() for name in weights if where[name] == file}, out / file)
    (out / files.BIN_INDEX).write_text(json.dumps({"weight_map": where}))
    (out / "config.json").write_bytes((folder / "config.json").read_bytes())


def as_checkpoint(folder: Path, out: Path) -> None:
    tensors = {f"model.{name}": tensor.clone() for name, tensor in open_source(folder).tensors()}
    save_checkpoint(out, tensors, open_source(folder).config, None, {"step": 1})


def as_adapter(folder: Path, out: Path) -> None:
    model = open_source(folder).model()
    chosen = lora.LoraConfig(rank=4, targets=("blocks.*.attention.w[qv]", "blocks.1.feed_forward.w_down"))
    lora.apply_lora(model, chosen)
    with torch.no_grad():
        for parameter in lora.lora_parameters(model).values():
            parameter.normal_(0, 0.1)
    adapters.export(adapters.of_model(model, chosen, base=str(folder)), out)


@pytest.mark.parametrize(
    "make",
    [
        converted("--dtype", "bfloat16"),
        converted("--to", "internlm2"),
        converted("--to", "internlm-v0.2", "--tensor", "2", "--pipeline", "3"),
        converted("--to", "gguf", "--quantize", "q8_0"),
        as_bins,
        as_checkpoint,
        as_adapter,
    ],
    ids=["bf16", "internlm2", "internlm-v0.2", "gguf", "bins", "checkpoint", "adapter"],
)
def test_packed_while_it_is_read_every_source_gives_what_packing_the_whole_model_gives(
    make: object, folder: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    make(folder, tmp_path / "step-00000001")  # type: ignore[operator]
    source = open_source(tmp_path / "step-00000001")
    proof = request.config.getoption("--proof")
    for kind in KINDS if proof else ("fp16", "int8"):  # every kind is tried with a stream in any order
        whole = source.model(torch.float32)
        pack(whole, kind)
        assert_same(source.model(torch.float32, pack=kind), whole)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        pytest.param(
            dtype, name, marks=[pytest.mark.proof] * (dtype == torch.bfloat16 and name in ("norms", "experts"))
        )
        for dtype, name in itertools.product([torch.float32, torch.bfloat16], SHAPES)
    ],
)
def test_a_stream_in_any_order_is_packed_to_the_same_model(name: str, kind: Kind, dtype: torch.dtype) -> None:
    whole = model_of(SHAPES[name]).to(dtype)
    stream = [(key, tensor.detach().clone()) for key, tensor in whole.named_parameters()]
    if whole.config.tie_embeddings:
        whole.tie()
        stream.append(("head.weight", whole.head.weight.detach().clone()))
    random.Random(1).shuffle(stream)
    made = empty(whole.config)
    fill(made, stream, kind)
    pack(whole, kind)
    assert_same(made, whole)


def without_values(weights: Weights, read: list[str]) -> Weights:
    """Return weights that say who was read."""

    def note(name: str) -> Tensor:
        read.append(name)
        return torch.zeros(weights[name].shape)

    return {name: replace(weight, read=partial(note, name)) for name, weight in weights.items()}


@pytest.mark.parametrize("pack", [None, "fp16"])
def test_weights_of_another_model_are_refused_before_one_is_read(pack: Kind | None) -> None:
    good, read = of_tensors(model_of(SHAPE).named_parameters()), list[str]()
    wrong = dict(good, **{"blocks.3.attention.wq.weight": good["norm.weight"], "norm.weight": good["head.weight"]})
    del wrong["blocks.2.attention.wo.weight"]
    with pytest.raises(WeightsError, match=r"norm\.weight is \(300, 64\).*wq\.weight is left over.*wo\.weight is miss"):
        read_model(SHAPE, without_values(wrong, read), pack=pack)
    assert read == []
    with pytest.raises(WeightsError, match="came as"):
        read_model(SHAPE, {n: replace(w, read=lambda: torch.zeros(2)) for n, w in good.items()}, pack=pack)


def test_a_stream_that_does_not_fit_is_refused_when_some_of_it_is_packed() -> None:
    stream = list(model_of(SHAPE).named_parameters())
    for given, problem in (
        (stream[:-1], "head.weight is missing"),
        ([*stream, stream[5]], "came twice"),
        ([*stream[:9], (stream[9][0], torch.zeros(1)), *stream[10:]], r"is \(1,\), not"),
        ([*stream, ("blocks.0.attention.wqkv.weight", torch.zeros(1))], "left over"),
    ):
        with pytest.raises(WeightsError, match=problem):
            fill(empty(SHAPE), given, "int8")


def test_a_kind_that_is_not_known_and_a_device_that_cannot_are_errors(folder: Path) -> None:
    with pytest.raises(EngineError, match="allowed: split, fp32, fp16, bf16, int8"):
        open_source(folder).model(pack="int3")  # type: ignore[arg-type]
    with pytest.raises(EngineError, match=r"for the CPU \(got 'meta'\)"):
        open_source(folder).model(device="meta", pack="fp16")


def test_the_weights_of_a_block_are_read_together_however_they_lie() -> None:
    good, read = of_tensors(model_of(SHAPE).named_parameters()), list[str]()
    read_model(SHAPE, dict(sorted(without_values(good, read).items(), key=lambda item: item[0][::-1])), pack="fp32")
    blocks = [name.split(".")[1] for name in read if name.startswith("blocks")]
    assert blocks == sorted(blocks)
    assert len(read) == len(good)


@pytest.mark.parametrize("kind", [pytest.param(k, marks=[pytest.mark.proof] * (k in ("fp32", "bf16"))) for k in KINDS])
def test_an_engine_answers_the_same_with_a_model_that_was_packed_while_it_was_read(kind: Kind, folder: Path) -> None:
    prompts = [list(range(n)) for n in (3, 40, 17)]
    source = open_source(folder)
    whole = Engine(source.model(torch.float32), source.talk.tokenizer, pack=kind)
    wanted = [r.tokens for r in whole.generate(prompts, max_tokens=12, temperature=0)]
    read = Engine(source.model(torch.float32, pack=kind), source.talk.tokenizer, pack=kind)
    assert [r.tokens for r in read.generate(prompts, max_tokens=12, temperature=0)] == wanted
    of_folder = Engine.of(open_source(folder), Placement(pack=kind))
    assert [r.tokens for r in of_folder.generate(prompts, max_tokens=12, temperature=0)] == wanted
    other = build(source.config, 7)
    for engine in (whole, read):
        engine.load(other.named_parameters())
    after = [[r.tokens for r in e.generate(prompts, max_tokens=12, temperature=0)] for e in (whole, read)]
    assert after[0] == after[1] != wanted


def test_an_engine_must_know_how_its_model_is_packed(folder: Path) -> None:
    with pytest.raises(EngineError, match="pack: the model is packed"):
        Engine(open_source(folder).model(torch.float32, pack="fp16"))


def test_chat_and_serve_pack_while_they_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[object, ...]] = []
    model = Source.model

    def note(source: Source, *given: object) -> Transformer:
        asked.append(given)
        return model(source, *given)  # type: ignore[arg-type]

    monkeypatch.setattr(Source, "model", note)
    assert main(["chat", str(folder), "-p", "sum?", "--max-tokens", "2", "--pack", "int8"]) == 0
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    arguments = parser.parse_args([str(folder), "--pack", "fp16"])
    arguments.model = str(folder)
    assert serve._open(arguments).engine.pack == "fp16"
    assert asked == [(torch.float32, "cpu", "int8"), (torch.float32, "cpu", "fp16")]


_WEIGH = """
import json, sys, threading, time
from pathlib import Path
import torch
from internlm.compat import kernels
from internlm.source import open_source

def held():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

def watch():
    while watching:
        peaks.append(held())
        time.sleep(0.001)

torch.set_num_threads(1)
for probe in (kernels.has_packed_onednn_linear, kernels.has_fp16_linear, kernels.has_int8_linear):
    probe()
found = {}
for path, kind in zip(sys.argv[1::2], sys.argv[2::2]):
    source = open_source(path)
    list(source.weights())  # imports
    before, peaks, watching = held(), [], True
    watcher = threading.Thread(target=watch)
    watcher.start()
    model = source.model(torch.float32, pack=kind)
    watching = False
    watcher.join()
    found[path] = [max(peaks) - before, held() - before, 'torch._dynamo' in sys.modules]
    del model
print(json.dumps(found))
"""

# fbgemm fills the inputs of fp16 weights up to multiples of 512: here nothing is.
LARGE = ModelConfig(vocab_size=2048, hidden_size=1024, num_layers=6, num_heads=8, ffn_size=1024)
"""96 MB in bf16, 193 MB in fp32."""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_memory_is_that_of_the_packed_weights_and_of_one_block(tmp_path: Path) -> None:
    shared = torch.randn(LARGE.vocab_size * LARGE.hidden_size).bfloat16()
    tensors = {name: shared[: shape.numel()].view(shape) for name, shape in load.shapes(LARGE).items()}
    folders.export(of_tensors(tensors.items()), LARGE, tmp_path / "folder")
    save_checkpoint(tmp_path / "step-1", {f"model.{name}": t for name, t in tensors.items()}, LARGE, None, {"step": 1})
    cases: list[tuple[str, str, int]] = [("folder", "fp16", 2), ("step-1", "int8", 1)]
    words = [word for name, kind, _ in cases for word in (str(tmp_path / name), kind)]
    # Large blocks then go back to the system at once, and what is held is what is used.
    environment = os.environ | {"GLIBC_TUNABLES": "", "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    ran = subprocess.run([sys.executable, "-c", _WEIGH, *words], env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    assert found[str(tmp_path / "folder")][2] is False, "torch's compiler was loaded: 1 s and 150 MB for nothing"
    table, block = 4 * LARGE.embedding_parameters, 4 * LARGE.block_parameters
    for name, kind, width in cases:
        packed = table + LARGE.matmul_parameters * width
        most, after, _ = found[str(tmp_path / name)]
        assert 0.95 * packed < after < packed + 16e6, (kind, after)
        # A block's weights, and gate and up once more as one matrix.
        assert most < packed + 2 * block + 16e6 < 4 * LARGE.num_parameters, (kind, most)
