"""What `gpu_train.py` measures: groups of contenders on one shape, and the recipe that makes ours of a case.

A group is a model and the cut of its steps; all its contenders train at the same depth. A contender is a name: what
trains, and after each "+" a switch.

    ours                          fp32 weights and gradients, products in bf16, fp32 optimizer states
    ours+compile+float8           blocks compiled, products of the blocks in 8 bits
    ours+bf16states               optimizer states in bf16 (+int8states: in 8 bits)
    transformers                  LlamaForCausalLM, SDPA, bf16 autocast, torch's fused AdamW: the policy of `ours`
    transformers-bf16             the same all in bf16: weights, gradients, states. Half the bytes, another policy
    torchtitan                    its own Trainer, where it can be imported
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import random_run
from shapes import model_of

from internlm import config
from internlm.cost.flops import causal_pairs, training_flops
from internlm.model.config import ModelConfig

SWITCHES = ("compile", "float8", "bf16states", "int8states")
PEERS = ("transformers", "transformers-bf16", "torchtitan")
DEFAULT = (
    "ours", "ours+compile", "ours+bf16states+compile", "ours+bf16states+compile+float8",
    "transformers", "transformers+compile", "transformers-bf16",
)  # fmt: skip
DEEPEST = ("ours+bf16states+compile", "ours+int8states+compile")
"""What runs alone, at the largest depth it fits in."""
LEARNING_RATE = 1e-4


@dataclass(frozen=True)
class Case:
    """A contender and what it trains."""

    name: str
    preset: str
    layers: int
    """Blocks; 0: those of the preset."""
    seq_len: int
    micro_rows: int
    """Rows of a micro-batch."""
    micro_batches: int = 1
    """Per step."""
    documents: int = 1
    """Per row, equally long: with them every contender has the same work and no row has padding."""
    recompute: str = "none"
    """Policy of ours; peers recompute whole blocks unless it is none."""
    dtype: str = "bfloat16"
    """Of matrix products."""
    device: str = "cuda"
    warmup: int = 4
    steps: int = 12

    @property
    def library(self) -> str:
        """What trains."""
        return self.name.split("+")[0]

    @property
    def switches(self) -> list[str]:
        """What is switched on."""
        return self.name.split("+")[1:]

    @property
    def shape(self) -> ModelConfig:
        """The model."""
        preset = model_of(self.preset)
        length = max(self.seq_len, preset.context_length)
        return replace(preset, num_layers=self.layers or preset.num_layers, context_length=length)

    @property
    def batch_tokens(self) -> int:
        """Tokens of a step."""
        return self.seq_len * self.micro_rows * self.micro_batches

    @property
    def flops(self) -> float:
        """Useful operations of a step, the same for all contenders; see `internlm.cost.flops`."""
        length = self.seq_len // self.documents
        pairs = self.batch_tokens // length * causal_pairs(length)
        return training_flops(self.shape, self.batch_tokens, pairs)

    @property
    def states(self) -> str:
        """Dtype of our optimizer's states."""
        names = {"bf16states": "bfloat16", "int8states": "int8"}
        return next((names[switch] for switch in self.switches if switch in names), "float32")

    @property
    def policy(self) -> str:
        """Dtypes of weights and states, and what is recomputed, in words."""
        if self.library == "transformers-bf16":
            kept = "weights, gradients and states bfloat16"
        else:
            kept = f"weights and gradients float32, products {self.dtype}, states {self.states}"
        if "float8" in self.switches:
            kept += ", blocks' products float8"
        again = self.recompute if self.library == "ours" or self.recompute == "none" else "full"
        if self.library == "torchtitan" and again != "none":
            again = "by its default"
        return f"{kept}, recompute {again}"

    def at(self, layers: int) -> Case:
        """Return the case at another depth."""
        return replace(self, layers=layers)

    def to_json(self) -> dict[str, Any]:
        """Return the fields."""
        return asdict(self)


def check_name(name: str) -> str:
    """Return the name of a contender.

    Raises:
        ValueError: there is none of this name.
    """
    library, *switches = name.split("+")
    ours = library == "ours" and all(switch in SWITCHES for switch in switches)
    if not ours and not (library in PEERS and all(switch == "compile" for switch in switches)):
        raise ValueError(f"{name}: ours with {', '.join(SWITCHES)}, or one of {', '.join(PEERS)} with compile")
    return name


def recipe_tree(case: Case, folder: Path) -> dict[str, Any]:
    """Return the recipe of ours over the random shards in `folder / "data"`."""
    return {
        "run": str(folder / "run"),
        "model": config.encode(case.shape),
        "data": random_run.data(folder, case.seq_len),
        "train": {
            "tokens": 1000 * case.batch_tokens,
            "batch_tokens": case.batch_tokens,
            "micro_batch_rows": case.micro_rows,
        },
        "optim": {"lr": LEARNING_RATE, "state_dtype": case.states},
        "schedule": {"warmup_ratio": 0.0},
        "parallel": {"float8": "float8" in case.switches, "recompute": {"kind": case.recompute}},
        "runtime": {"device": case.device, "dtype": case.dtype, "compile": "compile" in case.switches},
    }


def write_data(case: Case, folder: Path, steps: int) -> None:
    """Write random ids for so many steps, `case.documents` to a row."""
    length = case.seq_len // case.documents
    random_run.write_shards(folder / "data", case.shape.vocab_size, length, steps * case.batch_tokens // length)
