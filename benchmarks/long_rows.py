"""Long rows of packed documents: attention that knows where documents lie, beside one that is told by a mask.

    python benchmarks/long_rows.py                      # 8,192-token rows on this machine
    python benchmarks/long_rows.py --out benchmarks/results/long_rows_cpu.json
    python benchmarks/long_rows.py --seven-b            # one step of the internlm-7b-8k shape, one layer deep

A row of 8,192 tokens holds documents of 100 to 8,000 tokens. `blocks` is one causal call per document, whose work grows
with the sum of squared lengths; `masked` is one call with a [T, T] mask, whose work grows with T². Each runs in a fresh
process: forward and backward of one block's attention (8 heads of 64), five times, the median; and the most memory the
process held beyond what it held before.
"""

from __future__ import annotations

import resource
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import report
import workers

TOKENS, HEADS, WIDTH = 8192, 8, 64
ROWS = {
    "80 documents of about 100": [103] * 79 + [55],
    "16 documents of 512": [512] * 16,
    "documents of 100 to 2,000": [2000, 1500, 1200, 900, 700, 600, 500, 300, 192, 100, 100, 100],
    "one of 8,000 and one of 192": [8000, 192],
}


def main() -> None:
    """Measure and print."""
    if workers.is_worker():
        workers.answer(lambda job: attend(job["path"], job["lengths"]))
        return
    parser = report.parser(__doc__)
    parser.add_argument("--seven-b", action="store_true", help="one training step of internlm-7b-8k with one layer")
    options = parser.parse_args()
    rows = [seven_b()] if options.seven_b else compare()
    report.write(options.out, report.result(row_tokens=TOKENS, rows=rows))


def compare() -> list[dict[str, Any]]:
    """Return time and memory of both paths on every kind of row."""
    rows = []
    paths = ("blocks", "masked")
    table = report.Table({"": "<30"} | {f"{path} {unit}": "11.2f" for path in paths for unit in ("s", "MiB")})
    for name, lengths in ROWS.items():
        found = {path: workers.run(__file__, {"path": path, "lengths": lengths}) for path in paths}
        if problems := [one["error"] for one in found.values() if "error" in one]:
            raise SystemExit(f"{name}: {problems[0]}")
        ratio = found["masked"]["seconds"] / found["blocks"]["seconds"]
        rows.append({"documents": name, **found, "times_faster": round(ratio, 2)})
        figures = [one[unit] for one in found.values() for unit in ("seconds", "mib")]
        table.row(name, *figures, f"{ratio:.1f} × faster")
    return rows


def attend(path: str, lengths: list[int]) -> dict[str, float]:
    """Return the time of a forward and backward, and the memory it takes."""
    import torch

    from internlm.model import attention

    assert sum(lengths) == TOKENS, "a row is full"
    torch.manual_seed(0)
    ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]
    q, k, v = (torch.randn(1, TOKENS, HEADS, WIDTH, requires_grad=True) for _ in range(3))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    times = []
    for _ in range(5):
        started = time.perf_counter()
        documents = attention.arrange(ids, q.device, q.dtype, path)
        attention.attend(q, k, v, documents).sum().backward()
        times.append(time.perf_counter() - started)
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {"seconds": round(statistics.median(times), 4), "mib": round(held / 1024, 1)}


def seven_b() -> dict[str, Any]:
    """Take one step of the 7B shape at 8,192 tokens, one layer deep, through the trainer; return what it says."""
    import random_run

    from internlm import config
    from internlm import recipe as recipes

    recipe = report.ROOT / "recipes" / "pretrain" / "internlm-7b.yaml"
    with tempfile.TemporaryDirectory() as folder:
        random_run.write_shards(Path(folder) / "data", 103168, TOKENS, 1)
        loaded = recipes.load(
            recipe,
            [
                f"run={folder}/run", "model.preset=internlm-7b-8k", "model.num_layers=1", f"data.seq_len={TOKENS}",
                *(f"data.train.{name}.path={folder}/data" for name in ("en", "zh", "code")),
                f"data.validation.en.path={folder}/data", "data.pack=whole",
                f"train.tokens={TOKENS}", f"train.batch_tokens={TOKENS}", "train.micro_batch_rows=1",
                "runtime.device=cpu", "optim.lr=1e-4",
            ],
        )  # fmt: skip
        trainer = recipes.prepare(config.decode(recipes.Recipe, config.encode(loaded.value)))
        started = time.perf_counter()
        metrics = trainer.stepper.step()
        spent = time.perf_counter() - started
        found = {
            "shape": "internlm-7b-8k, one layer",
            "parameters": trainer.parallel.shape.num_parameters,
            "loss": round(metrics["train/step_loss"], 4),
            "grad_norm": round(metrics["optim/grad_norm"], 4),
            "step_s": round(spent, 1),
            "peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        }
    print(found)
    return found


if __name__ == "__main__":
    main()
