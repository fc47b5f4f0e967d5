"""Weight files that could be read in two ways."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from internlm.errors import WeightsError
from internlm.weights import files
from internlm.weights.pickles import open_bins

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def test_a_tensor_of_two_files_that_the_index_leaves_open_is_refused(tmp_path: Path) -> None:
    save_file({"x": torch.ones(2), "a": torch.ones(2)}, tmp_path / FIRST)
    save_file({"x": torch.zeros(2), "b": torch.ones(2)}, tmp_path / SECOND)
    where = {"a": FIRST, "b": SECOND}
    (tmp_path / files.INDEX).write_text(json.dumps({"weight_map": where}))
    with pytest.raises(WeightsError, match=rf"index\.json: does not say which x counts: {FIRST} and {SECOND} have one"):
        files.open_folder(tmp_path)
    for file, value in ((FIRST, 1.0), (SECOND, 0.0)):
        (tmp_path / files.INDEX).write_text(json.dumps({"weight_map": where | {"x": file}}))
        assert files.open_folder(tmp_path)["x"].read().tolist() == [value, value]


def test_a_view_of_no_elements_moves_no_other_tensor(tmp_path: Path) -> None:
    """Its storage is in the file all the same: places that were counted without it were one record too early."""
    tensors = {"none": torch.arange(1024.0)[:0], "a": torch.full((1024,), 1.0), "b": torch.full((1024,), 2.0)}
    torch.save(tensors, tmp_path / "x.bin")
    weights = open_bins([tmp_path / "x.bin"])[tmp_path / "x.bin"]
    assert weights["none"].place is None
    for name in ("a", "b"):
        assert weights[name].place is not None, "and they can still be copied as they lie"
        path, start = weights[name].place or (Path(), 0)
        assert np.array_equal(np.fromfile(path, np.float32, 1024, offset=start), tensors[name].numpy())
