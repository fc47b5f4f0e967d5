"""`internlm convert` from checkpoints and Transformers folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from internlm.checkpoint import listing
from internlm.cli import main
from internlm.cli.convert import QUANTIZED_TOLERANCE, TOLERANCE, size_in_bytes, verify
from internlm.errors import UsageError, WeightsError
from internlm.model.config import ModelConfig
from internlm.model.transformer import build
from internlm.source import Hints, open_source
from internlm.text.training import train_bpe
from internlm.weights import transformers as folders
from internlm.weights.families import translate as families
from internlm.weights.families.table import to_transformers
from internlm.weights.talk import read_talk
from internlm.weights.weight import of_tensors
from tests.models import save_checkpoint

SHAPE = ModelConfig(vocab_size=300, hidden_size=32, num_layers=2, num_heads=4, ffn_size=40, qkv_bias=True)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Return a run folder with two checkpoints."""
    tokenizer = train_bpe(["What is the sum of the numbers?"] * 3, 300)
    for step in (5, 10):
        tensors = {f"model.{name}": p.detach() for name, p in build(SHAPE, step).named_parameters()}
        meta = {"step": step, "template": "internlm"}
        save_checkpoint(tmp_path / "run" / "checkpoints" / listing.name_of(step), tensors, SHAPE, tokenizer, meta)
    return tmp_path / "run"


def test_a_run_becomes_a_verified_transformers_folder(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers")
    assert main(["convert", str(run), str(tmp_path / "out"), "--verify", "--max-shard", "20KB"]) == 0
    said = capsys.readouterr().out
    assert "verified" in said
    assert f"internlm chat {tmp_path / 'out'}" in said
    loaded = folders.load(tmp_path / "out")
    assert torch.equal(loaded.embedding.weight, build(SHAPE, 10).embedding.weight), "the newest checkpoint"
    assert read_talk(tmp_path / "out").template == "internlm"
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1


def test_a_folder_is_converted_again_with_another_dtype(run: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    assert main(["convert", str(run / "checkpoints" / listing.name_of(5)), str(tmp_path / "a")]) == 0
    assert main(["convert", str(tmp_path / "a"), str(tmp_path / "b"), "--dtype", "bfloat16", "--verify"]) == 0
    written = load_file(tmp_path / "b" / "model.safetensors")
    assert torch.equal(written["lm_head.weight"], build(SHAPE, 5).head.weight.to(torch.bfloat16))
    assert read_talk(tmp_path / "b").template == "internlm"


def test_an_existing_target_needs_force(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(run), str(tmp_path / "out")]) == 0
    assert main(["convert", str(run), str(tmp_path / "out")]) == 1
    assert "--force" in capsys.readouterr().err
    assert main(["convert", str(run), str(tmp_path / "out"), "--force", "--template", "none"]) == 0
    assert read_talk(tmp_path / "out").template is None


def test_a_format_that_is_chosen_takes_the_place_of_an_unknown_one(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    assert main(["convert", str(run), str(folder)]) == 0
    described = json.loads((folder / "tokenizer_config.json").read_text())
    described.pop("internlm_template")
    (folder / "tokenizer_config.json").write_text(json.dumps(described | {"chat_template": "{{ messages }}"}))
    assert open_source(folder).talk.foreign == "{{ messages }}"
    for name, template in (("none", None), ("internlm2", "internlm2")):
        talk = open_source(folder, Hints(template=name)).talk
        assert (talk.template, talk.foreign) == (template, None)


def test_verifying_finds_weights_under_the_wrong_name(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers")

    def swapped(name: str, *others: Any) -> str:
        return to_transformers(name.replace("wq", "w?").replace("wk", "wq").replace("w?", "wk"), *others)

    monkeypatch.setattr(families, "to_transformers", swapped)
    model = build(SHAPE, 10)
    folders.export(of_tensors(model.named_parameters()), SHAPE, tmp_path / "out")
    monkeypatch.undo()
    with pytest.raises(WeightsError, match="other logits"):
        verify(open_source(run), tmp_path / "out")


def test_what_fails_to_be_verified_is_not_there_and_takes_nothings_place(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers")
    out, beside = tmp_path / "out", tmp_path / "out.unverified"
    with monkeypatch.context() as patched:
        patched.setattr("internlm.cli.convert.TOLERANCE", -1.0)
        assert main(["convert", str(run), str(out), "--verify"]) == 1
        assert f"{beside / 'out'}: other logits come from it" in capsys.readouterr().err
        assert not out.exists()
        assert (beside / "out" / "config.json").exists(), "for who looks for the cause"
    assert main(["convert", str(run), str(out), "--template", "none"]) == 0
    with monkeypatch.context() as patched:
        patched.setattr("internlm.cli.convert.TOLERANCE", -1.0)
        assert main(["convert", str(run), str(out), "--verify", "--force"]) == 1
    assert read_talk(out).template is None, "the earlier result is untouched"
    assert main(["convert", str(run), str(out), "--verify"]) == 1
    assert main(["convert", str(run), str(out), "--verify", "--force"]) == 0
    assert read_talk(out).template == "internlm"
    assert not beside.exists()


@pytest.mark.parametrize("tolerance", [TOLERANCE, QUANTIZED_TOLERANCE])
def test_verifying_sees_other_weights_however_small_the_logits_are(tolerance: float, tmp_path: Path) -> None:
    for seed in range(2):
        model = build(SHAPE, seed)
        with torch.no_grad():
            model.head.weight.mul_(1e-4)
        folders.export(of_tensors(model.named_parameters()), SHAPE, tmp_path / str(seed))
    assert verify(open_source(tmp_path / "0"), tmp_path / "0", tolerance) <= tolerance
    with pytest.raises(WeightsError, match="other logits"):
        verify(open_source(tmp_path / "0"), tmp_path / "1", tolerance)


def test_what_is_no_model_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(tmp_path), str(tmp_path / "out")]) == 1
    assert "is no model" in capsys.readouterr().err


def test_sizes_are_read() -> None:
    assert size_in_bytes("5GB", "x") == 5 * 10**9
    assert size_in_bytes("1.5 MiB", "x") == 3 * 2**19
    for wrong in ("5", "GB", "-1GB", "0GB"):
        with pytest.raises(UsageError, match="is no size"):
            size_in_bytes(wrong, "x")
