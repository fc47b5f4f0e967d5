"""Pickles of strangers build tensors and plain containers, and run nothing."""

from __future__ import annotations

import io
import os
import pickle
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

from internlm import disk
from internlm.errors import WeightsError
from internlm.weights.native import read as native
from internlm.weights.pickles import load
from tests.weights.old_layout import Config, ParallelMode, framework


class Call:
    """Pickles as a call."""

    def __init__(self, function: Any, *values: object) -> None:
        self.function, self.values = function, values

    def __reduce__(self) -> tuple[Any, ...]:
        return self.function, self.values


def save(path: Path, content: object, protocol: int = 2) -> Path:
    torch.save(content, path, pickle_protocol=protocol)
    return path


def handmade(path: Path, program: bytes) -> Path:
    """Write a file of torch.save with a pickle of one's own."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", program)
        archive.writestr("archive/byteorder", "little")
        archive.writestr("archive/version", "3\n")
    return path


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize(
    ("function", "name"), [(os.system, "posix.system|nt.system"), (eval, "builtins.eval"), (exec, "builtins.exec")]
)
def test_a_pickle_that_would_run_something_is_refused(function: Any, name: str, protocol: int, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    code = f"touch {mark}" if function is os.system else f"open({str(mark)!r}, 'w')"
    path = save(tmp_path / "model_tp0_pp0.pt", {"a": torch.zeros(2), "b": Call(function, code)}, protocol)
    with pytest.raises(WeightsError, match=name if protocol == 2 else "cannot be read"):
        load(path)
    (tmp_path / "1.step").touch()
    with pytest.raises(WeightsError):
        native.open_checkpoint(tmp_path)
    assert not mark.exists()
    pickle.loads(pickle.dumps(Call(function, code)))  # it would have
    assert mark.exists()


@pytest.mark.parametrize(
    "name", ["os.system", "os system", "posix.system", "sys.exit", "builtins.getattr", "nt.system"]
)
def test_names_written_by_hand_are_refused(name: str, tmp_path: Path) -> None:
    module, _, function = name.replace(" ", ".").rpartition(".")
    mark = tmp_path / "ran"
    program = f"c{module}\n{function}\nX".encode() + len(text := f"touch {mark}".encode()).to_bytes(4, "little") + text
    path = handmade(tmp_path / "a.pt", b"\x80\x02" + program + b"\x85R.")
    with pytest.raises(WeightsError, match=f"{module}.{function}"):
        load(path)
    assert not mark.exists()


def test_names_of_the_framework_are_inert_even_where_we_have_such_a_function(tmp_path: Path) -> None:
    # `internlm.storage.write_text` exists here; in a file it stands for nothing.
    path = save(tmp_path / "a.pt", {"b": Call(disk.write_text, str(tmp_path / "ran"), "x")})
    assert load(path) == {"b": str(tmp_path / "ran")}
    assert not (tmp_path / "ran").exists()
    for name in ("internlm.os\nsystem", "internlm.storage\nos.system", "internlm\nstorage.os.system"):
        text = f"touch {tmp_path / 'ran'}".encode()
        program = b"\x80\x02c" + name.encode() + b"\nX" + len(text).to_bytes(4, "little") + text + b"\x85R."
        assert load(handmade(tmp_path / "b.pt", program)) == text.decode()
    assert not (tmp_path / "ran").exists()


def test_no_module_is_imported_for_a_name(tmp_path: Path) -> None:
    before = set(sys.modules)
    program = b"\x80\x02cinternlm.plan.dryrun_of_strangers\nX\n)R."
    assert load(handmade(tmp_path / "a.pt", program)) == {}
    assert set(sys.modules) == before


def test_a_name_that_only_looks_like_the_framework_s_is_refused(tmp_path: Path) -> None:
    for name in ("internlm_extra.a\nb", "xinternlm.a\nb"):
        with pytest.raises(WeightsError, match="would run"):
            load(handmade(tmp_path / "a.pt", b"\x80\x02c" + name.encode() + b"\n)R."))


def test_state_cannot_be_set_on_what_stands_for_a_class(tmp_path: Path) -> None:
    program = b"\x80\x02cinternlm.a\nB\n)\x81}X\x01\x00\x00\x00aK\x01sb."  # B.__new__(B), then its __dict__
    with pytest.raises(WeightsError, match="cannot be read"):
        load(handmade(tmp_path / "a.pt", program))


def test_classes_of_the_framework_become_plain_values(tmp_path: Path) -> None:
    content = {
        "config": Config(num_layers=3, inner=Config(a=1), dtype=torch.bfloat16),
        "mode": ParallelMode.DATA,
        "order": OrderedDict(x=(1, [2.5, None, True])),
    }
    with framework():
        path = save(tmp_path / "a.pt", content)
    found = load(path)
    assert found == {
        "config": {"num_layers": 3, "inner": {"a": 1}, "dtype": torch.bfloat16},
        "mode": "data",
        "order": OrderedDict(x=(1, [2.5, None, True])),
    }
    assert type(found["config"]) is dict
    assert type(found["mode"]) is str
    with pytest.raises(ModuleNotFoundError):
        torch.load(path, weights_only=False)


def test_tensors_said_to_be_on_a_gpu_come_as_maps_of_the_file(tmp_path: Path) -> None:
    tensor = torch.randn(1000)
    with framework():
        path = save(tmp_path / "a.pt", {"whole": tensor, "part": tensor[10:20].view(2, 5)})
    found = load(path)
    assert torch.equal(found["part"], tensor[10:20].view(2, 5))
    assert found["whole"].device.type == "cpu"
    with open(path, "r+b") as file:  # what is mapped shows what the file holds now
        content = file.read()
        file.seek(content.index(tensor.numpy().tobytes()))
        file.write(torch.full((1,), 7.0).numpy().tobytes())
    assert found["whole"][0] == 7


def test_other_files_are_errors_that_name_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    for content in (b"", b"hello", pickle.dumps({"a": 1}), b"PK\x03\x04" + bytes(100)):
        path.write_bytes(content)
        with pytest.raises(WeightsError, match=r"a\.pt: cannot be read"):
            load(path)
    old = io.BytesIO()
    torch.save({"a": torch.zeros(1)}, old, _use_new_zipfile_serialization=False)
    path.write_bytes(old.getvalue())
    with pytest.raises(WeightsError, match="cannot be read"):
        load(path)
    with pytest.raises(WeightsError, match="is missing"):
        load(tmp_path / "absent.pt")
    for program in (b"\x80\x02.", b"\x80\x02}0R.", b"\x80\x02K\x01K\x02s.", b"\x80\x02h\x05."):
        with pytest.raises(WeightsError, match=r"b\.pt"):
            load(handmade(tmp_path / "b.pt", program))


def test_nothing_stays_allowed_after_a_file(tmp_path: Path) -> None:
    before = torch.serialization.get_safe_globals()
    with framework():
        load(save(tmp_path / "a.pt", Config(a=1)))
    assert torch.serialization.get_safe_globals() == before


def test_a_tensor_larger_than_its_storage_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "a.pt", {"a": torch.arange(37.0)})
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    # Elements, rows: K % is 37 in the program; the tensor now says 200, its storage still holds 37.
    program = entries["a/data.pkl"]
    assert program.count(b"K%") >= 2
    first = program.index(b"K%")  # of the storage
    changed = program[: first + 2] + program[first + 2 :].replace(b"K%", b"K\xc8", 1)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, changed if name == "a/data.pkl" else content)
    with pytest.raises(WeightsError, match="cannot be read"):
        load(path)
