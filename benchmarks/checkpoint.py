"""Writing training state: what a step waits for, and how long it takes, beside torch.save and torch's own checkpoints.

    python benchmarks/checkpoint.py                                  # 134 M parameters with AdamW's states: 1.6 GB
    python benchmarks/checkpoint.py --shape small --repeats 5
    python benchmarks/checkpoint.py --ranks 1 2 --folder /data/scratch --out results.json

Each way to save takes its turn, with the folder emptied in between; the first turn warms up and is told apart, because
it makes the copies. `stall` is how long the training waits: in the call, and before the next update, a forward and
backward later (matrix products of about `--step-s`). `written` is how long until all is on the disk. While something
is written in the background the products go on: `pace` is how fast, as a share of their pace without a save.

Ours hashes what it writes and, like torch's checkpoints, syncs its files. torch.save does neither: the time of the sync
is added to `written`, but not to `stall`.
"""

from __future__ import annotations

import functools
import os
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import report
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import workers
from shapes import TOY, model_of
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard, init_device_mesh

from internlm import disk
from internlm.checkpoint.saver import Beside, Saver
from internlm.model.config import ModelConfig
from internlm.model.transformer import Transformer

PRESETS = {"small": "toy-8m", "134m": TOY}
OURS, WAITING, ASYNC = "internlm", "internlm, waiting", "dcp.async_save"
BACKGROUND = (OURS, ASYNC)
COLUMNS = {
    "ranks": "5d", "": "<18", "stall s": "8.3f", "first s": "8.3f", "share": "7.1%", "written s": "9.2f",
    "MB/s": "6.0f", "pace": "5.2f", "disk MB": "8.0f",
}  # fmt: skip
Wait = Callable[[], None]
Begun = tuple[Wait, Wait]
"""What waits until the state may change, and what waits until all is on the disk."""


def nothing() -> None:
    """Wait for nothing."""


def state_of(config: ModelConfig, world: int) -> dict[str, Tensor]:
    """Return weights and AdamW's moments; on several ranks each holds its part of them."""
    mesh = init_device_mesh("cpu", (world,)) if world > 1 else None
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in Transformer(config).named_parameters()}
    state: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        for slot in ("model.{}", "optim.{}.exp_avg", "optim.{}.exp_avg_sq"):
            own: Tensor = torch.empty(shape).normal_()
            if mesh is not None:
                own = DTensor.from_local(own.chunk(world)[dist.get_rank()].clone(), mesh, [Shard(0)])
            state[slot.format(name)] = own
    return state


def local(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.to_local() if isinstance(t, DTensor) else t for name, t in state.items()}


class Ways:
    """The ways to save."""

    def __init__(self, state: dict[str, Tensor], config: ModelConfig, folder: Path, rank: int) -> None:
        self.state, self.config, self.folder, self.rank = state, config, folder, rank
        self.savers: dict[bool, Saver] = {}

    def ours(self, background: bool) -> Begun:
        """Save as a training does."""
        if background not in self.savers:
            self.savers[background] = Saver(self.folder, background=background)
        saver = self.savers[background]
        saver.save("step-00000001", self.state, Beside(self.config, None, {"step": 1}))

        def wait() -> None:
            saved = saver.finish()
            assert saved is not None
            assert saved.problem is None, saved.problem

        return saver.copied, wait

    def plain(self) -> Begun:
        """Pickle what this rank holds."""
        path = self.folder / f"rank{self.rank}.pt"
        self.folder.mkdir(exist_ok=True)
        torch.save(local(self.state), path)

        def sync() -> None:
            with open(path, "rb") as file:
                os.fsync(file.fileno())

        return nothing, sync

    def torchs(self, background: bool) -> Begun:
        """Save with torch.distributed.checkpoint and its defaults."""
        if not background:
            dcp.save(self.state, checkpoint_id=self.folder)
            return nothing, nothing
        done = dcp.async_save(self.state, checkpoint_id=self.folder)
        return nothing, lambda: (getattr(done, "upload_completion", done)).result()

    def all(self) -> dict[str, Callable[[], Begun]]:
        """Return them by name."""
        return {
            OURS: functools.partial(self.ours, True),
            WAITING: functools.partial(self.ours, False),
            "torch.save": self.plain,
            "dcp.save": functools.partial(self.torchs, False),
            ASYNC: functools.partial(self.torchs, True),
        }


def together(world: int) -> None:
    if world > 1:
        dist.barrier()


def work(count: int) -> float:
    """Return the seconds of some matrix products."""
    a = torch.full((512, 512), 0.5)
    begun = time.perf_counter()
    for _ in range(count):
        a = (a @ a) * 0.001
    return time.perf_counter() - begun


def once(save: Callable[[], Begun], folder: Path, world: int, step_s: float) -> dict[str, float]:
    """Save once; return stall, time until written, the pace of work meanwhile, and bytes on the disk.

    Args:
        save: begins to save.
        folder: where.
        world: number of ranks.
        step_s: how long the forward and backward beside it take; 0: there is none.
    """
    if not dist.get_rank():
        shutil.rmtree(folder, ignore_errors=True)
        os.sync()
    together(world)
    idle = statistics.median(work(5) for _ in range(5))
    together(world)
    begun = time.perf_counter()
    copied, wait = save()
    stall = time.perf_counter() - begun
    busy = []
    while time.perf_counter() - begun < step_s:
        busy.append(work(5))
    paused = time.perf_counter()
    copied()
    stall += time.perf_counter() - paused

    def end() -> float:
        wait()
        return time.perf_counter() - begun

    with ThreadPoolExecutor(1) as pool:
        written = pool.submit(end)
        while step_s and not written.done():
            busy.append(work(5))
    found = {"stall_s": stall, "written_s": written.result()}
    together(world)
    if not dist.get_rank():  # which empties the folder next
        found["bytes"] = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return found | ({"pace": idle / statistics.fmean(busy)} if busy else {})


def do(job: dict[str, Any]) -> dict[str, Any]:
    """Measure, as one rank; return the bytes that it holds, and what each turn of each way took."""
    warnings.filterwarnings("ignore")
    rank, world, scratch = job["rank"], job["world"], Path(job["scratch"])
    torch.set_num_threads(max(1, job["threads"] // world))
    dist.init_process_group("gloo", init_method=f"file://{scratch}/store-{world}", rank=rank, world_size=world)
    config = model_of(PRESETS[job["shape"]])
    folder = scratch / "saved"
    state = state_of(config, world)
    ways = Ways(state, config, folder, rank).all()
    turns: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    for turn in range(job["repeats"] + 1):
        for name in list(ways) if turn % 2 else reversed(ways):
            turns[name].append(once(ways[name], folder, world, job["step_s"] if name in BACKGROUND else 0.0))
    return {"bytes": sum(tensor.nbytes for tensor in local(state).values()), "turns": turns}


def rows(everyone: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a row for each way: medians over turns of what the slowest rank took."""
    size = sum(rank["bytes"] for rank in everyone)
    found = []
    for name in everyone[0]["turns"]:

        def slowest(key: str, name: str = name) -> list[float]:
            return [
                max(turn[key] for turn in turns)
                for turns in zip(*(one["turns"][name] for one in everyone), strict=True)
            ]

        stalls, written = slowest("stall_s"), slowest("written_s")
        paces = [turn["pace"] for one in everyone for turn in one["turns"][name][1:] if "pace" in turn]
        found.append(
            {
                "ranks": len(everyone),
                "way": name,
                "stall_s": statistics.median(stalls[1:]),
                "stall_worst_s": max(stalls[1:]),
                "stall_first_s": stalls[0],
                "written_s": statistics.median(written[1:]),
                "mb_per_s": size / 1e6 / statistics.median(written[1:]),
                "pace": statistics.median(paces) if paces else None,
                "state_bytes": size,
                "disk_bytes": everyone[0]["turns"][name][-1]["bytes"],
            }
        )
    waited = next(row for row in found if row["way"] == WAITING)
    for row in found:
        row["stall_share"] = row["stall_s"] / waited["stall_s"]
    return found


def show(found: list[dict[str, Any]], table: report.Table) -> None:
    keys = ("ranks", "way", "stall_s", "stall_first_s", "stall_share", "written_s", "mb_per_s", "pace")
    for row in found:
        table.row(*(row[key] for key in keys), row["disk_bytes"] / 1e6)


def main() -> None:
    if workers.is_worker():
        workers.answer(do)
        return
    parser = report.parser(__doc__)
    parser.add_argument("--shape", choices=list(PRESETS), default="134m")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--step-s", type=float, default=0.5, help="length of a forward and backward")
    parser.add_argument("--threads", type=int, default=2, help="of all ranks together")
    parser.add_argument("--folder", type=Path, help="where to write; default: the folder for temporary files")
    options = parser.parse_args()
    config = model_of(PRESETS[options.shape])
    found: list[dict[str, Any]] = []
    table = report.Table(COLUMNS)
    settings = {name: getattr(options, name) for name in ("threads", "repeats", "step_s")}
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        disk.require_space(scratch, 3 * 12 * config.num_parameters, "the benchmark")
        for world in options.ranks:
            job = settings | {"shape": options.shape, "world": world, "scratch": scratch}
            jobs = [job | {"rank": rank} for rank in range(world)]
            variables = workers.on_cpu(max(1, options.threads // world))
            figures = rows(workers.together(__file__, jobs, timeout_s=3600, variables=variables))
            show(figures, table)
            found += figures
    model = {"preset": PRESETS[options.shape], "parameters": config.num_parameters, "state": "float32, 3 of each"}
    report.write(options.out, report.result(**model, **settings, rows=found))


if __name__ == "__main__":
    main()
