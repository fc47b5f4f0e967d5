"""`internlm convert`: weights between formats."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from internlm.errors import StorageError, UsageError, WeightsError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from internlm.model.config import ModelConfig
    from internlm.model.transformer import Transformer
    from internlm.text.tokenizer import Tokenizer

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
    from internlm import storage
    from internlm.log import quantity
    from internlm.weights import transformers

    max_bytes = size_in_bytes(arguments.max_shard, "--max-shard")
    target = Path(arguments.target)
    storage.check_free(target, transformers.KIND, replace=arguments.force)
    source = open_source(arguments.source)
    name = arguments.template or source.template
    template = None if name == "none" else name
    transformers.export(
        source.tensors(),
        source.config,
        target,
        tokenizer=source.tokenizer,
        template=template,
        dtype=dtype_of(arguments.dtype),
        max_shard_bytes=max_bytes,
        replace=arguments.force,
        notes={"source": str(source.path)},
    )
    total = sum(file.stat().st_size for file in target.glob("*.safetensors"))
    chat = f"chat format {template}" if template else "no chat format"
    print(f"{target}: {quantity(source.config.num_parameters)} parameters, {total / 2**20:.1f} MiB, {chat}")
    if arguments.verify:
        verify(source, target)
    if source.tokenizer is None:
        print(f"{source.path} has no tokenizer: none was written")
    else:
        print(f"talk to it:   internlm chat {target}")
    return 0


@dataclass(frozen=True)
class Source:
    """Weights to read, whatever their format."""

    path: Path
    config: ModelConfig
    tensors: Callable[[], Iterator[tuple[str, Tensor]]]
    """Reads them, one at a time, by our names."""
    tokenizer: Tokenizer | None
    template: str | None

    def model(self, dtype: torch.dtype | None = None, device: str = "cpu") -> Transformer:
        """Return the model with its weights; `dtype` None: as stored."""
        from internlm.weights.load import empty, fill

        model = empty(self.config)
        fill(model, ((name, tensor.to(device, dtype, copy=True)) for name, tensor in self.tensors()))
        return model


def open_source(path: str | Path) -> Source:
    """Open a run, a checkpoint or a Transformers folder.

    Raises:
        StorageError: it is none of these.
    """
    from internlm.checkpoint import store
    from internlm.text.tokenizer import VOCABULARY_FILES, Tokenizer
    from internlm.weights import transformers

    path = Path(path)
    if store.is_checkpoint(path) or store.newest(path) is not None:
        found = store.open_checkpoint(path)
        tokenizer = None if found.tokenizer_path is None else Tokenizer.load(found.tokenizer_path)
        return Source(found.path, found.config, found.tensors, tokenizer, found.template)
    if not (path / "config.json").is_file():
        raise StorageError(
            "is no model" if path.exists() else "no such folder",
            where=path,
            do="Give a run or a checkpoint of `internlm train`, or a Transformers folder.",
        )
    has_tokenizer = any((path / name).is_file() for name in VOCABULARY_FILES)
    return Source(
        path,
        transformers.read_config(path),
        lambda: transformers.read_tensors(path),
        Tokenizer.load(path) if has_tokenizer else None,
        transformers.template_of(path),
    )


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
    stored = next(iter(transformers.read_tensors(target)))[1].dtype
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
