"""The files of a checkpoint: pieces that any layout can read, and nothing that is not what the index says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from internlm.checkpoint import pieces
from internlm.checkpoint.pieces import Entry, Piece
from internlm.errors import StorageError
from internlm.model.config import ModelConfig
from tests.models import save_checkpoint

SHAPE = ModelConfig(vocab_size=8, hidden_size=8, num_layers=1, num_heads=1, ffn_size=8)
TENSORS = {
    "model.a": torch.arange(24, dtype=torch.float32).view(4, 6),
    "model.b": torch.arange(5, dtype=torch.bfloat16),
    "optim.step": torch.tensor(7.0),
    "optim.count": torch.tensor([2**40, -1]),
    "random.cpu": torch.arange(11, dtype=torch.uint8),
    "none": torch.empty(0, 3),
}


def saved(folder: Path) -> Path:
    save_checkpoint(folder / "step-00000001", TENSORS, SHAPE, None, {"step": 1})
    return folder / "step-00000001"


def test_what_one_rank_writes_are_plain_safetensors_files_of_the_model_and_of_the_rest(tmp_path: Path) -> None:
    folder = saved(tmp_path) / pieces.FOLDER
    model, state = (load_file(folder / f"{kind}-00000.safetensors") for kind in ("model", "state"))
    assert len(list(folder.iterdir())) == 2
    assert model.keys() == {"model.a", "model.b"}
    found = model | state
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def test_every_tensor_is_read_back_bitwise(tmp_path: Path) -> None:
    path = saved(tmp_path)
    index = pieces.read_index(path)
    for name, tensor in TENSORS.items():
        assert torch.equal(pieces.read(path, index[name]), tensor), name


def in_three_pieces(folder: Path) -> tuple[torch.Tensor, Entry]:
    whole = torch.arange(24, dtype=torch.float32).view(4, 6)
    parts = [(0, 0, whole[:2, :4]), (0, 4, whole[:2, 4:]), (2, 0, whole[2:])]
    found, start = [], 0
    with (folder / "f").open("wb") as file:
        for row, column, part in parts:
            file.write(part.contiguous().numpy().tobytes())
            found.append(Piece("f", start, (row, column), tuple(part.shape)))
            start += part.numel() * 4
    return whole, Entry(torch.float32, (4, 6), tuple(found))


def test_a_tensor_is_put_together_from_its_pieces(tmp_path: Path) -> None:
    whole, entry = in_three_pieces(tmp_path)
    assert torch.equal(pieces.read(tmp_path, entry), whole)


@pytest.mark.parametrize(
    ("begin", "shape"), [((0, 0), (4, 6)), ((1, 2), (2, 3)), ((3, 1), (1, 5)), ((0, 4), (2, 2)), ((4, 0), (0, 6))]
)
def test_a_part_of_a_tensor_is_put_together_from_the_pieces_it_lies_in(
    begin: tuple[int, int], shape: tuple[int, int], tmp_path: Path
) -> None:
    whole, entry = in_three_pieces(tmp_path)
    part = torch.full(shape, -1.0)
    pieces.fill(part, begin, tmp_path, entry)
    (row, column), (rows, columns) = begin, shape
    assert torch.equal(part, whole[row : row + rows, column : column + columns])


def test_rows_of_a_piece_are_read_alone(tmp_path: Path) -> None:
    """As a rank of another layout does."""
    path = saved(tmp_path)
    index = pieces.read_index(path)
    for name in ("model.a", "model.b", "optim.count"):
        (piece,) = index[name].pieces
        found = pieces._read_piece(path, piece, index[name].dtype, slice(1, 2))
        assert torch.equal(found, TENSORS[name][1:2]), name


def test_an_index_is_read_as_it_was_written(tmp_path: Path) -> None:
    index = {
        "x": Entry(torch.float32, (2, 2), (Piece("a", 8, (0, 0), (1, 2)), Piece("b", 0, (1, 0), (1, 2)))),
        "scalar": Entry(torch.int64, (), (Piece("a", 0, (), ()),)),
    }
    (tmp_path / pieces.INDEX).write_text(pieces.dump(index))
    assert pieces.read_index(tmp_path) == index


def change(index: dict[str, Any], **facts: Any) -> None:
    index["model.a"]["pieces"][0].update(facts)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda index: change(index, file="../../etc/passwd"), "outside of the folder"),
        (lambda index: change(index, file="/etc/passwd"), "outside of the folder"),
        (lambda index: change(index, offsets=[1, 0]), "lies outside of"),
        (lambda index: change(index, offsets=[0]), "lies outside of"),
        (lambda index: change(index, shape=[4, -6]), "no sizes"),
        (lambda index: change(index, start="0"), "no sizes"),
        (lambda index: change(index, shape=[4, 5]), "has 24 values, its pieces 20"),
        (lambda index: index["model.a"].update(dtype="F128"), "F128"),
        (lambda index: index["model.a"].pop("shape"), "shape"),
        (lambda index: index.update(other=3), "cannot be read"),
    ],
)
def test_an_index_that_says_what_cannot_be_is_refused(tmp_path: Path, damage: Any, message: str) -> None:
    path = saved(tmp_path) / pieces.INDEX
    index = json.loads(path.read_text())
    damage(index)
    path.write_text(json.dumps(index))
    with pytest.raises(StorageError, match=message):
        pieces.read_index(path.parent)


def test_a_file_that_ends_too_early_is_said(tmp_path: Path) -> None:
    path = saved(tmp_path)
    file = path / pieces.file_of("model.b", 0)
    file.write_bytes(file.read_bytes()[:-8])
    last = pieces.read_index(path)["model.b"]
    with pytest.raises(StorageError, match=r"ends \d+ bytes too early"):
        pieces.read(path, last)
