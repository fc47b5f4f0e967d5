"""Windows in which a run is looked at: what communication costs, where time and memory go."""

from __future__ import annotations

import errno
import gzip
import json
import logging
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from internlm import compat
from internlm import recipe as recipes
from internlm.compat import Event
from internlm.errors import ConfigError, TrainingError
from internlm.recipe import Recipe
from internlm.train.metrics import read_metrics
from internlm.train.profile import windows
from internlm.train.profile.modules import ModuleTable
from internlm.train.profile.operators import STEP, family, length, outside, self_times, table
from internlm.train.profile.windows import ProfileConfig, Resident, Trace, Windows, resident_bytes, spans
from internlm.train.stop import Reason, Stopped

Make = Callable[..., Recipe]
INTERVALS = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)).map(lambda ends: (min(ends), max(ends))))
WINDOW = {"start": 3, "steps": 2}


# What communication costs.


@given(INTERVALS, INTERVALS)
def test_lengths_are_those_of_counting_every_moment(
    first: list[tuple[int, int]], second: list[tuple[int, int]]
) -> None:
    def moments(intervals: list[tuple[int, int]]) -> set[int]:
        return {moment for begin, end in intervals for moment in range(begin, end)}

    assert length(first) == len(moments(first))
    assert outside(first, second) == len(moments(first) - moments(second))


def test_what_was_not_noted_is_unknown() -> None:
    with Trace(torch.device("cpu")) as trace:
        torch.ones(3).sum()
    assert math.isnan(trace.waiting_s)  # nothing was exchanged here


def test_operators_count_on_a_cpu_and_kernels_on_a_gpu() -> None:
    events = [
        Event("aten::mm", 0, 4, False, 1),
        Event("gloo:all_reduce", 3, 9, False, 2),
        Event("c10d::allreduce_", 3, 9, False, 1),  # the call that waits for it
        Event("autograd::engine::evaluate_function: MmBackward0", 0, 20, False, 1),
        Event("ncclDevKernel_AllGather_RING_LL", 10, 16, True, 1),
        Event("nvjet_tst_256x128", 12, 14, True, 1),
    ]
    assert spans(events, False) == ([(3, 9)], [(0, 4)])
    assert spans(events, True) == ([(10, 16)], [(12, 14)])


# When.


def test_a_window_is_traced_steps_and_two_for_the_table() -> None:
    config = ProfileConfig(start=3, steps=2, every=6, modules=True)
    kinds = [config.at(step) for step in range(1, 15)]
    window = ["trace", "trace", "bytes", "times"]
    assert kinds == [None, None, *window, None, None, *window, None, None]
    assert [step for step in range(40) if ProfileConfig(start=3, steps=2).at(step)] == [3, 4]
    assert not any(ProfileConfig().at(step) for step in range(40))


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"every": 3}, "profile.every"),
        ({"every": 5, "modules": True}, "profile.every"),
        ({"steps": 21}, "profile.steps"),
        ({"start": 0}, "profile.start"),
        ({"ranks": [0, -1]}, "profile.ranks"),
        ({"depth": -1}, "profile.depth"),
    ],
)
def test_windows_that_cannot_be_are_refused(recipe: Make, change: dict[str, Any], where: str) -> None:
    with pytest.raises(ConfigError, match=where):
        recipe(profile={"start": 1, **change})


@given(
    every=st.integers(1, 7),
    start=st.integers(1, 9),
    steps=st.integers(1, 4),
    again=st.none() | st.integers(1, 5),
    modules=st.booleans(),
)
def test_every_trace_of_communication_is_taken_outside_of_windows(
    every: int, start: int, steps: int, again: int | None, modules: bool
) -> None:
    config = ProfileConfig(start=start, steps=steps, modules=modules)
    if again is not None:
        config = ProfileConfig(start=start, steps=steps, modules=modules, every=config.length + again)
    stepper: Any = SimpleNamespace(
        parallel=SimpleNamespace(device=torch.device("cpu"), rank=0, layout=SimpleNamespace(world_size=2))
    )
    windows = Windows(config, Path("nowhere"), stepper, every)
    expected, owed = [], False
    for step in range(1, 60):
        owed |= (step - 1) % every == 1 % every
        is_free = config.at(step) is None
        expected.append(owed and is_free)
        owed &= not is_free
    assert [windows.traces(step) for step in range(1, 60)] == expected


# What ran.


def test_times_are_those_of_operators_without_what_they_call() -> None:
    events = [
        Event("outer", 0, 100, False, 1),
        Event("inner", 10, 40, False, 1),
        Event("innermost", 20, 25, False, 1),
        Event("inner", 40, 60, False, 1),
        Event("elsewhere", 30, 50, False, 2),
    ]
    found: Counter[str] = Counter()
    for name, spent in self_times(events):
        found[name] += spent
    assert found == {"outer": 50, "inner": 45, "innermost": 5, "elsewhere": 20}


def test_kernels_inside_the_steps_are_summed_by_family_and_by_name() -> None:
    ms = 1_000_000
    text = table(
        [
            Event(STEP, 0, 10 * ms, False, 1),
            Event(STEP, 20 * ms, 30 * ms, False, 1),
            Event(STEP, 0, 10 * ms, True, 0),  # the device's side of the range
            Event("aten::mm", 1 * ms, 3 * ms, False, 1),
            Event("nvjet_tst_256x128", 1 * ms, 5 * ms, True, 0),
            Event("nvjet_tst_256x128", 21 * ms, 25 * ms, True, 0),
            Event("pytorch_flash::flash_fwd_kernel<...>", 25 * ms, 27 * ms, True, 0),
            Event("nvjet_tst_256x128", 12 * ms, 18 * ms, True, 0),  # between the steps
        ],
        "steps 3 to 4",
    )
    assert text.startswith("steps 3 to 4: 2 × 10.0 ms, by kernels\n")
    rows = {line[:72].strip(): line[72:].split() for line in text.splitlines() if "%" in line}
    assert rows["matmul"] == ["4.000", "40.0%"]
    assert rows["attention"] == ["1.000", "10.0%"]
    assert rows["nothing runs"] == ["5.000", "50.0%"]
    assert rows["nvjet_tst_256x128"] == ["1", "4.000", "40.0%"]
    assert rows["aten::mm"][1:] == ["1.000", "10.0%"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"),
        ("mkldnn::_linear_pointwise", "matmul"),
        ("ncclDevKernel_AllGather_RING_LL", "communication"),
        ("gloo:all_reduce", "communication"),
        ("void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor>", "optimizer"),
        ("## Call CompiledFxGraph f3 ##", "compiled"),
        ("_ZN17something_unknown", "other"),
    ],
)
def test_names_have_families(name: str, expected: str) -> None:
    assert family(name) == expected


# Windows of a run.


def steps_traced(path: Path) -> int:
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    return sum(event.get("name") == STEP and event.get("cat") == "user_annotation" for event in events)


def files(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "profile").iterdir())


def train(recipe: Recipe) -> list[dict[str, Any]]:
    recipes.prepare(recipe).fit()
    return read_metrics(Path(recipe.run) / "metrics.jsonl")


def test_a_window_leaves_its_files_and_no_other_step_is_touched(
    recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = []
    start = compat.start_profiler
    monkeypatch.setattr(
        compat, "start_profiler", lambda *a, **k: started.append(trainer.progress.step) or start(*a, **k)
    )
    trainer = recipes.prepare(
        recipe(train__tokens=9 * 256, profile={**WINDOW, "every": 5, "memory": True, "modules": True})
    )
    seen = {}
    step = trainer.stepper.step

    def looked() -> Any:
        number = trainer.progress.step + 1
        seen[number] = trainer.model.norm._compiled_call_impl is not None, "step" in vars(trainer.stepper.optimizer)
        return step()

    monkeypatch.setattr(trainer.stepper, "step", looked)
    trainer.fit()
    assert started == [2, 7]
    assert {number: flags for number, flags in seen.items() if any(flags)} == {
        3: (False, True), 4: (False, True), 5: (True, True), 6: (True, True), 8: (False, True), 9: (False, True),
    }  # fmt: skip
    run = tmp_path / "run"
    stems = [f"step-0000000{number}-rank-0" for number in (3, 8)]
    expected = [f"{stem}.{kind}" for stem in stems for kind in ("json.gz", "memory.txt", "txt")]
    assert files(run) == sorted(["modules.json", "modules.txt", *expected])
    assert [steps_traced(run / "profile" / f"{stem}.json.gz") for stem in stems] == [2, 2]
    text = (run / "profile" / f"{stems[0]}.txt").read_text()
    assert text.startswith("steps 3 to 4, rank 0: 2 × ")
    assert {"matmul", "attention", "nothing runs"} <= {line.rsplit(maxsplit=2)[0] for line in text.splitlines() if line}
    memory = (run / "profile" / f"{stems[0]}.memory.txt").read_text()
    assert [line.rsplit(maxsplit=2)[0] for line in memory.splitlines()[2:]] == [
        "data", "forward and backward", "update", "rest",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        {
            "model__experts": {"count": 4, "per_token": 2},
            "parallel__recompute": {"kind": "operators"},
            "profile__depth": 2,
        },
        {
            "optim": {"lr": 3e-3, "state_dtype": "int8"},
            "parallel__recompute": {"kind": "offload", "ratio": 0.5},
            "profile__depth": 0,
        },
        pytest.param({"parallel__recompute": {"kind": "full"}, "model__tie_embeddings": True}, marks=pytest.mark.proof),
    ],
    ids=["operators, experts", "offload, int8", "full, tied"],
)
def test_looking_changes_no_number(recipe: Make, tmp_path: Path, change: dict[str, Any]) -> None:
    def losses(**more: Any) -> list[float]:
        made = recipe(run=str(tmp_path / str(len(more))), train__tokens=4 * 256, train__micro_batch_rows=4, **more)
        return [line["train/step_loss"] for line in train(made) if "train/step_loss" in line]

    window = {"start": 1, "steps": 1, "memory": True, "modules": True, "depth": change.pop("profile__depth", 1)}
    plain = losses(**change)
    assert losses(**change, profile=window) == plain
    assert (tmp_path / str(len(change) + 1) / "profile" / "modules.txt").exists()


def test_a_run_that_goes_on_inside_a_window_looks_at_the_rest_of_it(recipe: Make, tmp_path: Path) -> None:
    made = recipe(train__tokens=8 * 256, profile={"start": 3, "steps": 4})
    trainer = recipes.prepare(made)
    trainer.stop.wish = lambda: float(Reason.FILE.value) if trainer.progress.step == 3 else 0.0  # type: ignore[method-assign]
    with pytest.raises(Stopped):
        trainer.fit()
    folder = tmp_path / "run" / "profile"
    assert files(tmp_path / "run") == ["step-00000003-rank-0.json.gz", "step-00000003-rank-0.txt"]
    train(made)
    traced = {path.name: steps_traced(path) for path in folder.glob("*.gz")}
    assert traced == {"step-00000003-rank-0.json.gz": 2, "step-00000005-rank-0.json.gz": 2}


def test_a_window_that_the_end_of_the_run_cuts_is_written(recipe: Make, tmp_path: Path) -> None:
    train(recipe(train__tokens=4 * 256, profile={"start": 4, "steps": 3, "modules": True}))
    assert files(tmp_path / "run") == ["step-00000004-rank-0.json.gz", "step-00000004-rank-0.txt"]


def test_a_run_that_goes_back_looks_again(recipe: Make, tmp_path: Path) -> None:
    trainer = recipes.prepare(recipe(train__tokens=9 * 256, profile=WINDOW))
    for number in (1, 2, 3, 2, 3, 4, 5):
        with trainer.windows.step(number):
            trainer.stepper.step()
    path = tmp_path / "run" / "profile" / "step-00000003-rank-0.json.gz"
    assert steps_traced(path) == 2
    assert trainer.windows._trace is None


@pytest.mark.parametrize("fails", ["full disk", "no folder", "profiler", "table", "sizes"])
def test_a_profiler_that_fails_is_a_warning(
    recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fails: str
) -> None:
    def fail(*arguments: Any, **named: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    if fails == "full disk":
        monkeypatch.setattr(windows.shutil, "copyfileobj", fail)
    elif fails == "no folder":
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "profile").write_text("in the way")
    elif fails == "profiler":
        monkeypatch.setattr(compat, "start_profiler", fail)
    else:
        monkeypatch.setattr(ModuleTable, "_places" if fails == "table" else "_keep", fail)
    with caplog.at_level(logging.WARNING, "internlm"):
        window = {"start": 1, "steps": 1, "modules": True, "every": 4}
        lines = train(recipe(train__tokens=5 * 256, profile=window))
    assert len([line for line in lines if "train/loss" in line]) == 5
    warnings = [record.message for record in caplog.records if "profile" in record.message or "table" in record.message]
    assert len(warnings) == 1, "one warning, and then no more windows"
    if fails in ("full disk", "table", "sizes"):
        assert not [name for name in files(tmp_path / "run") if "partial" in name or "plain" in name]


def test_what_opening_and_writing_takes_is_not_in_the_time_of_steps(
    recipe: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack = windows._pack
    monkeypatch.setattr(windows, "_pack", lambda *a: windows.time.sleep(1.5) or pack(*a))
    lines = train(recipe(train__tokens=3 * 256, profile={"start": 2, "steps": 1}))
    assert max(line["perf/step_s"] for line in lines if "perf/step_s" in line) < 1.5


def test_ranks_that_are_not_there_are_a_warning(recipe: Make, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "internlm"):
        recipes.prepare(recipe(profile={"start": 2, "ranks": [0, 77]}))
    assert "profile.ranks [77]: there are 1 ranks" in caplog.text


# Memory.


@pytest.mark.skipif(resident_bytes() is None, reason="the system does not tell")
def test_the_most_that_a_phase_held_is_seen() -> None:
    resident = Resident(True)
    with resident.phase("update"):
        held = torch.ones(2**25)  # 128 MiB
        held.sum()
        windows.time.sleep(0.05)
        del held
    with resident.phase("data"):
        pass
    resident.stop()
    end, most = resident.held["update"]
    assert most - end > 2**26
    assert resident.held["data"][1] < most
    assert resident.as_text().splitlines()[-1].startswith("rest")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A GPU whose memory is noted by nobody: what is asked of it, in order."""
    asked: list[str] = []

    def dump(path: str) -> None:
        asked.append("dump")
        Path(path).write_bytes(b"snapshot")

    monkeypatch.setattr(compat, "record_memory", lambda entries: asked.append(f"record {entries > 0}"))
    monkeypatch.setattr(compat, "dump_memory", dump)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: asked.append("wait"))
    start = compat.start_profiler
    monkeypatch.setattr(compat, "start_profiler", lambda device, **k: start(torch.device("cpu"), **k))
    return asked


def test_on_a_gpu_allocations_are_noted_in_the_window_only(recipe: Make, tmp_path: Path, gpu: list[str]) -> None:
    trainer = recipes.prepare(recipe(profile={**WINDOW, "memory": True}))
    trainer.windows.device = torch.device("cuda")
    for number in range(1, 7):
        with trainer.windows.step(number):
            gpu.append(str(number))
    assert gpu == ["1", "2", "record True", "3", "wait", "4", "wait", "dump", "record False", "5", "6"]
    assert (tmp_path / "run" / "profile" / "step-00000003-rank-0.memory.pickle").read_bytes() == b"snapshot"


def test_memory_that_is_full_is_written_down(recipe: Make, tmp_path: Path, gpu: list[str]) -> None:
    trainer = recipes.prepare(recipe(profile={**WINDOW, "memory": True}))
    trainer.windows.device = torch.device("cuda")
    step = trainer.stepper.step

    def full() -> Any:
        if trainer.progress.step == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return step()

    trainer.stepper.step = full  # type: ignore[method-assign]
    with pytest.raises(TrainingError, match="is full"):
        trainer.fit()
    assert (tmp_path / "run" / "profile" / "oom-rank-0.pickle").read_bytes() == b"snapshot"
    assert gpu[-1] == "record False"  # the window that was open is closed too


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_kernels_snapshots_and_events_are_there(recipe: Make, tmp_path: Path) -> None:
    train(
        recipe(
            runtime={"device": "cuda"},
            train__tokens=7 * 256,
            profile={**WINDOW, "memory": True, "modules": True},
        )
    )
    folder = tmp_path / "run" / "profile"
    assert "by kernels" in (folder / "step-00000003-rank-0.txt").read_text().splitlines()[0]
    assert (folder / "step-00000003-rank-0.memory.pickle").stat().st_size > 1000
    found = json.loads((folder / "modules.json").read_text())
    rows = {row["name"]: row for row in found["rows"]}
    assert rows["blocks.*.attention"]["backward_s"] > 0
    assert sum(row[key] for row in found["rows"] for key in ("forward_s", "backward_s")) == pytest.approx(
        found["step_s"], rel=1e-3
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_full_gpu_leaves_a_snapshot(recipe: Make, tmp_path: Path) -> None:
    trainer = recipes.prepare(recipe(runtime={"device": "cuda"}))
    trainer.stepper.step = lambda: torch.empty(2**50, device="cuda")  # type: ignore[method-assign, assignment, return-value]
    with pytest.raises(TrainingError, match="is full"):
        trainer.fit()
    assert (tmp_path / "run" / "profile" / "oom-rank-0.pickle").stat().st_size > 0
