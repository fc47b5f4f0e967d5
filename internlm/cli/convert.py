"""`internlm convert`."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from internlm.errors import UsageError, WeightsError, install_command

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from internlm.source import Source
    from internlm.weights.transformers import ExportOptions
    from internlm.weights.weight import Weights

DESCRIPTION = """\
Convert weights between formats.

  internlm convert runs/a out                     newest checkpoint of a run → Transformers folder
  internlm convert llama-folder out --dtype bfloat16 --max-shard 2GB --verify
  internlm convert my-lora out --base llama-folder            an adapter of PEFT, merged
  internlm convert origin_ckpt out --tokenizer V7_sft.model   a training checkpoint of InternLM v0.2
  internlm convert runs/a out --remote-code       with `model.chat`, as InternLM published it
  internlm convert runs/a out --to gguf --quantize q8_0       for llama.cpp
  internlm convert runs/a out --to internlm-v0.2 --tensor 2   a training checkpoint of InternLM v0.2

Without --to the result is the plainest that transformers, vLLM, LMDeploy and others load without our code: a
LlamaForCausalLM, or Mixtral or Qwen3 where the model has experts or norms of queries and keys."""

DTYPES = ("float32", "bfloat16", "float16")
TOLERANCE = 1e-4
"""Largest difference of fp32 logits that `--verify` accepts, as a share of the largest."""
QUANTIZED_TOLERANCE = 0.1
"""That of 8-bit weights."""
VERIFY_TEXT = "Ten years ago, 今天天气晴朗适合出门散步: def add(a, b): return a + b\n\t€ naïve 🙂 Привет, 3.14159"
FORMATS = ("transformers", "gguf", "internlm-v0.2")
MAX_SHARD = "5GB"
OPTIONS_OF = {
    "max_shard": "transformers",
    "remote_code": "transformers",
    "quantize": "gguf",
    "tensor": "internlm-v0.2",
    "pipeline": "internlm-v0.2",
}
"""Options that one format alone has."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("source", metavar="SRC", help="run, checkpoint, Transformers folder, adapter, GGUF file …")
    parser.add_argument("target", metavar="DST", help="folder to write; complete or absent")
    parser.add_argument(
        "--to", metavar="FORMAT", default="transformers", help="transformers (default), gguf, internlm-v0.2 or a family"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="of the written weights (default: as stored)")
    parser.add_argument("--max-shard", metavar="SIZE", help=f"largest weight file (default: {MAX_SHARD})")
    parser.add_argument("--template", metavar="NAME", help="chat format (default: as recorded in SRC); `none`: none")
    parser.add_argument("--tokenizer", metavar="PATH", type=Path, help="tokenizer (default: the one in SRC)")
    parser.add_argument("--base", metavar="PATH", type=Path, help="base of an adapter (default: the one it names)")
    parser.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="what such a SRC leaves open")
    parser.add_argument("--licence", metavar="NAME", help="SPDX name, for the model card")
    parser.add_argument("--remote-code", action="store_true", help="carry the code of `model.chat`")
    parser.add_argument("--quantize", choices=["q8_0"], help="gguf: integers of 8 bits")
    parser.add_argument("--tensor", type=int, metavar="N", help="internlm-v0.2: tensor ranks (default: 1)")
    parser.add_argument("--pipeline", type=int, metavar="N", help="internlm-v0.2: pipeline stages (default: 1)")
    parser.add_argument("--force", action="store_true", help="replace an earlier result")
    parser.add_argument("--verify", action="store_true", help="compare the logits of SRC and DST on a fixed text")


def run(arguments: argparse.Namespace) -> int:
    """Convert, and say what was written."""
    from internlm import storage
    from internlm.log import Progress, quantity, size
    from internlm.source import Hints, open_source
    from internlm.weights.transformers import KIND
    from internlm.weights.weight import table

    _check(arguments)
    target = Path(os.path.realpath(arguments.target))
    storage.check_free(target, KIND, replace=arguments.force)
    hints = Hints(arguments.tokenizer, arguments.base, _settings(arguments.set), arguments.template)
    source = open_source(arguments.source, hints)
    _check_source(arguments, source)
    weights = source.weights()
    total = sum(weight.to(dtype_of(arguments.dtype)).nbytes for weight in weights.values())
    with _unverified(target) if arguments.verify else contextlib.nullcontext(target) as out:
        with Progress("converting", total, "bytes") as shown:
            written = _write(arguments, source, weights, out, _options(arguments, source, shown.advance))
        print(*table(written), sep="\n")
        written_bytes = sum(file.stat().st_size for file in out.iterdir())
        if arguments.verify:
            verify(source, out, QUANTIZED_TOLERANCE if arguments.quantize else TOLERANCE)
            storage.put_if_free(out, target, KIND, replace=arguments.force)
    talk = source.talk
    chat = "its own chat format, carried along" if talk.template is None else f"chat format {talk.template}"
    if talk.jinja is None or talk.tokenizer is None:  # none is written without a tokenizer
        chat = "no chat format"
    parameters = quantity(source.config.num_parameters)
    print(f"{arguments.target}: {parameters} parameters, {size(written_bytes)}, {chat}")
    if talk.tokenizer is None:
        print(f"{source.path} has no tokenizer: none was written")
    else:
        print(f"talk to it:   internlm chat {arguments.target}")
    return 0


@contextlib.contextmanager
def _unverified(target: Path) -> Iterator[Path]:
    """Yield where to write what is named `target` once verified, and else is left for who looks for the cause."""
    beside = target.with_name(f"{target.name}.unverified")
    try:
        yield beside / target.name
    finally:
        with contextlib.suppress(OSError):  # not empty
            beside.rmdir()


def _check(arguments: argparse.Namespace) -> None:
    """Check that the options belong to the format."""
    from internlm.weights.families.table import FAMILIES

    allowed = [*FORMATS, *FAMILIES]
    if arguments.to not in allowed:
        raise UsageError("no such format", where="--to", got=arguments.to, allowed=allowed)
    to = arguments.to if arguments.to in FORMATS else "transformers"
    for option, of in OPTIONS_OF.items():
        given = getattr(arguments, option)
        if given is not None and given is not False and to != of:  # 0 is given too
            raise UsageError(f"belongs to --to {of}", where="--" + option.replace("_", "-"), got=f"--to {to}")
    if arguments.quantize and arguments.dtype:
        raise UsageError("means nothing beside --quantize", where="--dtype", got=arguments.dtype, do="Leave out one.")


def _check_source(arguments: argparse.Namespace, source: Source) -> None:
    """Check that the target can be verified, and replacing it does not delete what it is made of."""
    by_transformers = source.kind == "transformers" or arguments.to not in ("gguf", "internlm-v0.2")
    if arguments.verify and by_transformers and importlib.util.find_spec("transformers") is None:
        raise UsageError("needs transformers", where="--verify", do=install_command("hf"))
    target = Path(arguments.target).resolve()
    for path in (Path(arguments.source), source.path, *source.beside):
        if not isinstance(path, Path) or not target.exists():
            continue  # in a store; nothing is replaced
        lie = [file.resolve() for file in (path, *path.rglob("*"))]  # a folder of links is as good as one of files
        if any(place.is_relative_to(target) for place in lie):
            raise UsageError(
                "would be replaced, and SRC with it", where="DST", got=arguments.target, do="Choose another name."
            )


def _options(arguments: argparse.Namespace, source: Source, progress: Callable[[int], None]) -> ExportOptions:
    from internlm.checkpoint import place
    from internlm.weights import card
    from internlm.weights.transformers import ExportOptions

    given = place.at(arguments.source)
    # Its name alone: folders that are published say nothing of the machine that they were made on.
    name = Path(os.path.abspath(given)).name if isinstance(given, Path) else given.name
    notes = {"source": name, **source.facts}
    if licence := arguments.licence or next(filter(None, map(card.licence_of, _folders(source))), None):
        notes["licence"] = licence
    talk, tokenizer = source.talk, source.talk.tokenizer
    depends_on = [source.state(), source.config, talk.template, talk.foreign, talk.stops, talk.generation]
    depends_on += [tokenizer and (tokenizer.fingerprint, tokenizer.config())]
    depends_on += [getattr(arguments, name) for name in ("to", "dtype", "set", *OPTIONS_OF)]
    return ExportOptions(
        dtype=dtype_of(arguments.dtype),
        max_shard_bytes=size_in_bytes(arguments.max_shard or MAX_SHARD, "--max-shard"),
        replace=arguments.force or arguments.verify,
        notes=notes,
        resume=repr(depends_on),
        family=None if arguments.to in FORMATS else arguments.to,
        remote_code=arguments.remote_code,
        licences=_licences(source),
        progress=progress,
    )


def _write(
    arguments: argparse.Namespace, source: Source, weights: Weights, out: Path, options: ExportOptions
) -> Weights:
    """Write a folder, and return what was written."""
    if arguments.to == "gguf":
        from internlm.weights.gguf import model as gguf

        return gguf.export(weights, source.config, out, source.talk, options, quantization=arguments.quantize)
    if arguments.to == "internlm-v0.2":
        from internlm.weights.native import write as native_write

        layout = native_write.Layout(
            tensor=1 if arguments.tensor is None else arguments.tensor,
            pipeline=1 if arguments.pipeline is None else arguments.pipeline,
            step=source.facts.get("step", 0),
        )
        return native_write.export(weights, source.config, out, source.talk, options, layout)
    from internlm.weights import transformers

    return transformers.export(weights, source.config, out, source.talk, options)


def _folders(source: Source) -> list[Path]:
    """Return the folders here that a source is made of."""
    return [path for path in (source.path, *source.beside) if isinstance(path, Path) and path.is_dir()]


def _licences(source: Source) -> tuple[Path, ...]:
    """Return the licence files of a source, an adapter's before its base's."""
    lying = [file for folder in reversed(_folders(source)) for file in sorted(folder.iterdir()) if file.is_file()]
    names = ("LICENSE", "LICENCE", "NOTICE")
    return tuple({file.name: file for file in lying if file.name.upper().startswith(names)}.values())


def verify(source: Source, target: Path, tolerance: float = TOLERANCE) -> float:
    """Return the largest difference between the fp32 logits of a source and of what was written from it.

    Transformers computes each side where it loads the folder, else our model: one after the other, in float32, with the
    weights of both rounded as the written ones are.

    Raises:
        WeightsError: the difference is over `tolerance`.
    """
    import torch

    from internlm.source import Hints, open_source

    written = open_source(target, Hints())
    dtype = next(iter(written.weights().values())).dtype
    if dtype.itemsize == 1:  # no arithmetic has it, and float32 holds its values
        dtype = torch.float32
    ids = _verify_ids(source)
    ours = _logits_here(source, ids, dtype)
    size = ours.abs().max().item() or 1.0
    others: dict[str, Tensor] = {}
    for side, name in ((source, "SRC by transformers"), (written, "DST by transformers")):
        theirs = _logits_there(side, ids, dtype)
        if theirs is not None:
            others[name] = theirs
    if "DST by transformers" not in others:
        others["DST by our reader"] = _logits_here(written, ids, torch.float32)
    worst = 0.0
    for name, logits in others.items():
        difference = (ours - logits).abs().max().item() / size
        print(f"verified:     {name}: logits differ by {difference:.1e} at most")
        if not difference <= tolerance:
            raise WeightsError(
                f"other logits come from it ({name}): they differ by {difference:.1e}, over {tolerance:.0e}",
                where=target,
                do="DST is as it was before; please report this with the config.json here.",
            )
        worst = max(worst, difference)
    return worst


def _verify_ids(source: Source) -> Tensor:
    """Return ids [1, T] of a fixed text, or random ones without a tokenizer."""
    import torch

    tokenizer = source.talk.tokenizer
    if tokenizer is None:
        return torch.randint(source.config.vocab_size, (1, 32), generator=torch.Generator().manual_seed(0))
    return torch.tensor([tokenizer.encode(VERIFY_TEXT)])


def _logits_here(source: Source, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the logits [1, T, V] of our model, with weights rounded to `dtype`."""
    import torch

    model = source.model(dtype).float()
    with torch.inference_mode():
        return model.head.logits(model(ids))


def _logits_there(source: Source, ids: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Return the logits [1, T, V] that Transformers computes; None where it does not load a source."""
    import torch

    if source.kind != "transformers" or not isinstance(source.path, Path):
        return None
    from transformers import AutoModelForCausalLM

    from internlm import disk
    from internlm.weights import carried

    trusted = carried.is_ours(source.path)
    described = disk.read_json(source.path / "config.json")
    if not trusted and ("auto_map" in described or described["model_type"].startswith("internlm")):
        return None  # only with code of others, which is not run
    model = AutoModelForCausalLM.from_pretrained(source.path, torch_dtype=dtype, trust_remote_code=trusted)
    model = model.eval().float()
    with torch.inference_mode():
        return model(ids).logits


def _settings(pairs: list[str]) -> dict[str, str]:
    """Return `KEY=VALUE` words as a dict."""
    for pair in pairs:
        if "=" not in pair:
            raise UsageError("is no KEY=VALUE", where="--set", got=pair)
    return dict(pair.split("=", 1) for pair in pairs)


def size_in_bytes(text: str, where: str) -> int:
    """Return what `5GB` or `500MiB` means; raise UsageError where it is no size."""
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
