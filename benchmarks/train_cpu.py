"""Training throughput on the CPU: our Trainer and those of the libraries one would otherwise take, on the same model.

    python benchmarks/train_cpu.py                               # both shapes, three rounds, what is installed here
    python benchmarks/train_cpu.py --peer-python PEERS/bin/python --out results.json
    python benchmarks/train_cpu.py --shape A --only ours litgpt --allocator both

Every contender trains in fp32 with AdamW, gradient clipping at 1.0, untied embeddings and no biases, on full rows of
random tokens, one document each, and reads its loss after every step; all get the same threads and the same allocator
settings. Each runs in a fresh process, once per round; rounds go through the contenders forwards and backwards in
turn, so that a machine that slows down slows all alike. A round's figure is the median of its steps without the first;
the table shows the median over rounds, and the ratio to ours in the same round. The first step, which compiles, is
told apart: in round 1 from an empty cache of torch.compile, later from what round 1 left in it.

Peers: transformers with accelerate, torchtitan (0.3), litgpt. They may sit in a virtual environment of their own, so
that their pins do not meet ours: install the same torch there first, and numpy >= 2 last (litgpt 0.5.9 asks for less,
torchtitan's pyarrow for more; litgpt works with it). A peer that is missing or fails is a row that says why.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import logging
import math
import os
import platform
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peers import Trace


@dataclass(frozen=True)
class Shape:
    """A model and the cut of its steps."""

    hidden_size: int
    num_layers: int
    num_heads: int
    ffn_size: int
    vocab_size: int
    seq_len: int
    batch_rows: int

    @property
    def num_parameters(self) -> int:
        """Parameters of a decoder without biases, head and embedding apart."""
        block = 4 * self.hidden_size**2 + 3 * self.hidden_size * self.ffn_size + 2 * self.hidden_size
        return 2 * self.vocab_size * self.hidden_size + self.num_layers * block + self.hidden_size

    @property
    def batch_tokens(self) -> int:
        """Tokens of one step."""
        return self.batch_rows * self.seq_len


SHAPES = {
    "A": Shape(hidden_size=288, num_layers=6, num_heads=6, ffn_size=768, vocab_size=4096, seq_len=256, batch_rows=16),
    "B": Shape(
        hidden_size=768, num_layers=12, num_heads=12, ffn_size=2048, vocab_size=32000, seq_len=512, batch_rows=4
    ),
}
STEPS = {"A": 8, "B": 3}
LIBRARIES = ("ours", "transformers", "torchtitan", "litgpt")
NAMES = [name for library in LIBRARIES for name in (library, f"{library}+compile")]
REFERENCE = "ours"
PLAIN = "-plain"
"""Ends the name of ours without the allocator settings. Names are folders too, and compilers split paths at spaces."""


# The worker: one contender, one round, one process.


def work(job: dict[str, Any]) -> dict[str, Any]:
    """Train as the job says; return the step times, or what went wrong."""
    shape = Shape(**job["shape"])
    library, _, mode = job["name"].partition("+")
    try:
        import torch

        torch.set_num_threads(job["threads"])
        torch.manual_seed(0)
        if library == "ours":
            train = train_ours
        else:
            import peers

            train = peers.TRAIN[library]
        with tempfile.TemporaryDirectory() as folder:
            trace = train(shape, job["steps"] + 1, bool(mode), Path(folder))
    except Exception as error:  # whatever a peer raises becomes its row
        logging.exception("%s failed", job["name"])
        return {"error": f"{type(error).__name__}: {first_line(str(error))}"}
    if len(trace.losses) != job["steps"] + 1 or not all(map(math.isfinite, trace.losses)):
        return {"error": f"took {len(trace.losses)} of {job['steps'] + 1} steps, losses {trace.losses}"}
    spent = [after - before for before, after in zip(trace.marks_s, trace.marks_s[1:], strict=False)]
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes on macOS, KiB on Linux
    return {
        "first_step_s": spent[0],
        "step_s": spent[1:],
        "losses": trace.losses,
        "parameters": trace.parameters,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
        "threads": torch.get_num_threads(),
        "versions": versions("internlm" if library == "ours" else library),
    }


def train_ours(shape: Shape, steps: int, compiled: bool, folder: Path) -> Trace:
    """Train with the Trainer that a recipe gives; the loss is read after each step as with `log_every_steps: 1`."""
    import torch
    from peers import Trace

    from internlm import config
    from internlm.recipe import Recipe, prepare

    write_random_shards(folder / "data", shape, steps * shape.batch_rows)
    tree = tree_of(shape, steps, folder)
    tree["runtime"] |= {"compile": compiled, "threads": torch.get_num_threads()}
    trainer = prepare(config.decode(Recipe, tree))
    trace = Trace(sum(p.numel() for p in trainer.model.parameters()))
    trainer.meter.clear()
    trace.mark()
    for _ in range(steps):
        trainer.step()
        trace.mark(trainer.meter.read()["train/loss"])
        trainer.meter.clear()
    return trace


def tree_of(shape: Shape, steps: int, folder: Path) -> dict[str, Any]:
    """Return the recipe of a run over the random shards in `folder / "data"`."""
    from peers import LEARNING_RATE

    return {
        "run": str(folder / "run"),
        "model": {
            "vocab_size": shape.vocab_size,
            "hidden_size": shape.hidden_size,
            "num_layers": shape.num_layers,
            "num_heads": shape.num_heads,
            "ffn_size": shape.ffn_size,
            "context_length": shape.seq_len,
        },
        "data": {"seq_len": shape.seq_len, "pack": "whole", "train": {"random": {"path": str(folder / "data")}}},
        "train": {"tokens": steps * shape.batch_tokens, "batch_tokens": shape.batch_tokens, "max_grad_norm": 1.0},
        "optim": {"lr": LEARNING_RATE},
        "runtime": {"device": "cpu"},
    }


def write_random_shards(path: Path, shape: Shape, rows: int) -> None:
    """Write shards of random ids, one document per row: its last token is only a label, hence `seq_len + 1` tokens.

    The tokenizer beside them is the smallest there is; training does not ask it anything.
    """
    import numpy as np

    from internlm import storage
    from internlm.data import shards
    from internlm.text.training import train_bpe

    tokenizer = train_bpe(["some text for a tokenizer that is never used, some text"], 264)
    generator = np.random.default_rng(0)
    with storage.writing(path, shards.KIND) as out:
        writer = shards.ShardWriter(out.path, "00000", shape.vocab_size)
        for _ in range(rows):
            writer.add(generator.integers(shape.vocab_size, size=shape.seq_len + 1).tolist(), None, 0)
        (out.path / "tokenizer").mkdir()
        tokenizer.save(out.path / "tokenizer")
        out.meta.update(
            shards.meta(
                [writer.close()],
                vocab_size=shape.vocab_size,
                fingerprint=tokenizer.fingerprint,
                bos_id=tokenizer.bos_id,
                eos_id=tokenizer.eos_id,
                template=None,
            )
        )


def versions(library: str) -> dict[str, str]:
    """Return the versions that matter to a contender."""
    found = {"python": platform.python_version()}
    for name in ("torch", "numpy", library, *(("accelerate",) if library == "transformers" else ())):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # imported from a folder that was never installed
            found[name] = "unknown"
    if library == "internlm":
        from internlm.recipe import versions as ours

        found |= ours()
    return found


def answer_as_worker(job: dict[str, Any]) -> None:
    """Do a job and print its result as the one line on stdout, whatever the libraries print: that goes to stderr."""
    stdout = os.dup(1)
    os.dup2(2, 1)
    result = work(job)
    sys.stdout.flush()
    os.write(stdout, (json.dumps(result) + "\n").encode())


# The parent: rounds of workers, and the table.


def main() -> None:
    """Measure and print."""
    if sys.argv[1:2] == ["--worker"]:
        answer_as_worker(json.loads(sys.argv[2]))
        return
    options = parse_options()
    names = [name for name in NAMES if name in options.only]
    if options.allocator == "both":
        names += [name + PLAIN for name in names if name.startswith("ours")]
    report: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
        "command": shlex.join(["python", "benchmarks/train_cpu.py", *sys.argv[1:]]),
        "machine": machine(),
        "threads": options.threads,
        "allocator": options.allocator,
        "dtype": "float32",
        "shapes": {},
    }
    for letter in options.shape:
        steps = options.steps or STEPS[letter]
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
        facts = {"parameters": SHAPES[letter].num_parameters, "steps": steps}
        report["shapes"][letter] = asdict(SHAPES[letter]) | facts | {"runs": runs}
        with tempfile.TemporaryDirectory() as caches:
            for number in range(options.rounds):
                for name in names if number % 2 == 0 else names[::-1]:
                    print(f"shape {letter}, round {number + 1} of {options.rounds}: {name} …", file=sys.stderr)
                    runs[name].append(run_worker(name, letter, steps, options, Path(caches)))
                    print(f"  {runs[name][-1].get('error', 'done')}", file=sys.stderr)
                if options.out:  # after every round: a long measurement that is cut off keeps what it has
                    options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        rows = summarise(runs, SHAPES[letter])
        report["shapes"][letter]["summary"] = rows
        print_table(letter, rows, options)
    if options.out:
        options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def parse_options() -> argparse.Namespace:
    """Return the options of the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", action="append", choices=SHAPES, help="may be repeated; default: both")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="measured steps per round; default: A 8, B 3")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("--peer-python", default=sys.executable, help="interpreter that has the peers; default: this")
    parser.add_argument(
        "--allocator",
        choices=["on", "off", "both"],
        default="on",
        help="our allocator settings, for every contender; both: on for every contender, and ours once more without",
    )
    parser.add_argument("--timeout", type=float, default=1800, help="seconds one contender may take in a round")
    parser.add_argument("--verbose", action="store_true", help="show what the contenders print, and their tracebacks")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    options = parser.parse_args()
    if min(options.rounds, options.threads, options.steps or 1) < 1:
        parser.error("--rounds, --steps and --threads must be at least 1")
    options.shape = list(dict.fromkeys(options.shape or SHAPES))
    return options


def run_worker(name: str, letter: str, steps: int, options: argparse.Namespace, caches: Path) -> dict[str, Any]:
    """Run one contender in a process of its own; return its result, always with `load` and maybe with `error`."""
    contender = name.removesuffix(PLAIN)
    python = sys.executable if contender.startswith("ours") else options.peer_python
    job = {"name": contender, "shape": asdict(SHAPES[letter]), "steps": steps, "threads": options.threads}
    command = [python, str(Path(__file__).resolve()), "--worker", json.dumps(job)]
    tuned = options.allocator != "off" and not name.endswith(PLAIN)
    load = os.getloadavg()[0]  # of other jobs, if the machine is not quiet
    try:
        done = subprocess.run(
            command,
            env=environment(options.threads, tuned, caches / name),
            capture_output=True,
            text=True,
            errors="replace",
            timeout=options.timeout,
        )
    except OSError as error:
        return {"load": load, "error": f"{type(error).__name__}: {first_line(str(error))}"}
    except subprocess.TimeoutExpired:
        return {"load": load, "error": f"not done after {options.timeout:.0f} s"}
    try:
        result = json.loads(done.stdout)
    except ValueError:  # it died without a word on stdout
        lines = done.stderr.strip().splitlines() or ["no message"]
        result = {"error": f"exit {done.returncode}: {lines[-1]}"}
    if options.verbose:
        print(done.stderr, file=sys.stderr)
    return {"load": load, **result}


def environment(threads: int, tuned: bool, cache: Path) -> dict[str, str]:
    """Return the environment of a worker: the same for all but for torch.compile's cache, which is the contender's."""
    from internlm import runtime

    variables = dict(os.environ)
    variables.pop("GLIBC_TUNABLES", None)
    variables |= {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "TORCHINDUCTOR_CACHE_DIR": str(cache),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }
    if tuned:
        variables["GLIBC_TUNABLES"] = runtime.ALLOCATOR_SETTINGS
    return variables


def summarise(runs: dict[str, list[dict[str, Any]]], shape: Shape) -> list[dict[str, Any]]:
    """Return one row per contender: its speed over rounds, and relative to ours in the same rounds."""
    speeds = {name: [speed(run, shape) for run in rounds] for name, rounds in runs.items()}
    rows = []
    for name, rounds in runs.items():
        good = [run for run in rounds if "error" not in run]
        errors = [run["error"] for run in rounds if "error" in run]
        row: dict[str, Any] = {
            "name": name,
            "rounds": len(rounds),
            "failed": len(errors),
            "error": (errors or [None])[0],
        }
        if good:
            known = sorted(s for s in speeds[name] if s is not None)
            pairs = [
                mine / reference
                for mine, reference in zip(speeds[name], speeds.get(REFERENCE, []), strict=False)
                if mine and reference
            ]
            later = [run["first_step_s"] for run in rounds[1:] if "error" not in run]
            row |= {
                "tokens_per_s": statistics.median(known),
                "slowest": known[0],
                "fastest": known[-1],
                "ratios": pairs,
                "ratio": statistics.median(pairs) if pairs else None,
                "first_step_s": rounds[0].get("first_step_s"),
                "later_first_step_s": statistics.median(later) if later else None,
                "peak_rss_gib": statistics.median(run["peak_rss_bytes"] for run in good) / 2**30,
                "parameters": good[0]["parameters"],
                "threads": good[0]["threads"],
                "versions": good[0]["versions"],
            }
        rows.append(row)
    return rows


def speed(run: dict[str, Any], shape: Shape) -> float | None:
    """Return tokens per second at the median step of a run; None where it failed."""
    return None if "error" in run else shape.batch_tokens / statistics.median(run["step_s"])


def print_table(letter: str, rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """Print the rows of one shape."""
    shape = SHAPES[letter]
    print(
        f"\nshape {letter}: {shape.num_parameters / 1e6:.2f} M parameters, {shape.batch_rows} × {shape.seq_len} tokens "
        f"a step, fp32, threads {options.threads}, allocator settings {options.allocator}, rounds {options.rounds}"
    )
    width = max(len(row["name"]) for row in rows)
    print(
        f"{'':{width}} {'tokens/s':>8} {'[min–max]':>15} {'× ours':>6} {'first step s':>12} {'later':>6} {'GiB':>5}"
        "  × ours per round"
    )
    for row in rows:
        if "tokens_per_s" not in row:
            print(f"{row['name']:{width}} {'–':>8}  {row['error']}")
            continue
        spread = f"[{row['slowest']:.0f}–{row['fastest']:.0f}]"
        print(
            f"{row['name']:{width}} {row['tokens_per_s']:>8.0f} {spread:>15} {number(row['ratio'], 2):>6} "
            f"{number(row['first_step_s'], 1):>12} {number(row['later_first_step_s'], 1):>6} "
            f"{row['peak_rss_gib']:>5.2f}  {' '.join(f'{ratio:.2f}' for ratio in row['ratios'])}"
            f"{remark(row, shape, options.threads)}"
        )
    sys.stdout.flush()


def remark(row: dict[str, Any], shape: Shape, threads: int) -> str:
    """Return what a reader must know beside a row's figures, or nothing."""
    remarks = []
    if row["threads"] != threads:
        remarks.append(f"it ran with {row['threads']} threads")
    if row["parameters"] != shape.num_parameters:
        remarks.append(f"another model: {row['parameters']:,} parameters")
    if row["failed"]:
        remarks.append(f"{row['failed']} of {row['rounds']} rounds failed: {row['error']}")
    return "".join(f"  ! {text}" for text in remarks)


def number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def first_line(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "no message")


def machine() -> dict[str, Any]:
    """Return the hardware and the system, as far as they can be read here."""
    model = platform.processor() or platform.machine()
    facts: dict[str, Any] = {
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "libc": " ".join(platform.libc_ver()),
    }
    if sys.platform == "linux":
        cpus = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next((line.partition(":")[2].strip() for line in cpus if line.startswith("model name")), model)
        facts["usable_cores"] = len(os.sched_getaffinity(0))
        facts["memory_gib"] = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    return {"cpu": model, **facts}


if __name__ == "__main__":
    main()
