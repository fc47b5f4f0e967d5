"""Converting a folder of a released shape: speed beside `cp` of the same data to the same disk, and memory.

    python benchmarks/convert.py                          # InternLM 7B in bfloat16: 14.6 GB, three times on the disk
    python benchmarks/convert.py --layers 8 --folder /data/scratch

A folder as InternLM published it (InternLMForCausalLM, `pytorch_model-*.bin`) is filled with random numbers, then
copied with `cp` and converted with `internlm convert` (to a LlamaForCausalLM in safetensors), in turn; each is timed
until `sync` says that the data is on the disk. Memory is the largest anonymous memory (RssAnon) of the converting
process, which `/proc` tells: pages of mapped files do not count, the system takes them back when it needs them.
"""

from __future__ import annotations

import json
import math
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import report
import torch
from shapes import model_of

from internlm.model.config import ModelConfig
from internlm.model.presets import PRESETS
from internlm.weights.families.table import to_transformers
from internlm.weights.load import shapes

BIN_BYTES = 3 * 10**9
"""Size of a written `.bin`; the published ones have 10 GB, which would have to be in memory here at once."""


def released(folder: Path, config: ModelConfig) -> int:
    """Write a folder as the released one, with random numbers in bfloat16; return the bytes of its tensors."""
    folder.mkdir()
    needed = [(to_transformers(name), shape) for name, shape in shapes(config).items()]
    where: dict[str, str] = {}
    held: dict[str, torch.Tensor] = {}
    total = files = 0
    for number, (name, shape) in enumerate(needed, 1):
        held[name] = torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02)
        total += held[name].nbytes
        if sum(t.nbytes for t in held.values()) > BIN_BYTES or number == len(needed):
            files += 1
            torch.save(held, folder / f"pytorch_model-{files:05d}.bin")
            where.update(dict.fromkeys(held, f"pytorch_model-{files:05d}.bin"))
            held = {}
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    fields = {
        "model_type": "internlm",
        "architectures": ["InternLMForCausalLM"],
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "max_position_embeddings": config.context_length,
        "rms_norm_eps": 1e-6,
        "bias": config.qkv_bias,
        "rotary": {"base": 10000, "type": "origin"},
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(fields))
    return total


def timed(command: list[str]) -> tuple[float, int]:
    """Run a command and `sync`; return the seconds, and the most anonymous memory of the process in bytes."""
    begun = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    most = 0

    def watch() -> None:
        nonlocal most
        while process.poll() is None:
            try:
                text = Path(f"/proc/{process.pid}/status").read_text()
                most = max(most, *(int(line.split()[1]) for line in text.splitlines() if line.startswith("RssAnon")))
            except (OSError, TypeError):
                return
            time.sleep(0.01)

    watching = threading.Thread(target=watch)
    watching.start()
    if process.wait():
        raise SystemExit(f"failed: {shlex.join(command)}")
    subprocess.run(["sync"], check=True)
    took = time.perf_counter() - begun
    watching.join()
    return took, most * 1024


def main() -> None:
    """Run, print, write the result."""
    parser = report.parser(__doc__, report.RESULTS / "convert.json")
    parser.add_argument("--preset", default="internlm-7b", choices=PRESETS)
    parser.add_argument("--layers", type=int, help="fewer layers than the preset has")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to work; default: the system's folder for temporary files")
    options = parser.parse_args()
    config = model_of(options.preset, **({"num_layers": options.layers} if options.layers else {}))
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        size = released(folder / "source", config)
        subprocess.run(["sync"], check=True)
        runs: list[dict[str, Any]] = []
        for _ in range(options.rounds):
            copied, _ = timed(["cp", "-r", str(folder / "source"), str(folder / "copy")])
            shutil.rmtree(folder / "copy")
            command = [sys.executable, "-m", "internlm", "convert", str(folder / "source"), str(folder / "converted")]
            converted, memory = timed(command)
            shutil.rmtree(folder / "converted")
            runs.append({"cp_s": copied, "convert_s": converted, "peak_anonymous_bytes": memory})
            print(
                f"cp {copied:.1f} s, convert {converted:.1f} s, anonymous memory {memory / 2**20:.0f} MiB", flush=True
            )
    largest = 2 * max(math.prod(shape) for shape in shapes(config).values())
    ratio = statistics.median(run["cp_s"] / run["convert_s"] for run in runs)
    over = max(run["peak_anonymous_bytes"] for run in runs) / largest
    facts = {"preset": options.preset, "layers": config.num_layers, "bytes": size, "largest_tensor_bytes": largest}
    facts |= {"speed_over_cp": ratio, "anonymous_memory_over_largest_tensor": over}
    report.write(options.out, report.result(**facts, rows=runs))
    print(f"{size / 1e9:.1f} GB: {ratio:.2f} × the speed of cp", options.out)


if __name__ == "__main__":
    main()
