"""Whether a device computes what the CPU computes in fp32: loss and every gradient of one step, packed documents.

Every attention path that the device has, in fp32 and bf16, and in bf16 with recomputation, compiled and with 8-bit
products. All go through the Trainer that a recipe gives; only its batch is set, and its optimizer is replaced by one
that keeps the gradients. Grouped heads, biases, padding and a document of one token are part of it.

    error of a gradient = ‖g − reference‖ / ‖reference‖, the largest over parameters
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import workers
from gpu_cases import Case, recipe_tree, write_data

LENGTHS = [[100, 1, 155], [256], [40, 40, 40, 40, 40, 40, 16], [200, 40]]
"""Documents of the rows; the last row ends in padding."""
TOKENS = 256
MODEL = {
    "vocab_size": 2048, "hidden_size": 256, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "ffn_size": 512,
    "context_length": TOKENS, "qkv_bias": True, "output_bias": True,
}  # fmt: skip
LIMITS = {"float32": (1e-5, 1e-4), "bfloat16": (2e-4, 4e-2), "float8": (4e-4, 3e-1)}
"""Kind → most relative error of the loss and of a gradient. On the CPU gradients are within 7e-7, 1.4e-2 and 0.18, and
attention that does not see where documents end is off by 6e-4 in the loss and 0.9 in a gradient."""


@dataclass(frozen=True)
class Variant:
    """One way to compute the step."""

    path: str
    dtype: str
    is_packed: bool = True
    recompute: str = "none"
    compile: bool = False
    float8: bool = False

    @property
    def kind(self) -> str:
        """Which of LIMITS holds."""
        return "float8" if self.float8 else self.dtype

    def __str__(self) -> str:
        more = [self.recompute] * (self.recompute != "none") + ["compile"] * self.compile + ["float8"] * self.float8
        return " ".join([self.path, self.dtype, "packed" if self.is_packed else "whole rows", *more])


def variants(device: str) -> list[Variant]:
    """Return what is compared on a device."""
    if device == "cpu":
        paths = [Variant(path, "float32") for path in ("auto", "blocks", "masked")]
        return [*paths, Variant("dense", "float32", is_packed=False), Variant("blocks", "float32", float8=True)]
    found = [Variant("varlen", "bfloat16")]
    for dtype in ("float32", "bfloat16"):
        found += [Variant(path, dtype) for path in ("auto", "flex", "masked")]
        found += [Variant("dense", dtype, is_packed=False), Variant("auto", dtype, recompute="operators")]
    found += [Variant("auto", "bfloat16", recompute="full"), Variant("auto", "bfloat16", compile=True)]
    found.append(Variant("auto", "bfloat16", recompute="operators", compile=True))
    if torch.cuda.get_device_capability() >= (8, 9):
        found += [Variant("auto", "bfloat16", float8=True), Variant("auto", "bfloat16", float8=True, compile=True)]
        found.append(Variant("auto", "bfloat16", float8=True, compile=True, recompute="operators"))
    return found


def compare(device: str, wanted: list[Variant] | None = None) -> list[dict[str, Any]]:
    """Return a row per variant: its errors, their limits, and whether it passed or what it raised."""
    references = {
        packed: _step(Variant("masked" if packed else "dense", "float32", packed), "cpu") for packed in (True, False)
    }
    rows = []
    for variant in wanted or variants(device):
        loss_limit, grad_limit = LIMITS[variant.kind]
        row: dict[str, Any] = {"variant": str(variant), "loss_limit": loss_limit, "gradient_limit": grad_limit}
        try:
            loss, grads, path = _step(variant, device)
        except Exception as error:  # whatever a path raises is its row
            rows.append(row | {"passed": False, "error": workers.in_words(error)[:300]})
            continue
        expected, expected_grads, _ = references[variant.is_packed]
        errors = {name: _error(grads[name], value) for name, value in expected_grads.items()}
        worst = max(errors, key=lambda name: errors[name])
        row |= {
            "path": path,
            "loss_error": abs(loss - expected) / abs(expected),
            "gradient_error": errors[worst],
            "worst_gradient": worst,
        }
        # not (a > limit): an error that is no number must not pass
        passed = row["loss_error"] <= loss_limit and row["gradient_error"] <= grad_limit
        rows.append(row | {"passed": bool(passed)})
    return rows


def _error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm().clamp(min=1e-30))


def _step(variant: Variant, device: str) -> tuple[float, dict[str, torch.Tensor], str]:
    """Return loss and gradients of the one step, and the path that attention took."""
    from internlm import config
    from internlm.model import attention
    from internlm.recipe import Recipe, prepare

    case = Case(
        "ours", "toy", 0, TOKENS, len(LENGTHS), recompute=variant.recompute, dtype=variant.dtype, device=device
    )  # fmt: skip
    taken: list[str] = []
    arrange = attention.arrange

    def arrange_and_tell(*arguments: Any, **named: Any) -> attention.Documents:
        documents = arrange(*arguments, **named)
        taken.append(documents.path)
        return documents

    with tempfile.TemporaryDirectory() as folder:
        write_data(case, Path(folder), 1)
        tree = recipe_tree(case, Path(folder)) | {"model": dict(MODEL)}
        tree["train"]["max_grad_norm"] = 0.0  # measured only
        tree["parallel"]["float8"] = variant.float8
        tree["runtime"] |= {"attention": variant.path, "compile": variant.compile}
        trainer = prepare(config.decode(Recipe, tree))
        grads: dict[str, torch.Tensor] = {}

        def keep(rate: float) -> None:
            for name, parameter in trainer.parallel.named_parameters():
                assert parameter.grad is not None, f"{name} has a gradient"
                grads[name] = parameter.grad.detach().float().cpu().clone()

        batch = _batch(variant.is_packed)
        trainer.stepper.loader.next_batch = lambda rows: batch  # type: ignore[method-assign]
        trainer.stepper.optimizer.step = keep  # type: ignore[method-assign]
        attention.arrange = arrange_and_tell
        try:
            loss = trainer.stepper.step()["train/step_loss"]
        finally:
            attention.arrange = arrange
    if not grads:
        raise RuntimeError("the step was skipped: its gradient is not finite")
    return loss, grads, taken[0]


def _batch(is_packed: bool) -> Any:
    """Return random rows, packed as LENGTHS says or of one document each."""
    from internlm.data.batch import Batch

    generator = torch.Generator().manual_seed(0)
    shape = (len(LENGTHS), TOKENS)
    tokens = torch.randint(MODEL["vocab_size"], shape, generator=generator)
    documents, positions = torch.full(shape, -1), torch.zeros(shape, dtype=torch.int64)
    weights = torch.zeros(shape)
    for row, lengths in enumerate(LENGTHS if is_packed else [[TOKENS]] * len(LENGTHS)):
        at = 0
        for number, length in enumerate(lengths):
            place = slice(at, at + length)
            documents[row, place], positions[row, place] = number, torch.arange(length)
            weights[row, at : at + length - 1] = 1.0
            at += length
    labels = tokens.roll(-1, 1) * (weights > 0)
    source = torch.zeros(len(LENGTHS), dtype=torch.int64)
    return Batch(tokens, labels, positions, documents, weights, source, ("random",))
