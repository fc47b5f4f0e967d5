"""What the quickstart promises, measured: time, held-out bits per byte beside gzip and xz, facts learned, export.

    python benchmarks/quickstart.py                     run it in a fresh folder, then measure
    python benchmarks/quickstart.py --folder DIR        measure what a run has left in DIR

Facts: of all "In which module is X?" questions it was tuned on, 300 are drawn by seed and answered greedily by the
exported model; an answer is right when it is the module's name and nothing else. 50 of the answers are also made by
transformers (when installed) from the same export, and must be the same ids.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import report
import torch

from internlm.data import corpus
from internlm.infer.engine import Engine
from internlm.source import open_source
from internlm.text.chat import Message, render_prompt
from internlm.train.metrics import read_metrics

QUESTIONS, CHECKED = 300, 50


def run_quickstart(folder: Path) -> float:
    """Run the script; return the seconds it took."""
    started = time.monotonic()
    environment = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"}
    subprocess.run(["bash", str(report.ROOT / "scripts/quickstart.sh"), str(folder)], check=True, env=environment)
    return time.monotonic() - started


def ask(folder: Path, seed: int) -> dict[str, Any]:
    """Ask the exported model where 300 names live."""
    facts = [json.loads(line) for line in (folder / "corpus/facts.jsonl").open(encoding="utf-8")]
    drawn = random.Random(seed).sample(facts, min(QUESTIONS, len(facts)))
    source = open_source(folder / "model")
    engine, template, tokenizer = Engine.of(source), source.talk.format, source.talk.tokenizer
    assert template is not None, "the quickstart exports its chat format"
    assert tokenizer is not None, "the quickstart exports its tokenizer"
    stops = tuple(source.talk.stop_ids())
    prompts = [
        render_prompt([Message("user", f"In which module is {fact['name']}?")], template, tokenizer) for fact in drawn
    ]
    results = engine.generate(prompts, max_tokens=24, temperature=0.0, stop_ids=stops)
    right = sum(result.text == fact["module"] for result, fact in zip(results, drawn, strict=True))
    answers = [list(result.tokens) for result in results[:CHECKED]]
    return {
        "names": len(facts),
        "asked": len(drawn),
        "right": right,
        "equal_to_transformers": same_as_transformers(folder / "model", prompts[:CHECKED], answers, stops),
    }


def same_as_transformers(
    model: Path, prompts: list[list[int]], answers: list[list[int]], stops: tuple[int, ...]
) -> str:
    """Generate greedily with transformers and compare the ids."""
    try:
        from transformers import AutoModelForCausalLM
    except ImportError:
        return "transformers is not installed"
    reference = AutoModelForCausalLM.from_pretrained(model)
    equal = 0
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = torch.tensor([prompt])
        with torch.no_grad():
            out = reference.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False, eos_token_id=list(stops)
            )
        equal += out[0, len(prompt) :].tolist() == answer
    return f"{equal} of {len(prompts)}"


def main() -> None:
    parser = report.parser(__doc__)
    parser.add_argument("--folder", type=Path, help="folder of a finished quickstart")
    parser.add_argument("--seed", type=int, default=0, help="of the questions (0)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary) / "quickstart"
        seconds = None if options.folder else run_quickstart(folder)
        metrics = read_metrics(folder / "pretrain/metrics.jsonl")
        final = next(line for line in reversed(metrics) if "valid/bits_per_byte/held_out" in line)
        held_out = corpus.compression(folder / "corpus/validation.jsonl")
        found = report.result(
            seconds=seconds,
            tokens=final["progress/tokens"],
            bits_per_byte={"model": final["valid/bits_per_byte/held_out"]} | held_out,
            facts=ask(folder, options.seed),
        )
    print(json.dumps(found, indent=1))
    report.write(options.out, found)


if __name__ == "__main__":
    main()
