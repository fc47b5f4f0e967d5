"""`internlm convert`: weights between formats."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING

from internlm.errors import UsageError, WeightsError

if TYPE_CHECKING:
    import torch

    from internlm.checkpoint.source import Source

DESCRIPTION = """\
Convert weights between formats.

  internlm convert runs/a out                     newest checkpoint of a run → Transformers folder
  internlm convert runs/a/checkpoints/step-00000100 out --dtype bfloat16
  internlm convert llama-folder out --max-shard 2GB --verify

The result is a plain LlamaForCausalLM: transformers, vLLM, LMDeploy and others load it without our code."""

DTYPES = ("float32", "bfloat16", "float16")
TOLERANCE = 1e-4
"""Largest difference of fp32 logits that `--verify` accepts."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("source", metavar="SRC", help="run, checkpoint or Transformers folder")
    parser.add_argument("target", metavar="DST", help="folder to write; complete or absent")
    parser.add_argument("--to", choices=["transformers"], default="transformers", help="format (default: %(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, help="of the written weights (default: as stored)")
    parser.add_argument("--max-shard", metavar="SIZE", default="5GB", help="largest weight file (default: %(default)s)")
    parser.add_argument("--template", metavar="NAME", help="chat format (default: as recorded in SRC); `none`: none")
    parser.add_argument("--force", action="store_true", help="replace an earlier result")
    parser.add_argument("--verify", action="store_true", help="load DST with transformers and compare logits with ours")


def run(arguments: argparse.Namespace) -> int:
    """Convert, and say what was written."""
    import dataclasses

    from internlm import storage
    from internlm.checkpoint.source import open_source
    from internlm.log import Progress, quantity
    from internlm.weights import transformers
    from internlm.weights.weight import table

    max_bytes = size_in_bytes(arguments.max_shard, "--max-shard")
    target = Path(arguments.target)
    storage.check_free(target, transformers.KIND, replace=arguments.force)
    source = open_source(arguments.source)
    talk = source.talk
    if arguments.template is not None:
        name = None if arguments.template == "none" else arguments.template
        talk = dataclasses.replace(talk, template=name, foreign=None)
    weights = source.weights()
    dtype = dtype_of(arguments.dtype)
    total = sum(weight.to(dtype).nbytes for weight in weights.values())
    with Progress("converting", total, "B") as shown:
        options = transformers.ExportOptions(
            dtype=dtype,
            max_shard_bytes=max_bytes,
            replace=arguments.force,
            notes={"source": str(source.path)},
            resume=f"{source.state()} {arguments.to} {dtype} {max_bytes}",
            progress=shown.advance,
        )
        written = transformers.export(weights, source.config, target, talk, options)
    print(*table(written), sep="\n")
    total = sum(file.stat().st_size for file in target.glob("*.safetensors"))
    chat = f"chat format {talk.template}"
    if talk.template is None:
        chat = "no chat format" if talk.foreign is None else "its own chat format, carried along"
    print(f"{target}: {quantity(source.config.num_parameters)} parameters, {total / 2**20:.1f} MiB, {chat}")
    if arguments.verify:
        verify(source, target)
    if talk.tokenizer is None:
        print(f"{source.path} has no tokenizer: none was written")
    else:
        print(f"talk to it:   internlm chat {target}")
    return 0


def verify(source: Source, target: Path) -> float:
    """Return the largest difference between our fp32 logits and those that Transformers computes from `target`.

    Raises:
        UsageError: transformers is not installed.
        WeightsError: the difference is over TOLERANCE.
    """
    import torch

    from internlm.weights import transformers

    try:
        from transformers import AutoModelForCausalLM
    except ImportError:
        raise UsageError("needs transformers", where="--verify", do="pip install 'internlm[hf]'") from None
    stored = next(iter(transformers.open_weights(target).values())).dtype
    ours = source.model(stored).float()  # rounded as the written weights are
    theirs = AutoModelForCausalLM.from_pretrained(target, torch_dtype=torch.float32, trust_remote_code=False).eval()
    ids = torch.randint(source.config.vocab_size, (2, 32), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        difference = (ours.head.logits(ours(ids)) - theirs(ids).logits).abs().max().item()
    print(f"verified:     logits differ from those of transformers by {difference:.1e} at most")
    if not difference <= TOLERANCE:
        raise WeightsError(
            f"Transformers computes other logits from it: they differ by {difference:.1e}, over {TOLERANCE:.0e}",
            where=target,
            do="Please report this with the config.json.",
        )
    return difference


def size_in_bytes(text: str, where: str) -> int:
    """Return what `5GB` or `500MiB` means.

    Raises:
        UsageError: it means nothing.
    """
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]I?B)", text.strip().upper())
    size = int(float(match[1]) * units[match[2]]) if match else 0
    if size < 1:
        raise UsageError("is no size", where=where, got=text, allowed=["such as 5GB or 500MiB"])
    return size


def dtype_of(name: str | None) -> torch.dtype | None:
    """Return the dtype of this name; None stays None."""
    import torch

    return None if name is None else getattr(torch, name)
