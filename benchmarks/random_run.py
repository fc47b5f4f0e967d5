"""A training of ours on random tokens: its shards, its recipe, and its steps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from shapes import LEARNING_RATE, Shape

from internlm import config, storage
from internlm.data import shards
from internlm.text.training import train_bpe

if TYPE_CHECKING:
    from internlm.train.trainer import Trainer


def write_shards(path: Path, vocab_size: int, length: int, documents: int) -> None:
    """Write documents of random ids, each of `length` tokens and a last one that is only a label.

    The tokenizer beside them is the smallest there is; training does not ask it anything.
    """
    tokenizer = train_bpe(["some text for a tokenizer that is never used, some text"], 264)
    generator = np.random.default_rng(0)
    with storage.writing(path, shards.KIND) as out:
        writer = shards.ShardWriter(out.path, "00000", vocab_size)
        for _ in range(documents):
            writer.add(generator.integers(vocab_size, size=length + 1).tolist(), None, 0)
        (out.path / "tokenizer").mkdir()
        tokenizer.save(out.path / "tokenizer")
        out.meta.update(
            shards.meta(
                [writer.close()], vocab_size=vocab_size, fingerprint=tokenizer.fingerprint, bos_id=tokenizer.bos_id,
                eos_id=tokenizer.eos_id, template=None,
            )
        )  # fmt: skip


def data(folder: Path, seq_len: int) -> dict[str, Any]:
    """Return the section `data` of a recipe over the shards in `folder / "data"`."""
    return {"seq_len": seq_len, "pack": "whole", "train": {"random": {"path": str(folder / "data")}}}


def train(shape: Shape, steps: int, folder: Path, mark: Callable[[float | None], None], **sections: Any) -> Trainer:
    """Train over the shards in `folder / "data"` with the Trainer that a recipe gives, on the CPU; return it.

    The loss is read after each step, as with `log_every_steps: 1`. `mark` is called before the first step, and after
    each with its loss; `sections` are of the recipe, beside these or instead of them.
    """
    from internlm.recipe import Recipe, prepare

    tree = {
        "run": str(folder / "run"),
        "model": {
            "vocab_size": shape.vocab_size, "hidden_size": shape.hidden_size, "num_layers": shape.num_layers,
            "num_heads": shape.num_heads, "ffn_size": shape.ffn_size, "context_length": shape.seq_len,
        },
        "data": data(folder, shape.seq_len),
        "train": {"tokens": steps * shape.batch_tokens, "batch_tokens": shape.batch_tokens, "max_grad_norm": 1.0},
        "optim": {"lr": LEARNING_RATE},
        "runtime": {"device": "cpu"},
    }  # fmt: skip
    trainer = prepare(config.decode(Recipe, tree | sections))
    trainer.meter.clear()
    mark(None)
    for _ in range(steps):
        trainer.stepper.step()
        mark(trainer.meter.read()["train/loss"])
        trainer.meter.clear()
    return trainer
