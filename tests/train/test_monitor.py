"""The dashboard of a run: from files that may be missing, damaged, or written at this moment."""

from __future__ import annotations

import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from internlm import recipe as recipes
from internlm.cli import main
from internlm.errors import StorageError
from internlm.recipe import Recipe
from internlm.train.metrics import MetricsFile
from internlm.train.watch.monitor import WARNINGS, Lines, Monitor, clip, lines, noted, spark
from tests import processes
from tests.conftest import recipe_over

pexpect = pytest.importorskip("pexpect")
Make = Callable[..., Recipe]


@pytest.fixture(scope="module")
def trained(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("trained") / "run"
    every = {"evaluate": {"every_steps": 4}, "checkpoint": {"every_steps": 6}}
    recipes.prepare(recipe_over(corpus, run, train__tokens=12 * 256, **every)).fit()
    return run


@pytest.fixture
def done(trained: Path, tmp_path: Path) -> Path:
    """Return a run that was trained to its end."""
    return shutil.copytree(trained, tmp_path / "run")


def facts(run: Path) -> dict[str, Any]:
    watch = Monitor(run)
    watch.look()
    return watch.facts()


def picture(run: Path, width: int = 100) -> str:
    return "\n".join(text for _, text in lines(facts(run), width))


def run_file(run: Path, tokens: int = 1000, batch_tokens: int = 10) -> None:
    run.mkdir(exist_ok=True)
    (run / "recipe.yaml").write_text(f"train: {{tokens: {tokens}, batch_tokens: {batch_tokens}}}\n")


def beat(run: Path, rank: int, phase: str = "train", step: int = 5, age_s: float = 0.0) -> None:
    path = run / "alive" / f"rank-{rank:05d}.json"
    path.parent.mkdir(exist_ok=True)
    when = time.time() - age_s
    path.write_text(json.dumps({"time": when, "step": step, "phase": phase, "host": f"node{rank}", "pid": 1}))
    os.utime(path, (when, when))


def test_a_finished_run_is_shown_with_all_there_is(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["monitor", str(done), "--once"]) == 0
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    assert "done · step 12/12" in shown
    assert "100.0%" in shown
    for word in ("loss ", "grad ", "lr ", "tok/s/device · mfu", "goodput ", "held out  held", "1 of 1 heard of · done"):
        assert word in shown, word
    assert shown.count("complete") == 2
    assert "step 6 · " in shown
    assert all(len(line) <= 80 for line in shown.splitlines())
    found = facts(done)
    assert len(found["curves"]["train/loss"]) == 12
    assert found["curves"]["train/loss"][-1] == found["metrics"]["train/loss"]
    assert found["best"]["valid/loss/held"]["step"] == 12
    assert found["goodput"]["useful"] > 0


def test_json_holds_the_same_facts(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["monitor", str(done), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["state"], found["step"], found["steps"]) == ("done", 12, 12)
    assert [one["problem"] for one in found["checkpoints"]] == [None, None]


def test_a_run_without_metrics_yet_is_shown(tmp_path: Path) -> None:
    run_file(tmp_path / "run")
    shown = picture(tmp_path / "run")
    assert "unknown · step 0/100" in shown
    assert "no metrics yet" in shown
    assert "no checkpoint yet" in shown


def test_what_is_no_run_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(StorageError, match="no such folder"):
        Monitor(tmp_path / "nothing")
    assert main(["monitor", str(tmp_path)]) == 1
    assert "holds no run" in capsys.readouterr().err
    assert main(["monitor", str(tmp_path), "--every", "0"]) == 2


@pytest.mark.parametrize("name", ["recipe.yaml", "metrics.jsonl", "goodput.json", WARNINGS, "alive/rank-00000.json"])
def test_damaged_files_are_passed_over(done: Path, name: str) -> None:
    for text in (b"", b"\xff\x00{", b"[1, 2]\n", b'{"step": "x", "train": 3}\n', b'"text"\n' * 3):
        (done / name).write_bytes(text)
        shown = picture(done)
        assert "step 12/" in shown or name == "metrics.jsonl", text
        assert "complete" in shown, text


def test_damaged_checkpoints_are_shown_as_such(done: Path) -> None:
    manifests = sorted((done / "checkpoints").glob("step-*/manifest.json"))
    manifests[0].write_text("{}")
    shown = picture(done)
    assert "step 12/12" in shown
    manifests[0].unlink()
    assert "not finished" in picture(done)


def test_metrics_of_every_kind_of_nonsense_leave_the_rest(tmp_path: Path) -> None:
    run_file(tmp_path / "run")
    values = ["null", "NaN", '"x"', "[1]", "true", "1e999", "2.5"]
    text = "".join(f'{{"step": {i}, "train/loss": {value}}}\n' for i, value in enumerate(values))
    (tmp_path / "run" / "metrics.jsonl").write_text(text + '{"step": 9, "train/lo')
    found = facts(tmp_path / "run")
    assert found["metrics"] == {"train/loss": 2.5}
    assert found["step"] == 6
    assert json.loads(json.dumps(found)) == found


def test_a_file_that_grows_or_is_cut_is_read_on(tmp_path: Path) -> None:
    run_file(tmp_path / "run")
    path = tmp_path / "run" / "metrics.jsonl"
    watch = Monitor(tmp_path / "run")
    watch.look()
    file = MetricsFile(path, 0)
    for step in range(1, 6):
        file.write(step, {"train/loss": float(step)})
    watch.look()
    assert list(watch.curves["train/loss"]) == [1, 2, 3, 4, 5]
    watch.look()
    assert len(watch.curves["train/loss"]) == 5
    file.cut(3)  # a rollback
    file.write(4, {"train/loss": 40.0})
    watch.look()
    assert list(watch.curves["train/loss"]) == [1, 2, 3, 40]
    with open(path, "a") as raw:
        raw.write('{"step": 5, "train/')
    watch.look()
    assert watch.step == 4
    with open(path, "a") as raw:
        raw.write('loss": 50.0}\n')
    watch.look()
    assert watch.last["train/loss"] == 50


def test_a_large_file_is_read_once(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text("".join(f'{{"step": {step}}}\n' for step in range(1000)))
    reader = Lines(path)
    assert len(reader.new()[1]) == 1000
    with open(path, "a") as file:
        file.write('{"step": 1000}\n')
    assert reader.new() == (False, [{"step": 1000}])
    path.unlink()
    assert reader.new() == (False, [])


def test_the_time_left_is_that_of_the_last_steps(tmp_path: Path) -> None:
    run_file(tmp_path / "run")
    beat(tmp_path / "run", 0)
    text = "".join(f'{{"step": {step}, "perf/step_s": {99 if step < 5 else 2}}}\n' for step in range(1, 41))
    (tmp_path / "run" / "metrics.jsonl").write_text(text)
    assert facts(tmp_path / "run")["eta_s"] == 60 * 2
    assert "eta 2m00s" in picture(tmp_path / "run")


def test_ranks_that_are_silent_are_named(tmp_path: Path) -> None:
    run_file(tmp_path / "run")
    for rank in range(4):
        beat(tmp_path / "run", rank, age_s=100 if rank == 2 else 1)
    shown = picture(tmp_path / "run")
    assert "running · step 5/100" in shown
    assert "3 of 4 heard of" in shown
    assert "rank 2 on node2 silent for 1m40s, in train after step 5" in shown


@pytest.mark.parametrize(
    ("phases", "age_s", "state"),
    [
        (["train", "save"], 0, "running"), (["train", "train"], 100, "silent"), (["done", "done"], 100, "done"),
        (["stopped", "train"], 0, "stopped"), (["failed", "train"], 100, "failed"), (["done", "train"], 0, "running"),
    ],
)  # fmt: skip
def test_the_state_of_a_run_is_that_of_its_ranks(tmp_path: Path, phases: list[str], age_s: float, state: str) -> None:
    run_file(tmp_path / "run")
    for rank, phase in enumerate(phases):
        beat(tmp_path / "run", rank, phase, age_s=age_s)
    assert facts(tmp_path / "run")["state"] == state


def test_warnings_and_the_error_that_ends_a_run_are_kept_and_shown(recipe: Make, tmp_path: Path) -> None:
    trainer = recipes.prepare(recipe())
    step = trainer.stepper.step

    def broken() -> dict[str, float]:
        if trainer.progress.step == 2:
            logging.getLogger("internlm.train.trainer").warning("warning: step 2: a \x1b[31mred\x07 thing")
            raise RuntimeError("the cable\nis loose")
        return step()

    trainer.stepper.step = broken  # type: ignore[method-assign]
    with pytest.raises(RuntimeError):
        trainer.fit()
    found = facts(tmp_path / "run")
    assert [one["text"] for one in found["warnings"]] == [
        "warning: step 2: a \x1b[31mred\x07 thing", "ended: RuntimeError: the cable\nis loose"
    ]  # fmt: skip
    assert found["state"] == "failed"
    shown = picture(tmp_path / "run")
    assert "step 2: a  [31mred  thing" in shown, "nothing moves the cursor"
    assert "ended: RuntimeError: the cable is loose" in shown
    assert not any(type(handler).__name__ == "_Writer" for handler in logging.getLogger("internlm").handlers)


def test_the_file_of_warnings_does_not_grow_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("internlm.train.watch.monitor._MOST_BYTES", 1000)
    with noted(tmp_path):
        for number in range(200):
            logging.getLogger("internlm.x").warning("number %d", number)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 2500
    assert "number 199" in (tmp_path / WARNINGS).read_text()


def test_warnings_that_cannot_be_kept_do_no_harm(tmp_path: Path) -> None:
    (tmp_path / WARNINGS).mkdir()
    with noted(tmp_path):
        logging.getLogger("internlm.x").warning("nobody keeps this")


def test_skipped_steps_spikes_and_rollbacks_are_counted(recipe: Make, tmp_path: Path) -> None:
    trainer = recipes.prepare(
        recipe(train__tokens=8 * 256, spikes={"policy": "rollback"}, checkpoint={"every_steps": 3, "background": False})
    )
    spikes = iter([None] * 5 + [20.0] + [None] * 10)
    trainer.stepper.spikes.add = lambda _: next(spikes)  # type: ignore[method-assign]
    trainer.fit()
    assert "skipped steps 0 · spikes 1 · rollbacks 1" in picture(tmp_path / "run")


def test_a_picture_can_be_taken_at_any_moment_of_a_run(recipe: Make, tmp_path: Path) -> None:
    trainer = recipes.prepare(
        recipe(train__tokens=16 * 256, checkpoint={"every_steps": 3}, evaluate={"every_steps": 5})
    )
    training = threading.Thread(target=trainer.fit)
    training.start()
    watch, steps = Monitor(tmp_path / "run"), []
    watch._surveyed = float("inf")
    try:
        while training.is_alive():
            watch._surveyed = float("-inf")  # every time, while old checkpoints are removed
            watch.look()
            found = watch.facts()
            assert lines(found, 60)
            steps.append(found["step"])
    finally:
        training.join()
    assert steps == sorted(steps)
    assert len(set(steps)) > 2


def test_lines_fit_any_width(done: Path) -> None:
    found = facts(done)
    for width in (20, 40, 80, 200):
        assert all(len(text) <= width for _, text in lines(found, width))


@pytest.mark.parametrize(("text", "width", "wanted"), [("abc", 3, "abc"), ("abcd", 3, "ab…"), ("训练训练", 5, "训练…")])
def test_clipping_counts_columns(text: str, width: int, wanted: str) -> None:
    got = clip(text, width)
    assert got in (wanted, wanted.replace("练…", "…"))


def test_a_curve_shows_where_values_are_high() -> None:
    assert spark([1, 2, 3, 4], 4, "01234567") == "0257"
    assert spark([0, 0, 8, 8], 2, "01234567") == "07"
    assert spark([3.0] * 5, 3, "01234567") == "000"
    assert spark([], 3) == ""


def terminal(run: Path, **environment: str) -> Any:
    known = processes.environment()
    settings = {name: value for name, value in known.items() if name not in ("NO_COLOR", "COLUMNS", "LINES")}
    command = [*processes.INTERNLM, "monitor", str(run), "--every", "0.2"]
    return pexpect.spawn(
        command[0], command[1:], env={**settings, "TERM": "xterm", **environment}, dimensions=(24, 70), timeout=60,
        encoding="utf-8",
    )  # fmt: skip


def test_a_terminal_shows_a_run_until_it_is_done_and_is_left_as_it_was(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run_file(run, tokens=100)
    beat(run, 0, step=3)
    shown = terminal(run)
    shown.expect_exact("\x1b[?1049h\x1b[?25l")
    shown.expect_exact("\x1b[32m")
    shown.expect_exact("running · step 3/10")
    beat(run, 0, step=7)
    shown.expect_exact("running · step 7/10")
    beat(run, 0, "done", step=10)
    shown.expect_exact("done · step 10/10")
    shown.expect_exact("\x1b[?25h\x1b[?1049l")
    shown.expect_exact("done · step 10/10")
    shown.expect(pexpect.EOF)
    shown.close()
    assert shown.exitstatus == 0


@pytest.mark.parametrize(("sign", "code"), [("\x03", 0), (None, 143)])
def test_an_interrupt_gives_the_terminal_back(tmp_path: Path, sign: str | None, code: int) -> None:
    run_file(tmp_path / "run")
    beat(tmp_path / "run", 0)
    shown = terminal(tmp_path / "run", NO_COLOR="1")
    shown.expect_exact("running")
    assert "\x1b[32m" not in shown.before, "NO_COLOR"
    if sign:
        shown.send(sign)
    else:
        shown.kill(15)
    shown.expect_exact("\x1b[?25h\x1b[?1049l")
    shown.expect(pexpect.EOF)
    shown.close()
    assert shown.exitstatus == code


def test_without_unicode_curves_are_drawn_in_ascii(done: Path) -> None:
    shown = processes.internlm("monitor", str(done), "--once", PYTHONIOENCODING="ascii")
    assert shown.returncode == 0, shown.stderr
    assert "####" in shown.stdout


def test_the_help_is_short_and_comes_without_torch() -> None:
    done = processes.internlm("monitor", "--help", PYTHONPROFILEIMPORTTIME="1")
    assert done.returncode == 0
    assert len(done.stdout.splitlines()) <= 24
    assert "internlm.cli" in done.stderr, "imports are told"
    assert "torch" not in done.stderr


def test_a_number_that_is_none_now_is_not_shown_as_it_was(tmp_path: Path) -> None:
    run_file(tmp_path / "run")
    lines = [{"step": 1, "train/loss": 2.0, "optim/lr": 1e-3}, {"step": 2, "train/loss": None}]
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert facts(tmp_path / "run")["metrics"] == {"optim/lr": 1e-3}
