"""`.bin` files: read lazily, one at a time, and never run."""

from __future__ import annotations

import gc
import json
import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from internlm.errors import WeightsError
from internlm.model.config import ModelConfig
from internlm.model.transformer import build
from internlm.weights import files, pickles
from internlm.weights import transformers as folders
from internlm.weights import weight as lazy
from internlm.weights.weight import of_tensors

SHAPE = ModelConfig(vocab_size=50, hidden_size=16, num_layers=3, num_heads=4, num_kv_heads=2, ffn_size=24)


def folder_of_bins(folder: Path, parts: int, **options: Any) -> Path:
    """Export a model, and put its weights into so many `.bin` files."""
    folders.export(of_tensors(build(SHAPE, 0).named_parameters()), SHAPE, folder)
    tensors = dict(lazy.tensors(files.open_folder(folder)))
    names = list(tensors)
    (folder / files.SINGLE).unlink()
    if parts == 1:
        torch.save(tensors, folder / files.BIN_SINGLE, **options)
        return folder
    where = {}
    for number in range(parts):
        file = f"pytorch_model-{number + 1:05d}-of-{parts:05d}.bin"
        held = OrderedDict((name, tensors[name].clone()) for name in names[number::parts])  # neighbours lie apart
        torch.save(held, folder / file, **options)
        where.update(dict.fromkeys(held, file))
    (folder / files.BIN_INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "before torch 1.6"])
def test_bin_files_have_the_weights_that_were_saved(parts: int, is_zip: bool, tmp_path: Path) -> None:
    folder = folder_of_bins(tmp_path / "a", parts, _use_new_zipfile_serialization=is_zip)
    loaded = folders.load(folder)
    for name, parameter in build(SHAPE, 0).named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter)


def test_tensors_are_mapped_and_one_file_is_open_at_a_time(tmp_path: Path) -> None:
    """Three files of 16 MB: what is held of them is never more than one, and none of it is read before it is asked."""
    paths = []
    for number in range(3):
        paths.append(tmp_path / f"{number}.bin")
        torch.save({f"{number}.{n}": torch.full((5, 4 * 10**5), float(n)) for n in range(2)}, paths[-1])

    def mapped() -> list[str]:
        return [line.split("/")[-1] for line in Path("/proc/self/maps").read_text().splitlines() if ".bin" in line]

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    gc.collect()
    gc.freeze()  # what a long session holds is not looked at again: that takes longer than the rest
    before = resident()
    opened = pickles.open_bins(paths)
    assert resident() - before < 10**7
    for _ in range(2):
        for path, weights in opened.items():
            for name, weight in weights.items():
                assert weight.shape == (5, 4 * 10**5)
                tensor = lazy.read(name, weight)
                assert tensor[4, -1] == float(name[-1])
                del tensor
                gc.collect()
                assert set(mapped()) == {path.name}
    gc.unfreeze()


class Hostile:
    """Pickles into a call of os.system."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (self.command,)


@pytest.mark.parametrize("form", ["zip", "before torch 1.6", "a bare pickle"])
def test_a_file_that_would_run_a_program_is_refused_and_runs_nothing(form: str, tmp_path: Path) -> None:
    folder = folder_of_bins(tmp_path / "a", 1)
    content = {"model.norm.weight": Hostile(f"touch {tmp_path}/ran")}
    with (folder / files.BIN_SINGLE).open("wb") as file:
        if form == "a bare pickle":
            pickle.dump(content, file, protocol=2)
        else:
            torch.save(content, file, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(
        WeightsError, match=r"pytorch_model\.bin: is not only tensors, and nothing in it was run"
    ) as said:
        folders.load(folder)
    assert not (tmp_path / "ran").exists()
    assert "weights_only=False" not in str(said.value), "no advice to run it all the same"
    with (folder / files.BIN_SINGLE).open("rb") as file:  # the trap works
        if form == "a bare pickle":
            pickle.load(file)
        else:
            torch.load(file, weights_only=False)
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ([torch.zeros(2)], r"holds no table of tensors \(got 'list'\)"),
        ({"a": {"b": torch.zeros(2)}}, "something else than named tensors"),
        ({1: torch.zeros(2)}, "something else than named tensors"),
        ({"a": torch.zeros(2, 2).to_sparse()}, "a tensor that is not plain"),
        ({"a": torch.zeros(2, dtype=torch.complex64)}, "a dtype that cannot be read"),
    ],
    ids=["list", "nested", "numbered", "sparse", "complex"],
)
def test_what_is_no_table_of_plain_tensors_is_refused(content: Any, match: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / files.BIN_SINGLE)
    with pytest.raises(WeightsError, match=match):
        files.open_folder(tmp_path)


@pytest.mark.parametrize("kept", [0, 3, 100, 5000])
def test_a_file_that_was_cut_off_is_named(kept: int, tmp_path: Path) -> None:
    folder = folder_of_bins(tmp_path / "a", 1)
    data = (folder / files.BIN_SINGLE).read_bytes()
    (folder / files.BIN_SINGLE).write_bytes(data[:kept])
    with pytest.raises(WeightsError, match=r"pytorch_model\.bin: "):
        folders.load(folder)


@pytest.mark.parametrize("change", ["compressed", "of another byte order"])
@pytest.mark.parametrize("opened", [files.open_folder, pickles.load])
def test_an_archive_that_torch_would_not_write_here_is_refused(
    opened: Callable[[Path], Any], change: str, tmp_path: Path
) -> None:
    path = tmp_path / files.BIN_SINGLE
    torch.save({"x": torch.zeros(10**5)}, tmp_path / "good")
    way = zipfile.ZIP_DEFLATED if change == "compressed" else zipfile.ZIP_STORED
    with zipfile.ZipFile(tmp_path / "good") as good, zipfile.ZipFile(path, "w", way) as archive:
        for name in good.namelist():
            is_order = name.endswith("/byteorder") and change != "compressed"
            archive.writestr(name, b"big" if is_order else good.read(name))
    with pytest.raises(WeightsError, match=change):
        opened(tmp_path if opened is files.open_folder else path)


def test_a_file_of_the_index_that_is_missing_is_named(tmp_path: Path) -> None:
    folder = folder_of_bins(tmp_path / "a", 3)
    (folder / "pytorch_model-00002-of-00003.bin").unlink()
    with pytest.raises(WeightsError, match=r"pytorch_model-00002-of-00003\.bin: cannot be read"):
        folders.load(folder)


def test_safetensors_are_preferred(tmp_path: Path) -> None:
    folder = folder_of_bins(tmp_path / "a", 3)
    folders.export(of_tensors(build(SHAPE, 1).named_parameters()), SHAPE, tmp_path / "b")
    (tmp_path / "b" / files.SINGLE).rename(folder / files.SINGLE)
    assert torch.equal(folders.load(folder).norm.weight, build(SHAPE, 1).norm.weight)
    assert torch.equal(folders.load(folder).embedding.weight, build(SHAPE, 1).embedding.weight)


def test_weights_that_share_their_memory_are_read_apart(tmp_path: Path) -> None:
    whole = torch.arange(12.0).reshape(3, 4)
    torch.save({"rows": whole[1:], "turned": whole.T}, tmp_path / files.BIN_SINGLE)
    opened = files.open_folder(tmp_path)
    assert torch.equal(lazy.read("rows", opened["rows"]), whole[1:])
    assert torch.equal(lazy.read("turned", opened["turned"]), whole.T)
