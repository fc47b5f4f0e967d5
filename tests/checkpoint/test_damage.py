"""Damaged, foreign and mixed files are found before any of them is used."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from internlm import disk, storage
from internlm import recipe as recipes
from internlm.checkpoint import listing, store
from internlm.cli import main
from internlm.errors import InternLMError, StorageError
from internlm.recipe import Recipe
from internlm.text.tokenizer import Tokenizer
from tests.models import save_checkpoint

Make = Callable[..., Recipe]
STATE = "tensors/state-00000.safetensors"
FILES = ["manifest.json", "tensors.json", "tensors/model-00000.safetensors", STATE, "model.yaml", "tokenizer/*"]
TENSORS = {f"model.{name}": torch.randn(40, 30) for name in "abc"} | {"optim.a.step": torch.tensor(3.0)}


@pytest.fixture
def make(recipe: Make, corpus: Path) -> Callable[[Path, float], Path]:
    """Return a function that writes a checkpoint whose tensors are multiplied by a number."""
    shape = recipe().model
    assert shape is not None
    tokenizer = Tokenizer.load(corpus / "a" / "tokenizer")

    def write(path: Path, factor: float) -> Path:
        tensors = {name: tensor * factor for name, tensor in TENSORS.items()}
        save_checkpoint(path, tensors, shape, tokenizer, {"step": 7, "factor": factor})
        return path

    return write


def victim(folder: Path, name: str) -> Path:
    """Return a file of a checkpoint."""
    return next(path for path in sorted(folder.glob(name)) if path.is_file())


def flip(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def require_refused(folder: Path, message: str = "") -> None:
    """Check that every way to read a checkpoint refuses it, that a load has touched nothing, and what is said of it."""
    into = {name: torch.full_like(tensor, -1.0) for name, tensor in TENSORS.items()}

    def load() -> None:
        store.open_checkpoint(folder).load(into)

    whole = (lambda: store.open_checkpoint(folder).weights(""), lambda: store.open_checkpoint(folder).verify())
    for use in (load, *whole):
        with pytest.raises(StorageError):
            use()
    assert all(bool((tensor == -1).all()) for tensor in into.values())
    (found,) = listing.survey(folder.parent, verify=True)
    assert found.problem
    assert message in found.problem


def halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGES: dict[str, Callable[[Path], None]] = {
    "halved": halve,
    "one byte short": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "one byte long": lambda path: path.write_bytes(path.read_bytes() + b"x"),
    "empty": lambda path: path.write_bytes(b""),
    "missing": lambda path: path.unlink(),
    "a folder": lambda path: (path.unlink(), path.mkdir()),  # type: ignore[func-returns-value]
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "foreign": lambda path: path.write_bytes(random.Random(0).randbytes(path.stat().st_size)),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_of_every_kind_are_refused_before_a_tensor_is_touched(
    name: str, damage: str, make: Callable[[Path, float], Path], tmp_path: Path
) -> None:
    folder = make(tmp_path / "step-00000007", 1.0)
    path = victim(folder, name)
    if (name, damage) == ("manifest.json", "one byte short"):
        path.write_bytes(path.read_bytes().rstrip())  # a manifest may lose the end of its last line, but no more
    DAMAGES[damage](path)
    require_refused(folder)


@pytest.mark.parametrize("name", FILES)
def test_every_flipped_bit_is_noticed(
    name: str, make: Callable[[Path, float], Path], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """The proof flips each bit of the small files, and a thousand of the tensors."""
    folder = make(tmp_path / "step-00000007", 1.0)
    path = victim(folder, name)
    right = path.read_bytes()
    bits: Any = range(len(right) * 8)
    if not request.config.getoption("--proof") or len(bits) > 50_000:
        bits = random.Random(0).sample(bits, 1000 if request.config.getoption("--proof") else 40)
    facts = json.loads((folder / storage.MANIFEST).read_text()) if name == storage.MANIFEST else {}
    for bit in bits:
        flip(path, bit)
        try:
            store.open_checkpoint(folder).verify()
        except InternLMError:
            pass
        else:  # of a manifest: a space between two words, or the name of the digest itself
            found = json.loads(path.read_text())
            assert name == storage.MANIFEST
            assert all(found[key] == facts[key] for key in ("format", "kind", "meta", "files")), bit
        path.write_bytes(right)
    store.open_checkpoint(folder).verify()


@pytest.mark.parametrize("name", FILES[1:])
def test_files_of_another_checkpoint_are_noticed(
    name: str, make: Callable[[Path, float], Path], tmp_path: Path
) -> None:
    """Same names, same sizes: only the contents differ."""
    folder, other = make(tmp_path / "a" / "step-00000007", 1.0), make(tmp_path / "b" / "step-00000007", 2.0)
    path = victim(folder, name)
    content = victim(other, name).read_bytes()
    if content == path.read_bytes():  # they agree in it: another shape, another tokenizer
        content = content.replace(b"3", b"4").replace(b"a", b"e")
    path.write_bytes(content)
    require_refused(folder, "is damaged")


def test_a_manifest_of_another_checkpoint_is_noticed(make: Callable[[Path, float], Path], tmp_path: Path) -> None:
    folder, other = make(tmp_path / "a" / "step-00000007", 1.0), make(tmp_path / "b" / "step-00000007", 2.0)
    shutil.copy(other / storage.MANIFEST, folder / storage.MANIFEST)
    require_refused(folder, "is damaged")


def edit(folder: Path, change: Callable[[dict[str, Any]], object], digest: bool = True) -> None:
    """Change a manifest, with a digest that fits it."""
    path = folder / storage.MANIFEST
    manifest = json.loads(path.read_text())
    del manifest["digest"]
    change(manifest)
    if digest:
        manifest["digest"] = storage._digest(manifest)
    path.write_text(json.dumps(manifest))


@pytest.mark.parametrize("place", ["../secret", "/etc/hostname", "tensors/../../secret", "a\0b"])
def test_a_hostile_manifest_makes_nobody_look_outside_of_its_folder(
    place: str, make: Callable[[Path, float], Path], tmp_path: Path
) -> None:
    folder = make(tmp_path / "run" / "step-00000007", 1.0)
    secret = tmp_path / "run" / "secret"
    secret.write_text("x")
    facts = {"bytes": 1, "sha256": disk.sha256(secret)}
    edit(folder, lambda manifest: manifest["files"].update({place: facts}))
    require_refused(folder, "says what cannot be")


@pytest.mark.parametrize(
    "change",
    [
        lambda manifest: manifest.pop("files"),
        lambda manifest: manifest.pop("meta"),
        lambda manifest: manifest.update(meta=[]),
        lambda manifest: manifest.update(files=[1, 2]),
        lambda manifest: manifest["files"].update({"model.yaml": 3}),
        lambda manifest: manifest["files"]["model.yaml"].pop("sha256"),
        lambda manifest: manifest.update(kind="shards"),
        lambda manifest: manifest.update(format=99),
    ],
)
def test_a_manifest_with_other_parts_is_refused(
    change: Callable[[dict[str, Any]], object], make: Callable[[Path, float], Path], tmp_path: Path
) -> None:
    folder = make(tmp_path / "step-00000007", 1.0)
    edit(folder, change)
    require_refused(folder)


@pytest.mark.parametrize("text", ["[" * 100_000, "[]", "3", "null", '"x"', "\xff", "{}"])
def test_a_manifest_that_is_none_of_ours_is_refused(
    text: str, make: Callable[[Path, float], Path], tmp_path: Path
) -> None:
    folder = make(tmp_path / "step-00000007", 1.0)
    (folder / storage.MANIFEST).write_bytes(text.encode("latin-1"))
    require_refused(folder)


def test_a_manifest_of_before_there_were_digests_is_read(make: Callable[[Path, float], Path], tmp_path: Path) -> None:
    folder = make(tmp_path / "step-00000007", 1.0)
    edit(folder, lambda manifest: None, digest=False)
    store.open_checkpoint(folder).verify()


@pytest.mark.parametrize(
    ("into", "message"),
    [
        ({"model.a": torch.full((30, 40), -1.0)}, "has shape"),
        ({"model.a": torch.full((40, 30), -1.0), "model.z": torch.full((2,), -1.0)}, "is not in the checkpoint"),
    ],
)
def test_tensors_that_do_not_fit_are_named_and_none_is_filled(
    into: dict[str, Tensor], message: str, make: Callable[[Path, float], Path], tmp_path: Path
) -> None:
    folder = make(tmp_path / "step-00000007", 1.0)
    with pytest.raises(StorageError, match=message):
        store.open_checkpoint(folder).load(into)
    assert all(bool((tensor == -1).all()) for tensor in into.values())


@pytest.mark.parametrize("name", FILES[1:])
def test_a_run_refuses_a_damaged_checkpoint_and_leaves_its_files_alone(
    name: str, recipe: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a file with a flipped bit the run says which one; it neither starts over nor goes on from an older one."""
    value = recipe(train__tokens=2 * 256, checkpoint={"every_steps": 1})
    recipes.prepare(value).fit()
    newest = listing.newest(tmp_path / "run" / "checkpoints")
    assert newest is not None
    path = victim(newest, name)
    flip(path, path.stat().st_size * 4)
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file() and p.name != disk.LOCK}
    with pytest.raises(StorageError, match=f"{path.relative_to(newest)} is damaged"):
        recipes.prepare(value)
    after = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file() and p.name != disk.LOCK}
    assert after == before
    is_read = name != STATE
    assert main(["convert", str(tmp_path / "run"), str(tmp_path / "out")]) == is_read
    assert ("is damaged" in capsys.readouterr().err) == is_read
    assert (tmp_path / "out").exists() != is_read


def test_who_wants_the_model_reads_and_verifies_its_files_alone_and_once(
    make: Callable[[Path, float], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make(tmp_path / "step-00000007", 1.0)
    path = victim(folder, STATE)
    flip(path, path.stat().st_size * 8 - 1)
    opened, read = store.open_checkpoint(folder), list[str]()
    hashed = disk.sha256
    monkeypatch.setattr(disk, "sha256", lambda path: read.append(path.name) or hashed(path))
    for _ in range(2):
        weights = opened.weights()
        assert weights.keys() == set("abc")
        assert all(torch.equal(weight.read(), TENSORS[f"model.{name}"]) for name, weight in weights.items())
    assert read == ["model-00000.safetensors"]
    with pytest.raises(StorageError, match=f"{STATE} is damaged"):
        opened.weights("optim.")
    with pytest.raises(StorageError, match=f"{STATE} is damaged"):
        opened.verify()


def test_a_checkpoint_keeps_the_tokenizer_that_it_was_given(
    make: Callable[[Path, float], Path], tmp_path: Path, corpus: Path
) -> None:
    path = store.open_checkpoint(make(tmp_path / "step-00000007", 1.0)).tokenizer_path
    assert path is not None
    assert Tokenizer.load(path).fingerprint == Tokenizer.load(corpus / "a" / "tokenizer").fingerprint
