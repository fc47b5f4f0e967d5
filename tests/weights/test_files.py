"""Weight files: written as a stream, continued after an interruption, hashed on the way."""

from __future__ import annotations

import errno
import functools
import json
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from internlm import disk, storage
from internlm.errors import StorageError, WeightsError
from internlm.model.config import ModelConfig
from internlm.model.transformer import build
from internlm.weights import files
from internlm.weights import transformers as folders
from internlm.weights import weight as lazy
from internlm.weights.transformers import ExportOptions
from internlm.weights.weight import Weight, Weights, of_tensors
from tests.processes import CONTEXT

SHAPE = ModelConfig(vocab_size=50, hidden_size=16, num_layers=3, num_heads=4, num_kv_heads=2, ffn_size=24)
SMALL_FILES = ExportOptions(max_shard_bytes=4000, resume="the same source")


def weights_of(seed: int = 0) -> Weights:
    return of_tensors(build(SHAPE, seed).named_parameters())


class Interrupted:
    """Weights whose reading is counted, and raises after so many."""

    def __init__(self, after: int, error: BaseException) -> None:
        self.after, self.error, self.names = after, error, list[str]()
        self.weights = {
            name: replace(weight, read=functools.partial(self._read, name, weight))
            for name, weight in weights_of().items()
        }

    def _read(self, name: str, weight: Weight) -> Tensor:
        if len(self.names) == self.after:
            raise self.error
        self.names.append(name)
        return weight.read()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("dtype", list(files.NAMES))
def test_the_library_reads_what_we_write_and_we_what_it_writes(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {
        "a": (torch.arange(6).reshape(2, 3) % 5).to(dtype),
        "empty": torch.zeros(0, 4, dtype=dtype),
        "b.scalar": torch.tensor(1).to(dtype),
        "turned": torch.arange(12).reshape(3, 4).to(dtype).T,
    }
    with storage.writing(tmp_path / "out", "export") as folder:
        files.write(folder, of_tensors(tensors.items()), 10**6, lambda done: None)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "library.safetensors")
    ours, theirs = load_file(tmp_path / "out" / files.SINGLE), files.open_safetensors(tmp_path / "library.safetensors")
    for name, tensor in tensors.items():
        assert torch.equal(ours[name].float(), tensor.float())
        assert ours[name].dtype == theirs[name].dtype == dtype
        assert theirs[name].shape == tuple(tensor.shape)
        assert torch.equal(lazy.read(name, theirs[name]).float(), tensor.float())


def test_the_manifest_has_the_hashes_of_the_files(tmp_path: Path) -> None:
    folders.export(weights_of(), SHAPE, tmp_path / "out", options=SMALL_FILES)
    manifest = json.loads((tmp_path / "out" / storage.MANIFEST).read_text())
    assert len([name for name in manifest["files"] if name.endswith("safetensors")]) > 3
    for name, facts in manifest["files"].items():
        assert facts["sha256"] == disk.sha256(tmp_path / "out" / name)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), StorageError("the disk is full")])
def test_an_interrupted_export_goes_on_where_it_was(error: BaseException, tmp_path: Path) -> None:
    folders.export(weights_of(), SHAPE, tmp_path / "whole", options=SMALL_FILES)
    first = Interrupted(20, error)
    with pytest.raises(type(error)):
        folders.export(first.weights, SHAPE, tmp_path / "out", options=SMALL_FILES)
    assert not (tmp_path / "out").exists()
    second = Interrupted(10**6, error)
    folders.export(second.weights, SHAPE, tmp_path / "out", options=SMALL_FILES)
    again = set(first.names) & set(second.names)
    assert len(again) < 4, "only the file that was not finished is written again"
    assert set(first.names) | set(second.names) == set(weights_of())
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert {path.name for path in tmp_path.iterdir()} == {"out", "whole"}


def test_what_lies_there_already_needs_no_room_a_second_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    total = sum(weight.nbytes for weight in weights_of().values())
    free = total + 2000  # bytes

    def usage(path: Path) -> SimpleNamespace:
        used = sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file())
        return SimpleNamespace(free=free - used)

    monkeypatch.setattr("shutil.disk_usage", usage)
    with pytest.raises(KeyboardInterrupt):
        folders.export(Interrupted(20, KeyboardInterrupt()).weights, SHAPE, tmp_path / "out", options=SMALL_FILES)
    assert usage(tmp_path).free < total
    folders.export(weights_of(), SHAPE, tmp_path / "out", options=SMALL_FILES)
    with pytest.raises(StorageError, match="needs"):
        folders.export(weights_of(), SHAPE, tmp_path / "more", options=SMALL_FILES)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def export_and_die(out: Path) -> None:
    weights, name = weights_of(), list(weights_of())[20]
    weights[name] = replace(weights[name], read=lambda: os.kill(os.getpid(), signal.SIGKILL))  # type: ignore[arg-type,return-value]
    folders.export(weights, SHAPE, out, options=SMALL_FILES)


def test_an_export_that_was_killed_goes_on(tmp_path: Path) -> None:
    """The process dies as by `kill -9` while it reads its twentieth tensor."""
    killed = CONTEXT.Process(target=export_and_die, args=(tmp_path / "out",))
    killed.start()
    killed.join(120)
    assert killed.exitcode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    second = Interrupted(10**6, KeyboardInterrupt())
    folders.export(second.weights, SHAPE, tmp_path / "out", options=SMALL_FILES)
    assert 0 < len(second.names) < len(weights_of()) - 10
    folders.export(weights_of(), SHAPE, tmp_path / "whole", options=SMALL_FILES)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_disk_that_fails_behind_the_writing_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(descriptor: int, content: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("os.write", fails)
    with pytest.raises(StorageError, match="Input/output error"):
        folders.export(weights_of(), SHAPE, tmp_path / "out", options=SMALL_FILES)
    assert not (tmp_path / "out").exists()


def test_what_another_source_left_is_not_used(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        folders.export(Interrupted(20, KeyboardInterrupt()).weights, SHAPE, tmp_path / "out", options=SMALL_FILES)
    other = weights_of(seed=1)
    folders.export(other, SHAPE, tmp_path / "out", options=replace(SMALL_FILES, resume="another source"))
    for name, tensor in lazy.tensors(folders.open_weights(tmp_path / "out")):
        assert torch.equal(tensor, other[name].read())
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_two_that_write_the_same_are_kept_apart(tmp_path: Path) -> None:
    def meanwhile() -> Tensor:
        with pytest.raises(StorageError, match="another process"):
            folders.export(weights_of(), SHAPE, tmp_path / "out", options=SMALL_FILES)
        return weights_of()["norm.weight"].read()

    weights = weights_of()
    weights["norm.weight"] = replace(weights["norm.weight"], read=meanwhile)
    folders.export(weights, SHAPE, tmp_path / "out", options=SMALL_FILES)
    assert torch.equal(folders.load(tmp_path / "out").norm.weight, weights_of()["norm.weight"].read())


def test_a_source_that_changes_under_the_reader_is_noticed(tmp_path: Path) -> None:
    weights = weights_of()
    weights["norm.weight"] = replace(weights["norm.weight"], read=lambda: torch.ones(17))
    with pytest.raises(WeightsError, match=r"model\.norm\.weight: was announced as \(16,\)"):
        folders.export(weights, SHAPE, tmp_path / "out", options=SMALL_FILES)
    assert list(tmp_path.iterdir()) == []


def test_a_tensor_that_the_index_leaves_out_is_not_lost_without_a_word(tmp_path: Path) -> None:
    folders.export(weights_of(), SHAPE, tmp_path / "out", options=SMALL_FILES)
    path = tmp_path / "out" / files.INDEX
    index = json.loads(path.read_text())
    file = index["weight_map"].pop("model.norm.weight")
    path.write_text(json.dumps(index))
    assert folders.load(tmp_path / "out").norm.weight.numel() == SHAPE.hidden_size
    tensors = load_file(tmp_path / "out" / file)
    save_file(tensors | {"model.layers.0.more.weight": torch.ones(2)}, tmp_path / "out" / file)
    with pytest.raises(WeightsError, match="more"):
        folders.load(tmp_path / "out")


@pytest.mark.parametrize("way", ["../elsewhere/", "/"])
def test_an_index_that_leads_out_of_its_folder_is_refused(way: str, tmp_path: Path) -> None:
    folders.export(weights_of(), SHAPE, tmp_path / "out", options=SMALL_FILES)
    (tmp_path / "out").rename(tmp_path / "elsewhere")
    (tmp_path / "out").mkdir()
    index = (tmp_path / "elsewhere" / files.INDEX).read_text()
    prefix = way if way != "/" else f"{tmp_path / 'elsewhere'}/"
    (tmp_path / "out" / files.INDEX).write_text(index.replace('"model-', f'"{prefix}model-'))
    with pytest.raises(WeightsError, match="outside of its folder"):
        files.open_folder(tmp_path / "out")


def test_one_file_goes_before_an_index_as_in_transformers(tmp_path: Path) -> None:
    folders.export(weights_of(0), SHAPE, tmp_path / "out", options=SMALL_FILES)
    folders.export(weights_of(1), SHAPE, tmp_path / "one")
    (tmp_path / "one" / files.SINGLE).rename(tmp_path / "out" / files.SINGLE)
    name = "model.embed_tokens.weight"
    opened = files.open_folder(tmp_path / "out")
    assert torch.equal(opened[name].read(), weights_of(1)["embedding.weight"].read())
    assert not torch.equal(opened[name].read(), weights_of(0)["embedding.weight"].read())


def test_an_index_that_lies_is_named(tmp_path: Path) -> None:
    folders.export(weights_of(), SHAPE, tmp_path / "out", options=SMALL_FILES)
    index = json.loads((tmp_path / "out" / files.INDEX).read_text())
    good = (tmp_path / "out" / files.INDEX).read_text()
    index["weight_map"]["model.norm.weight"] = index["weight_map"]["model.embed_tokens.weight"]
    (tmp_path / "out" / files.INDEX).write_text(json.dumps(index))
    with pytest.raises(WeightsError, match=r"has no tensor model\.norm\.weight"):
        folders.load(tmp_path / "out")
    (tmp_path / "out" / files.INDEX).write_text(good.replace("model-00002", "model-00009"))
    with pytest.raises(WeightsError, match="model-00009"):
        folders.load(tmp_path / "out")


def odd_values() -> Iterator[Tensor]:
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        for value in (float("nan"), float("inf"), -float("inf")):
            tensor = torch.zeros(1000, dtype=dtype)
            tensor[777] = value
            yield tensor


def test_one_value_that_is_not_finite_is_found_among_many() -> None:
    assert not any(files.is_finite(tensor) for tensor in odd_values())
    assert files.is_finite(torch.full((1000,), torch.finfo(torch.bfloat16).max, dtype=torch.bfloat16))
    assert files.is_finite(torch.zeros(0))


def test_pieces_of_one_weight_read_it_once() -> None:
    reads = 0

    def read() -> Tensor:
        nonlocal reads
        reads += 1
        return torch.arange(12.0).reshape(3, 4)

    whole = lazy.shared(Weight((3, 4), torch.float32, read), 3)
    pieces = [whole.turned((4,), lambda t, n=n: t[n]) for n in range(3)]
    for _ in range(2):
        assert torch.equal(torch.stack([piece.read() for piece in pieces]), torch.arange(12.0).reshape(3, 4))
    assert reads == 2, "once per round"


def test_the_table_folds_layers_into_one_line() -> None:
    rows = lazy.table({f"blocks.{n}.x": Weight((2, 3), torch.bfloat16, torch.zeros, f"layers.{n}.y") for n in range(5)})
    assert rows == ["layers.{i}.y → blocks.{i}.x  bfloat16 [2, 3] × 5"]
