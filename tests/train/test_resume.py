"""Starting and going on: what a run folder holds decides, and what cannot be gone on from is refused."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from internlm import __version__, config, runtime, storage
from internlm import recipe as recipes
from internlm.checkpoint import listing, place, saver, store
from internlm.cli import main, train
from internlm.data.shards import KIND, Shards, ShardWriter
from internlm.errors import ConfigError, DataError, InternLMError, StorageError, WeightsError
from internlm.recipe import Recipe
from internlm.text.tokenizer import Tokenizer
from internlm.text.training import train_bpe
from internlm.train.metrics import Metrics
from internlm.train.step import Stepper
from internlm.train.trainer import Trainer
from internlm.weights import transformers
from tests.models import save_checkpoint
from tests.processes import forked

Make = Callable[..., Recipe]


def test_a_second_process_in_a_run_folder_is_refused(recipe: Make, tmp_path: Path) -> None:
    value = recipe()
    recipes.prepare(value)  # this process holds the folder now
    (tmp_path / "r.yaml").write_text(config.dump(value))
    done = forked("train", str(tmp_path / "r.yaml"))
    assert done.returncode == 1
    assert "another process works in this folder" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_two_runs_that_name_one_folder_of_checkpoints_do_not_work_in_it_at_once(recipe: Make, tmp_path: Path) -> None:
    shared = {"folder": str(tmp_path / "shared")}
    recipes.prepare(recipe(checkpoint=shared))
    (tmp_path / "r.yaml").write_text(config.dump(recipe(checkpoint=shared, run=str(tmp_path / "other"))))
    done = forked("train", str(tmp_path / "r.yaml"))
    assert done.returncode == 1
    assert f"{tmp_path / 'shared'}: another process works in this folder" in done.stderr


def test_checkpoints_that_are_all_kept_for_ever_are_told(
    recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(train.logger, "warning", lambda text, *values: said.append(text % values))
    for tokens in (512, 513):
        checkpoint = {"every_steps": 2, "keep_every_tokens": tokens}
        value = recipe(checkpoint=checkpoint, train__tokens=256, run=str(tmp_path / str(tokens)))
        (tmp_path / "r.yaml").write_text(config.dump(value))
        assert main(["train", str(tmp_path / "r.yaml")]) == 0
    assert said == ["warning: checkpoint.keep_every_tokens 512 keeps them all: one is made every 512"]


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_over(recipe: Make, tmp_path: Path) -> None:
    value = recipe(train__tokens=2 * 256)
    recipes.prepare(value).fit()
    newest = listing.newest(tmp_path / "run" / "checkpoints")
    assert newest is not None
    (newest / storage.MANIFEST).write_text("{")
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    with pytest.raises(StorageError, match="damaged, all of them"):
        recipes.prepare(value)
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before


def test_flipped_bits_are_not_trained_on(recipe: Make, tmp_path: Path) -> None:
    value = recipe(train__tokens=2 * 256)
    recipes.prepare(value).fit()
    newest = listing.newest(tmp_path / "run" / "checkpoints")
    assert newest is not None
    (victim,) = (newest / "tensors").glob("model-*")
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 64
    victim.write_bytes(content)
    with pytest.raises(StorageError, match="is damaged"):
        recipes.prepare(value)
    with pytest.raises(StorageError, match="is damaged"):
        store.open_checkpoint(newest).weights()


def test_a_run_can_go_on_from_before_its_first_update(recipe: Make) -> None:
    trainer = recipes.prepare(recipe())
    draw = trainer.stepper.loader.next_batch

    def masked(rows: int):  # type: ignore[no-untyped-def]
        batch = draw(rows)
        batch.weights.zero_()
        return batch

    trainer.stepper.loader.next_batch = masked  # type: ignore[method-assign]
    trainer.stepper.step()
    trainer.save()
    again = recipes.prepare(recipe())
    assert (again.progress.step, again.progress.skipped_steps) == (1, 1)
    again.stepper.step()


def test_another_step_size_is_refused_on_resume(recipe: Make) -> None:
    recipes.prepare(recipe(train__tokens=2 * 256)).fit()
    with pytest.raises(ConfigError, match=r"train\.batch_tokens: the run was begun with 256 tokens a step"):
        recipes.prepare(recipe(train__batch_tokens=512))


def test_weights_do_not_change_before_a_checkpoint_has_its_copy_of_them(
    recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = saver.Saver._copy

    def slow(self: saver.Saver, sources: list[torch.Tensor]) -> Any:
        parts, make = copy(self, sources)
        return parts, lambda: (time.sleep(0.5), make())

    monkeypatch.setattr(saver.Saver, "_copy", slow)
    trainer = recipes.prepare(recipe())
    trainer.stepper.step()
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.save(wait=False)
    trainer.stepper.step()
    trainer.saver.finish()
    saved = store.open_checkpoint(tmp_path / "run").weights()
    assert all(torch.equal(before[name], weight.read()) for name, weight in saved.items())


def test_the_last_checkpoint_is_tried_again(recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, problems = place._Folder.write, ["the disk is full"]

    def fails_once(self: Any, name: str, buffers: Any) -> str:
        if problems:
            raise StorageError(problems.pop())
        return write(self, name, buffers)

    monkeypatch.setattr(place._Folder, "write", fails_once)
    monkeypatch.setattr("internlm.train.trainer.SAVE_AGAIN_AFTER_S", (0.0,))
    recipes.prepare(recipe(train__tokens=2 * 256)).fit()
    assert [path.name for path in listing.listed(tmp_path / "run" / "checkpoints")] == ["step-00000002"]


def test_a_removal_that_was_cut_short_is_finished(recipe: Make, tmp_path: Path) -> None:
    trainer = recipes.prepare(recipe(train__tokens=4 * 256, checkpoint={"every_steps": 2, "keep_last": 1}))
    left = tmp_path / "run" / "checkpoints" / listing.name_of(1)
    left.mkdir(parents=True)
    (left / "model.yaml").write_text("x")
    trainer.fit()
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000004"]


def test_a_finished_run_that_was_killed_before_old_checkpoints_went_drops_them_when_started_again(
    recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    value = recipe(train__tokens=4 * 256, checkpoint={"every_steps": 1, "keep_last": 1, "background": False})
    (tmp_path / "r.yaml").write_text(config.dump(value))
    with monkeypatch.context() as killed:
        killed.setattr(listing, "retain", lambda *_: None)
        assert main(["train", str(tmp_path / "r.yaml")]) == 0
    assert len(listing.listed(tmp_path / "run" / "checkpoints")) == 4
    assert main(["train", str(tmp_path / "r.yaml")]) == 0
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000004"]


def test_data_that_was_swapped_is_noticed_and_named(recipe: Make, corpus: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        shutil.copytree(corpus / name, tmp_path / name)
    sources = {name: {"path": str(tmp_path / name)} for name in ("a", "b")}
    trainer = recipes.prepare(recipe(data__train=sources, train__tokens=2 * 256))
    late = recipes.prepare(recipe(data__train=sources, run=str(tmp_path / "late")))
    trainer.stepper.loader._sources[1].row(0)  # its files are open now
    shutil.rmtree(tmp_path / "b")  # the same numbers of documents and tokens, in another order
    shards = Shards.open(corpus / "b")
    with storage.writing(tmp_path / "b", KIND) as out:
        writer = ShardWriter(out.path, "00000", shards.vocab_size)
        for number in reversed(range(shards.num_documents)):
            writer.add(shards.document(number)[0].tolist(), None, 1)
        shutil.copytree(corpus / "b" / "tokenizer", out.path / "tokenizer")
        out.meta.update(shards.facts | {"shards": [asdict(writer.close())]})
    with pytest.raises(DataError, match=r"b: holds other data than when this process opened it\. Put the old data"):
        late.fit()
    trainer.fit()  # the checkpoint says what it began with
    value = recipe(data__train=sources, train__tokens=4 * 256)
    with pytest.raises(DataError, match=r"of other data: shards_sha256\.b was '\w{16}', is '\w{16}'\. Give"):
        recipes.prepare(value)
    shutil.rmtree(tmp_path / "b")
    shutil.copytree(corpus / "b", tmp_path / "b")
    assert recipes.prepare(value).progress.step == 2


def test_a_checkpoint_that_does_not_say_what_its_data_held_is_gone_on_from(recipe: Make, tmp_path: Path) -> None:
    trainer = recipes.prepare(recipe(train__tokens=2 * 256))
    state = trainer.stepper.loader.state_dict()
    del state["shards_sha256"]
    trainer.stepper.loader.load_state_dict(state)
    with pytest.raises(DataError, match=r"of other data: sources\.b was \[1, 2\], is \[30, \d+\]\. Give"):
        trainer.stepper.loader.load_state_dict(state | {"sources": state["sources"] | {"b": [1, 2]}})


def test_a_checkpoint_made_on_a_cpu_goes_on_on_a_gpu(recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    recipes.prepare(recipe(train__tokens=256)).fit()
    trainer = recipes.prepare(recipe(train__tokens=512, run=recipe().run + "2"))
    checkpoint = store.open_checkpoint(recipe().run)
    trainer.parallel.device = torch.device("cuda")  # only its random stream is looked at here
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: torch.zeros(16, dtype=torch.uint8))
    trainer.resume(checkpoint)
    assert trainer.progress.step == 1


def test_a_begun_run_needs_its_start_no_more(recipe: Make, tmp_path: Path) -> None:
    recipes.prepare(recipe(run=str(tmp_path / "first"), train__tokens=256)).fit()
    value = recipe(init_from=str(tmp_path / "first"), model=None, train__tokens=256)
    recipes.prepare(value).fit()
    shutil.rmtree(tmp_path / "first")
    assert recipes.prepare(value).progress.step == 1


def first_weight(trainer: Trainer) -> torch.Tensor:
    return next(iter(trainer.model.parameters())).detach().clone()


def test_a_begun_run_goes_on_and_only_a_fresh_one_starts_from_other_weights_or_at_random(
    recipe: Make, tmp_path: Path
) -> None:
    first = recipes.prepare(recipe(run=str(tmp_path / "first"), seed=7, train__tokens=256))
    first.fit()
    value = recipe(init_from=str(tmp_path / "first"), train__tokens=2 * 256)
    trainer = recipes.prepare(value)
    assert torch.equal(first_weight(trainer), first_weight(first)), "init_from comes before chance"
    trainer.stepper.step()
    trainer.save()
    again = recipes.prepare(value)
    assert again.progress.step == 1
    assert torch.equal(first_weight(again), first_weight(trainer)), "what was begun comes before init_from"
    assert not torch.equal(first_weight(again), first_weight(first))
    scratch = [recipes.prepare(recipe(run=str(tmp_path / name), seed=3)) for name in ("one", "two")]
    assert torch.equal(first_weight(scratch[0]), first_weight(scratch[1])), (
        "a recipe with a model alone says: at random"
    )


def test_a_recipe_with_neither_a_model_nor_weights_is_refused(recipe: Make) -> None:
    with pytest.raises(ConfigError, match="model: is required unless init_from is given"):
        recipe(model=None)


@pytest.mark.parametrize("what", ["missing", "empty", "unfinished", "a file"])
def test_a_start_that_is_not_there_is_never_replaced_by_chance(recipe: Make, tmp_path: Path, what: str) -> None:
    place = tmp_path / "start"
    if what == "a file":
        place.write_text("weights")
    elif what != "missing":
        place.mkdir()
    if what == "unfinished":
        recipes.prepare(recipe(run=str(place), train__tokens=256)).fit()
        newest = listing.newest(place / "checkpoints")
        assert newest is not None
        (newest / storage.MANIFEST).unlink()
    with pytest.raises(InternLMError, match=re.escape(str(place))):
        recipes.prepare(recipe(init_from=str(place)))
    assert listing.listed(tmp_path / "run" / "checkpoints") == []


@pytest.mark.parametrize(
    ("lost", "added", "said"),
    [("blocks.0.attention.wq", None, "blocks.0.attention.wq"), (None, "blocks.0.attention.extra", "extra")],
    ids=["one is missing", "one is left over"],
)
def test_weights_that_are_missing_or_left_over_are_named_and_refused(
    recipe: Make, tmp_path: Path, lost: str | None, added: str | None, said: str
) -> None:
    first = recipes.prepare(recipe(run=str(tmp_path / "first"), train__tokens=256))
    state = {f"model.{name}": p.detach() for name, p in first.model.named_parameters()}
    names = [name for name in state if lost is None or not name.startswith(f"model.{lost}")]
    assert (len(names) < len(state)) == (lost is not None)
    state = {name: state[name] for name in names} | ({} if added is None else {f"model.{added}": torch.ones(2)})
    path = tmp_path / "first" / "checkpoints" / listing.name_of(1)
    meta = first.stepper.meta() | {"step": 1, "tokens": 256}
    save_checkpoint(path, state, first.model.config, first.stepper.loader.tokenizer, meta)
    with pytest.raises(WeightsError, match=re.escape(said)):
        recipes.prepare(recipe(init_from=str(path)))
    if lost is not None:
        with pytest.raises(StorageError, match=re.escape(f"tensor model.{said}")):
            recipes.prepare(recipe(run=str(tmp_path / "first")))


def test_a_start_from_a_transformers_folder_has_the_shape_of_the_recipe_and_goes_on(
    recipe: Make, tmp_path: Path
) -> None:
    first = recipes.prepare(recipe(run=str(tmp_path / "first"), train__tokens=256))
    first.fit()
    transformers.export(store.open_checkpoint(tmp_path / "first").weights(), first.model.config, tmp_path / "hf")
    value = recipe(
        init_from=str(tmp_path / "hf"), model__init={"std": 0.01}, model__context_length=4096, train__tokens=256
    )
    trainer = recipes.prepare(value)
    assert trainer.model.config == value.model
    for name, parameter in first.model.named_parameters():
        assert torch.equal(parameter, trainer.model.get_parameter(name))
    trainer.fit()
    assert recipes.prepare(value).progress.step == 1


@pytest.mark.parametrize("step_folder", [False, True])
def test_weights_of_another_tokenizer_are_refused(recipe: Make, tmp_path: Path, step_folder: bool) -> None:
    trainer = recipes.prepare(recipe(run=str(tmp_path / "first"), train__tokens=256))
    other = train_bpe(["another text than that of the corpus"] * 9, 270)
    source = tmp_path / "first" / "checkpoints" / listing.name_of(1)
    state = {f"model.{name}": p.detach() for name, p in trainer.model.named_parameters()}
    save_checkpoint(source, state, trainer.model.config, other, {"step": 1})
    with pytest.raises(ConfigError, match="trained with another tokenizer"):
        recipes.prepare(recipe(init_from=str(source if step_folder else tmp_path / "first")))


def test_points_of_steps_that_come_again_are_taken_back_from_tensorboard(recipe: Make, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logging.getLogger("tensorboard").setLevel("ERROR")
    value = recipe(train__tokens=4 * 256)
    trainer = recipes.prepare(value)
    trainer.stepper.step()
    trainer.save()
    trainer.save = lambda **_: Path()  # type: ignore[method-assign]  # stopped after step 4, before it was saved
    trainer.fit()
    recipes.prepare(value).fit()
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert [point.step for point in events.Scalars("train/loss")] == [2, 3, 4]


def test_the_commit_is_that_of_this_code_and_of_no_repository_around_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    commit = ["git", "-c", "user.name=x", "-c", "user.email=x", "commit", "-q", "--allow-empty", "-m", "x"]
    subprocess.run(commit, check=True, cwd=tmp_path)
    package = tmp_path / "site-packages" / "internlm"
    package.mkdir(parents=True)
    monkeypatch.setattr(runtime, "__file__", str(package / "runtime.py"))
    assert "commit" not in runtime.versions()


@pytest.mark.parametrize(("every_steps", "advice"), [(None, "starts over"), (2, r"goes on from .*step-00000002")])
def test_an_interrupted_run_says_what_the_same_command_will_do(
    recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every_steps: int | None, advice: str
) -> None:
    (tmp_path / "r.yaml").write_text(config.dump(recipe(checkpoint={"every_steps": every_steps})))
    step = Stepper.step

    def stopped(stepper: Stepper) -> Metrics:
        if stepper.progress.step == 3:
            raise KeyboardInterrupt
        return step(stepper)

    said: list[str] = []
    monkeypatch.setattr(Stepper, "step", stopped)
    monkeypatch.setattr(train.logger, "info", lambda text, *values: said.append(text % values))
    assert main(["train", str(tmp_path / "r.yaml")]) == 130
    assert re.fullmatch(f"stopped at step 3; the same command {advice}.*", said[-1])


def test_the_runtime_section_may_be_wrong_too(recipe: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "r.yaml").write_text(json.dumps(config.encode(recipe())))
    assert main(["train", str(tmp_path / "r.yaml"), "runtime=3"]) == 1
    assert "runtime" in capsys.readouterr().err


def test_what_is_beside_the_tensors_is_of_the_start_whatever_became_of_the_data(
    recipe: Make, corpus: Path, tmp_path: Path
) -> None:
    for name in ("a", "b", "held"):
        shutil.copytree(corpus / name, tmp_path / name)
    sources = {name: {"path": str(tmp_path / name)} for name in ("a", "b")}
    held = {"held": {"path": str(tmp_path / "held")}}
    trainer = recipes.prepare(recipe(data__train=sources, data__validation=held, train__tokens=2 * 256))
    trainer.stepper.step()
    trainer.evaluator.evaluate(trainer.parallel, final=True)  # all files are open
    for name in ("a", "b", "held"):
        shutil.rmtree(tmp_path / name)
    trainer.fit()
    saved = store.open_checkpoint(tmp_path / "run")
    assert saved.tokenizer_path is not None
    assert Tokenizer.load(saved.tokenizer_path) == Tokenizer.load(corpus / "a" / "tokenizer")


def test_ids_beside_another_tokenizer_are_refused(recipe: Make, corpus: Path, tmp_path: Path) -> None:
    shutil.copytree(corpus / "a", tmp_path / "a")
    shutil.rmtree(tmp_path / "a" / "tokenizer")
    train_bpe(["another text than that of the corpus"] * 9, 270).save(tmp_path / "a" / "tokenizer")
    manifest = json.loads((tmp_path / "a" / storage.MANIFEST).read_text())
    manifest["files"] = {name: facts for name, facts in manifest["files"].items() if "tokenizer" not in name}
    del manifest["digest"]
    (tmp_path / "a" / storage.MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=r"is not the tokenizer of the ids beside it .*Tokenize the data again"):
        recipes.prepare(recipe(data__train={"a": {"path": str(tmp_path / "a")}}, data__validation={}))


def test_a_folder_for_checkpoints_that_is_a_run_of_its_own_is_used_as_it_is_given(recipe: Make, tmp_path: Path) -> None:
    """The other run's checkpoints lie one level further down; whoever asks for either run finds its own."""
    other = recipes.prepare(recipe(run=str(tmp_path / "other"), train__tokens=256, model__init={"std": 0.5}))
    other.fit()
    value = recipe(
        train__tokens=3 * 256, checkpoint={"folder": str(tmp_path / "other"), "every_steps": 1, "keep_last": 1}
    )
    recipes.prepare(value).fit()
    assert [path.name for path in listing.listed(tmp_path / "other")] == ["step-00000003"]
    assert [path.name for path in listing.listed(tmp_path / "other" / "checkpoints")] == ["step-00000001"]
    assert store.open_checkpoint(tmp_path / "run").step == 3
    assert store.open_checkpoint(tmp_path / "other").step == 1
    assert recipes.prepare(value).progress.step == 3


def test_a_checkpoint_of_another_version_is_named_with_both_versions(recipe: Make, tmp_path: Path) -> None:
    """One field more in the model, one fact less in the manifest: neither is a mistake of the recipe."""
    value = recipe(train__tokens=256)
    recipes.prepare(value).fit()
    path = tmp_path / "run" / "checkpoints" / listing.name_of(1)
    manifest = json.loads((path / storage.MANIFEST).read_text())
    manifest.pop("digest")
    manifest["meta"]["versions"]["internlm"] = "9.9"
    del manifest["meta"]["loss_scale"]
    (path / storage.MANIFEST).write_text(json.dumps(manifest))
    ours = re.escape(__version__)
    do = rf"It was written by internlm 9\.9, this is {ours}: use that version"
    with pytest.raises(StorageError, match=rf"says nothing of loss_scale\. {do}"):
        recipes.prepare(recipe(train__tokens=2 * 256))
    text = (path / "model.yaml").read_text() + "wings: 2\n"
    (path / "model.yaml").write_text(text)
    manifest["files"]["model.yaml"] = {"bytes": len(text), "sha256": hashlib.sha256(text.encode()).hexdigest()}
    (path / storage.MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(StorageError, match=rf"(?s)step-00000001: model\.yaml cannot be .*wings.*{do}"):
        recipes.prepare(recipe(train__tokens=2 * 256))
