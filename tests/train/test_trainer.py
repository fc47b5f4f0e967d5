"""The loop: numbers are conserved, runs go on exactly, bad numbers do no harm."""

from __future__ import annotations

import importlib.util
import json
import math
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from internlm import disk, plot
from internlm import recipe as recipes
from internlm.checkpoint import listing, store
from internlm.errors import ConfigError, DataError, StorageError, TrainingError
from internlm.model.heads import TokenOutputs
from internlm.optim.schedule import rate
from internlm.recipe import Recipe
from internlm.train.evaluate import score
from internlm.train.metrics import MetricsFile, read_metrics
from internlm.train.trainer import Trainer
from internlm.weights import weight as lazy

Make = Callable[..., Recipe]


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def losses(run: Path) -> list[float]:
    return [line["train/loss"] for line in read_metrics(run / "metrics.jsonl") if "train/loss" in line]


def test_training_learns_the_pattern_and_writes_everything(recipe: Make, tmp_path: Path, plots: None) -> None:
    value = recipe(
        train__tokens=60 * 256,
        optim__lr=1e-2,
        evaluate={"every_steps": 20},
        checkpoint={"every_steps": 20, "keep_last": 2},
    )
    final = recipes.prepare(value).fit()
    run = tmp_path / "run"
    found = losses(run)
    assert found[0] == pytest.approx(math.log(280), abs=0.2)
    assert found[-1] < 2.0
    assert final["valid/loss/held"] < 2.0
    assert [p.name for p in listing.listed(run / "checkpoints")] == ["step-00000040", "step-00000060"]
    assert {p.name for p in run.iterdir()} >= {"metrics.jsonl", "recipe.yaml", "versions.json", "loss.png"}
    if importlib.util.find_spec("tensorboard"):
        assert any("tfevents" in p.name for p in (run / "tensorboard").iterdir())
    keys = read_metrics(run / "metrics.jsonl")[0].keys()
    assert {"train/loss/a", "optim/lr", "optim/grad_norm", "perf/mfu", "mem/peak_gib", "progress/tokens"} <= keys
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert recipes.load(run / "recipe.yaml").value == value  # the resolved recipe repeats the run


@pytest.mark.parametrize("pack", ["split", "whole"])
def test_loss_and_gradients_do_not_depend_on_micro_batching(recipe: Make, pack: str) -> None:
    gradients, sums = {}, {}
    for rows in (8, 4, 2, 1):
        trainer = recipes.prepare(recipe(train__micro_batch_rows=rows, train__max_grad_norm=0.0, data__pack=pack))
        kept: dict[str, torch.Tensor] = {}

        def keep(rate: float, trainer: Trainer = trainer, kept: dict[str, torch.Tensor] = kept) -> None:
            kept.update({n: p.grad.double() for n, p in trainer.model.named_parameters() if p.grad is not None})

        trainer.stepper.optimizer.step = keep  # type: ignore[method-assign]
        trainer.stepper.step()
        gradients[rows] = torch.cat([g.flatten() for g in kept.values()])
        sums[rows] = trainer.meter.read()["train/loss"]
        assert sums[rows] == pytest.approx(sums[8], rel=1e-6), rows
        assert (gradients[rows] - gradients[8]).norm() / gradients[8].norm() < 1e-6, rows


def test_the_loss_is_the_mean_over_all_trained_tokens_of_the_step(recipe: Make) -> None:
    trainer = recipes.prepare(recipe(train__micro_batch_rows=1, data__pack="whole"))
    batch = trainer.stepper.loader.next_batch(8)
    trainer.stepper.loader.load_state_dict(trainer.stepper.loader.state_dict() | {"taken": {"a": 0, "b": 0}})
    logits = trainer.model.head.logits(trainer.model(batch.tokens, batch.positions, batch.documents))
    logp = logits.log_softmax(-1).gather(-1, batch.labels[..., None])[..., 0]
    wanted = -(logp * batch.weights).sum() / batch.weights.sum()
    trainer.stepper.step()
    assert trainer.meter.read()["train/loss"] == pytest.approx(wanted.item(), rel=1e-5)
    assert len({int((row > 0).sum()) for row in batch.weights}) > 1  # rows differ in how many tokens they train


def test_the_z_loss_is_its_formula_over_trained_tokens(recipe: Make) -> None:
    trainer = recipes.prepare(recipe(data__pack="whole", objective={"kind": "lm", "z_loss": 0.1}))
    start = trainer.stepper.loader.state_dict()
    batch = trainer.stepper.loader.next_batch(8)
    trainer.stepper.loader.load_state_dict(start)
    logits = trainer.model.head.logits(trainer.model(batch.tokens, batch.positions, batch.documents))
    logp = logits.log_softmax(-1).gather(-1, batch.labels[..., None])[..., 0]
    wanted = (batch.weights * (0.1 * logits.logsumexp(-1) ** 2 - logp)).sum() / batch.weights.sum()
    assert not batch.weights.all()
    assert trainer.stepper.step()["train/step_loss"] == pytest.approx(wanted.item(), rel=1e-5)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_ten_steps_and_ten_more_after_a_restart_are_twenty_steps_bitwise(
    recipe: Make, tmp_path: Path, kind: str
) -> None:
    changes = {"optim__kind": kind, "checkpoint": {"every_steps": 10, "keep_last": 5}, "train__micro_batch_rows": 4}
    straight = recipes.prepare(recipe(run=str(tmp_path / "straight"), **changes))
    straight.fit()
    drawn = (torch.rand(1), random.random())
    first = recipes.prepare(recipe(**changes))
    for _ in range(10):
        first.stepper.step()
    first.save()
    torch.rand(7)  # anything may happen to the random streams between the two
    random.random()
    second = recipes.prepare(recipe(**changes))
    assert second.progress.step == 10
    second.fit()
    assert (torch.rand(1), random.random()) == drawn
    for name, value in weights(straight).items():
        assert torch.equal(value, weights(second)[name]), name
    for name, value in straight.stepper.optimizer.named_state().items():
        assert torch.equal(value, second.stepper.optimizer.named_state()[name]), name
    assert straight.stepper.loader.state_dict() == second.stepper.loader.state_dict()
    assert losses(tmp_path / "straight")[10:] == losses(tmp_path / "run")


def test_random_numbers_go_on_after_a_restart_where_they_were(recipe: Make) -> None:
    trainer = recipes.prepare(recipe())
    torch.rand(3)  # as dropout would
    random.random()
    trainer.save()
    wanted = (torch.rand(1), random.random())
    recipes.prepare(recipe())
    assert (torch.rand(1), random.random()) == wanted


def test_a_finished_run_is_not_trained_again(recipe: Make) -> None:
    value = recipe(train__tokens=3 * 256)
    recipes.prepare(value).fit()
    again = recipes.prepare(value)
    assert again.progress.step == value.train.total_steps
    before = weights(again)
    again.fit()
    assert all(torch.equal(before[name], after) for name, after in weights(again).items())


def test_the_last_tokens_of_a_budget_are_a_whole_step(recipe: Make) -> None:
    assert recipe(train__tokens=2 * 256 + 1).train.total_steps == 3
    assert recipe(train__tokens=2 * 256).train.total_steps == 2


def test_a_step_has_the_rate_that_belongs_to_the_steps_before_it(recipe: Make) -> None:
    stepper = recipes.prepare(recipe(schedule={"warmup_ratio": 0.5})).stepper
    step, given = stepper.optimizer.step, []
    stepper.optimizer.step = lambda share: given.append(share) or step(share)  # type: ignore[method-assign]
    for number in range(3):
        wanted = rate(stepper.schedule, number, stepper.config.total_steps)
        assert stepper.step()["optim/lr"] == wanted * stepper.optimizer.lr
        assert given[number] == wanted


def test_a_run_that_goes_on_keeps_the_line_of_the_step_it_goes_on_from(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl", 0)
    for step in (1, 2, 3):
        file.write(step, {"train/loss": 1.0})
    file.close()
    MetricsFile(tmp_path / "metrics.jsonl", 2).close()
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]


def test_metrics_after_a_restart_hold_every_step_once(recipe: Make, tmp_path: Path) -> None:
    value = recipe(train__tokens=12 * 256, checkpoint={"every_steps": 5})
    trainer = recipes.prepare(value)
    trainer.save = lambda **_: Path()  # type: ignore[method-assign]  # as if it was killed after step 12, before saving
    trainer.fit()
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write('{"step": 12, "train/lo')  # and in the middle of a line
    recipes.prepare(value).fit()
    steps = [line["step"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if "train/loss" in line]
    assert steps == list(range(1, 13))


def test_weights_can_start_from_another_run(recipe: Make, tmp_path: Path) -> None:
    first = recipes.prepare(recipe(run=str(tmp_path / "first"), train__tokens=3 * 256))
    first.fit()
    second = recipes.prepare(recipe(init_from=str(tmp_path / "first"), model=None))
    assert second.progress.step == 0
    for name, value in weights(first).items():
        assert torch.equal(value, weights(second)[name])


def test_a_start_of_another_shape_is_an_error(recipe: Make, tmp_path: Path) -> None:
    recipes.prepare(recipe(run=str(tmp_path / "first"), train__tokens=256)).fit()
    with pytest.raises(ConfigError, match="num_layers: 2 there, 3 here"):
        recipes.prepare(recipe(init_from=str(tmp_path / "first"), model__num_layers=3))
    with pytest.raises(ConfigError, match="init_from: no such folder"):
        recipes.prepare(recipe(init_from=str(tmp_path / "nowhere"), model=None))


def test_a_run_folder_of_another_model_is_refused_and_untouched(recipe: Make, tmp_path: Path) -> None:
    recipes.prepare(recipe(train__tokens=256)).fit()
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")}
    with pytest.raises(ConfigError, match="another model"):
        recipes.prepare(recipe(model__ffn_size=128))
    with pytest.raises(ConfigError, match=r"checkpoint\.resume is false"):
        recipes.prepare(recipe(checkpoint={"resume": False}))
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")}


def test_changed_data_is_refused_on_resume(recipe: Make) -> None:
    recipes.prepare(recipe(train__tokens=256)).fit()
    with pytest.raises(DataError, match="seed was 1, is 2"):
        recipes.prepare(recipe(data__seed=2))


def test_non_finite_steps_are_skipped_counted_and_end_the_run(recipe: Make, tmp_path: Path) -> None:
    trainer = recipes.prepare(recipe(train__max_skipped_steps=3))
    trainer.stepper.step()
    healthy = weights(trainer)
    state = {n: v.clone() for n, v in trainer.stepper.optimizer.named_state().items()}
    with torch.no_grad():
        trainer.model.norm.weight[0] = float("inf")
    trainer.stepper.step()
    trainer.stepper.step()
    with pytest.raises(TrainingError, match="3 steps in a row were skipped"):
        trainer.stepper.step()
    assert trainer.progress.skipped_steps == 3
    for name, value in weights(trainer).items():
        if name != "norm.weight":
            assert torch.equal(value, healthy[name])
    assert all(torch.equal(v, state[n]) for n, v in trainer.stepper.optimizer.named_state().items())


def test_a_good_step_ends_a_row_of_skipped_ones(recipe: Make) -> None:
    trainer = recipes.prepare(recipe(train__max_skipped_steps=2))
    embed = trainer.model.embedding.forward

    def broken(tokens: torch.Tensor) -> torch.Tensor:
        return embed(tokens) * (1.0 if trainer.progress.step % 2 else math.nan)

    trainer.model.embedding.forward = broken  # type: ignore[method-assign]
    for _ in range(5):
        trainer.stepper.step()
    assert (trainer.progress.skipped_steps, trainer.progress.skipped_in_a_row) == (3, 1)


def test_a_gradient_that_is_not_finite_is_not_used_where_the_loss_is(recipe: Make) -> None:
    trainer = recipes.prepare(recipe())
    before = weights(trainer)
    trainer.model.norm.weight.register_hook(lambda gradient: gradient * math.inf)
    assert math.isfinite(trainer.stepper.step()["train/step_loss"])
    assert trainer.progress.skipped_steps == 1
    assert all(torch.equal(before[name], after) for name, after in weights(trainer).items())


def test_a_skipped_step_does_not_hide_the_loss_of_the_others(recipe: Make, tmp_path: Path) -> None:
    trainer = recipes.prepare(recipe(train__tokens=3 * 256, train__log_every_steps=3))
    embed = trainer.model.embedding.forward

    def broken(tokens: torch.Tensor) -> torch.Tensor:
        return embed(tokens) * (math.nan if trainer.progress.step == 1 else 1.0)

    trainer.model.embedding.forward = broken  # type: ignore[method-assign]
    trainer.fit()
    assert trainer.progress.skipped_steps == 1
    assert losses(tmp_path / "run")[-1] == pytest.approx(math.log(280), abs=0.5)


def test_a_row_that_is_not_finite_does_not_hide_the_loss_of_the_others(recipe: Make) -> None:
    trainer = recipes.prepare(recipe())
    batch = trainer.stepper.loader.next_batch(2)
    logp = torch.full(batch.labels.shape, -2.0)
    logp[0, 3] = math.nan
    trainer.meter.clear()
    trainer.meter.add(TokenOutputs(logp, logp, logp == 0), batch)
    assert trainer.meter.read()["train/loss"] == 2.0


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_step_with_nothing_to_train_on_is_skipped(recipe: Make, dtype: str) -> None:
    trainer = recipes.prepare(recipe(runtime__dtype=dtype))
    scale = trainer.stepper.scale.value
    draw = trainer.stepper.loader.next_batch

    def masked(rows: int):  # type: ignore[no-untyped-def]
        batch = draw(rows)
        batch.weights.zero_()
        return batch

    before = weights(trainer)
    trainer.stepper.loader.next_batch = masked  # type: ignore[method-assign]
    trainer.stepper.step()
    assert trainer.progress.skipped_steps == 1
    assert trainer.stepper.scale.value == scale  # nothing overflowed
    assert all(torch.equal(before[n], v) for n, v in weights(trainer).items())


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"train__batch_tokens": 250}, "multiple of data.seq_len 32"),
        ({"train__micro_batch_rows": 3}, "does not divide the 8 rows"),
        ({"model__vocab_size": 100}, "tokenizer has 280 ids"),
        ({"model__context_length": 16}, "longer than model.context_length 16"),
        ({"data__train": {}}, "at least one source"),
        ({"runtime__device": "cuda"}, "no CUDA device"),
        ({"train__tokens": 0}, "at least 1"),
        ({"model": None}, "required unless init_from"),
        ({"run": ""}, "run: must name a folder"),
        ({"seed": 2**63}, "seed: must lie"),
        ({"train__micro_batch_rows": 0}, "micro_batch_rows: must be at least 1"),
        ({"train__micro_batch_rows": -1}, "micro_batch_rows: must be at least 1"),
        ({"train__max_grad_norm": -1.0}, "must not be negative"),
        ({"train__max_grad_norm": math.nan}, "must not be negative"),
        ({"evaluate": {"every_steps": 0}}, "evaluate.every_steps: must be at least 1"),
        ({"evaluate": {"rows": 0}}, "evaluate.rows: must be at least 1"),
        ({"evaluate": {"limit_rows": 0}}, "evaluate.limit_rows: must be at least 1"),
        ({"runtime__threads": 0}, "runtime.threads: must be at least 1"),
        ({"objective": {"z_loss": -1.0}}, "objective.z_loss"),
    ],
)
def test_parts_that_do_not_fit_are_named(recipe: Make, changes: dict[str, object], match: str) -> None:
    if "runtime__device" in changes and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(ConfigError, match=match):
        recipes.prepare(recipe(**changes))


def test_bits_per_byte_is_the_code_length_over_the_bytes_of_the_text(recipe: Make, corpus: Path) -> None:
    trainer = recipes.prepare(recipe())
    metrics = trainer.evaluator.evaluate(trainer.parallel, final=True)
    from internlm.data.shards import Shards

    shards = Shards.open(corpus / "held")
    scored = shards.num_tokens - shards.num_documents  # all but each document's first
    bits = metrics["valid/loss/held"] * scored / math.log(2)
    assert metrics["valid/bits_per_byte/held"] == pytest.approx(bits / shards.num_bytes, rel=1e-6)


def test_a_checkpoint_names_its_tensors_and_reads_them_one_by_one(recipe: Make, tmp_path: Path) -> None:
    trainer = recipes.prepare(recipe(train__tokens=2 * 256))
    trainer.fit()
    checkpoint = store.open_checkpoint(tmp_path / "run")
    assert checkpoint.step == 2
    assert checkpoint.config == trainer.model.config
    tensors = dict(lazy.tensors(checkpoint.weights()))
    assert tensors.keys() == weights(trainer).keys()
    assert all(torch.equal(tensors[name], value) for name, value in weights(trainer).items())
    assert checkpoint.tokenizer_path is not None
    assert (checkpoint.tokenizer_path / "tokenizer.json").exists()
    with pytest.raises(StorageError, match=r"model\.nonsense.*not in the checkpoint"):
        checkpoint.load({"model.nonsense": torch.zeros(1)})


def test_a_damaged_checkpoint_is_passed_over(recipe: Make, tmp_path: Path) -> None:
    value = recipe(train__tokens=4 * 256, checkpoint={"every_steps": 2})
    recipes.prepare(value).fit()
    newest = listing.newest(tmp_path / "run" / "checkpoints")
    assert newest is not None
    assert newest.name == "step-00000004"
    victim = max((newest / "tensors").iterdir(), key=lambda p: p.stat().st_size)
    victim.write_bytes(victim.read_bytes()[:-100])
    again = recipes.prepare(value)
    assert again.progress.step == 2
    again.fit()  # and written again
    assert listing.newest(tmp_path / "run" / "checkpoints") == newest
    store.open_checkpoint(newest).load({"random.cpu": torch.get_rng_state()})


def test_a_full_disk_is_noticed_before_anything_is_written(
    recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = recipes.prepare(recipe(train__tokens=4 * 256, checkpoint={"every_steps": 2}))
    trainer.stepper.step()
    kept = trainer.save()
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(StorageError, match="MiB left"):
        trainer.fit()
    assert listing.listed(tmp_path / "run" / "checkpoints") == [kept]


def test_validation_computes_in_the_data_type_of_the_run(recipe: Make) -> None:
    for dtype in ("bfloat16", "float32"):
        trainer = recipes.prepare(recipe(runtime__dtype=dtype))
        seen: list[bool] = []
        trainer.model.norm.register_forward_hook(lambda *_, seen=seen: seen.append(torch.is_autocast_enabled("cpu")))
        trainer.evaluator.evaluate(trainer.parallel, final=True)
        assert set(seen) == {dtype == "bfloat16"}


def test_nothing_to_score_is_no_loss_of_zero(recipe: Make) -> None:
    trainer = recipes.prepare(recipe())
    assert all(map(math.isnan, score(trainer.parallel, iter([]), trainer.evaluator.label_bytes)))


def test_metrics_are_json_whatever_the_numbers(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "m.jsonl", 0)
    file.write(1, {"train/loss": math.nan, "optim/grad_norm": math.inf, "progress/tokens": 1})
    file.close()
    assert "NaN" not in (tmp_path / "m.jsonl").read_text()
    wanted = {"step": 1, "train/loss": None, "optim/grad_norm": None, "progress/tokens": 1}
    assert read_metrics(tmp_path / "m.jsonl") == [wanted]


def test_a_plot_leaves_out_what_is_not_finite_and_takes_any_title(tmp_path: Path, plots: None) -> None:
    pytest.importorskip("matplotlib")
    lines = [{"progress/tokens": n, "train/loss": 3.0 - n if n else None, "optim/lr": 1.0} for n in range(4)]
    path = plot.loss_curve(lines, tmp_path / "loss.png", r"runs/$\nothing$")
    assert path is not None
    assert path.read_bytes().startswith(b"\x89PNG")


def test_trackers_are_closed_however_a_run_ends(recipe: Make) -> None:
    class Recorder:
        closed = False

        def write(self, step: int, metrics: dict[str, float]) -> None:
            pass

        def close(self) -> None:
            self.closed = True

    trainer = recipes.prepare(recipe())
    recorder = Recorder()
    trainer.trackers = [recorder]
    trainer.stepper.step = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    assert recorder.closed


def interrupted() -> dict[str, float]:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_full_device_memory_is_explained(recipe: Make, error: RuntimeError) -> None:
    trainer = recipes.prepare(recipe())

    def full(*inputs: torch.Tensor) -> torch.Tensor:
        raise error

    trainer.model.forward = full  # type: ignore[method-assign]
    with pytest.raises(TrainingError, match=r"memory of cpu is full: .*micro_batch_rows"):
        trainer.fit()


def test_a_model_beyond_the_memory_is_refused_before_it_is_built(recipe: Make) -> None:
    shape = {"model__vocab_size": 10**9, "model__hidden_size": 10**5, "model__num_heads": 1000, "model__head_dim": 100}
    with pytest.raises(ConfigError, match=r"model: training 200T parameters takes more than .* GiB and cpu has"):
        recipes.prepare(recipe(**shape))


def test_describe_lists_every_value_with_its_origin_and_the_sizes(tmp_path: Path, corpus: Path) -> None:
    path = tmp_path / "r.yaml"
    source = json.dumps({"a": {"path": str(corpus / "a")}})
    path.write_text(
        f"run: {tmp_path / 'run'}\nmodel: {{preset: internlm-7b, num_layers: 2}}\n"
        f"data:\n  seq_len: 2048\n  train: {source}\ntrain: {{tokens: 1e9, batch_tokens: 4194304}}\n"
    )
    text = recipes.describe(recipes.load(path, ["optim.lr=2e-4"]))
    rows = {line.split()[0]: line for line in text.splitlines() if line}
    assert rows["model.hidden_size"].split()[1:] == ["4096", "preset", "internlm-7b"]
    assert rows["model.num_layers"].endswith("r.yaml:2")
    assert rows["optim.lr"].split()[1:] == ["0.0002", "command", "line"]
    assert rows["optim.eps"].endswith("default")
    assert "239" in rows["steps"]
    assert "4,194,304" in rows["tokens"] or "tokens per step   4,194,304" in text
