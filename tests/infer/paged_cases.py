"""Cases of paged attention; as a script, how far the Triton kernel is from the plain reference in each, as JSON.

Triton reads TRITON_INTERPRET when it is imported, which another test may have done before: so a process of its own.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass

import torch
from torch import Tensor

from internlm.infer import paged
from internlm.infer.paged import Stored

Arguments = tuple[Tensor, Stored, Tensor, Tensor, int]


@dataclass(frozen=True)
class Case:
    heads: int
    kv_heads: int
    width: int
    lengths: tuple[int, ...]
    block: int = 16
    splits: int | None = None
    dtype: torch.dtype = torch.float32
    rounded: bool = False

    def make(self, device: str = "cpu") -> Arguments:
        """Return what `attend` takes: blocks in no order, and nothing but NaN where nothing was written."""
        torch.manual_seed(0)
        most = max(1, *(-(-length // self.block) for length in self.lengths)) + 1
        count = most * len(self.lengths)
        tables = torch.randperm(count, dtype=torch.int32).view(len(self.lengths), most)
        shape = (self.kv_heads, count * self.block, self.width)
        keys, values = (torch.full(shape, float("nan")) for _ in range(2))
        for row, length in enumerate(self.lengths):
            slots = slots_of(tables[row], length, self.block)
            keys[:, slots], values[:, slots] = torch.randn(2, self.kv_heads, length, self.width)
        stored = Stored(keys.to(self.dtype), values.to(self.dtype))
        if self.rounded:
            (keys, key_scales), (values, value_scales) = (paged.round_rows(x.nan_to_num()) for x in (keys, values))
            stored = Stored(keys, values, key_scales, value_scales)
        q = torch.randn(len(self.lengths), self.heads, self.width, dtype=self.dtype)
        lengths = torch.tensor(self.lengths, dtype=torch.int32)
        q, tables, lengths = (x.to(device) for x in (q, tables, lengths))
        return q, Stored(*(x if x is None else x.to(device) for x in stored)), tables, lengths, self.block

    def error(self, device: str = "cpu") -> float:
        """Return the largest difference between kernel and reference."""
        given = self.make(device)
        wanted = paged.attend_plainly(*given)
        got = paged.attend_by_kernel(*given, splits=self.splits)
        assert got.shape == wanted.shape
        assert got.dtype == wanted.dtype
        return (got.float() - wanted.float()).abs().max().item()

    @property
    def tolerance(self) -> float:
        """Half precision rounds the shares of keys and the result."""
        return 2e-6 if self.dtype == torch.float32 else 2e-2


def slots_of(table: Tensor, length: int, block: int) -> Tensor:
    """Return the slots of a text."""
    place = torch.arange(length)
    return table[place // block].long() * block + place % block


CASES = {
    "one head for each query head": Case(4, 4, 64, (1, 16, 17, 100)),
    "odd heads of an odd width": Case(5, 5, 12, (7, 33)),
    "groups": Case(8, 2, 32, (1, 31, 64, 65)),
    "one key head, a group of three": Case(3, 1, 14, (5, 80)),
    "a group of seventeen": Case(34, 2, 16, (40,)),
    "one text in many parts": Case(4, 2, 32, (700,), splits=5),
    "parts that are empty": Case(4, 4, 32, (3, 150, 0), splits=4),
    "a text of no token": Case(4, 2, 16, (0, 9), splits=1),
    "whole blocks": Case(4, 2, 16, (64, 128, 192), block=64, splits=3),
    "blocks of one and three": Case(4, 2, 16, (50, 65), block=3, splits=2),
    "bfloat16": Case(8, 2, 64, (5, 130, 64), splits=2, dtype=torch.bfloat16),
    "float16, alone": Case(4, 4, 128, (77,), splits=1, dtype=torch.float16),
    "8 bits": Case(8, 2, 64, (5, 130), splits=2, rounded=True),
    "8 bits, bfloat16, one head each": Case(4, 4, 64, (90,), dtype=torch.bfloat16, rounded=True),
}


def compile_kernel(capability: int, group: int, rounded: bool) -> str:
    """Return the PTX of the kernel for a GPU, which need not be there: bf16, heads of 128, texts in eight parts."""
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from internlm.infer.kernels import attend_split

    kept = "*i8" if rounded else "*bf16"
    pointers = {"q": "*bf16", "keys": kept, "values": kept, "tables": "*i32", "lengths": "*i32"}
    pointers |= dict.fromkeys(["key_scales", "value_scales", "mass", "out"], "*fp32")
    fixed = {
        "GROUP": group, "BLOCK": 32, "SPLITS": 8, "TILE": 64, "WIDTH": 128, "ROWS": 16, "COLUMNS": 128,
        "ROUNDED": rounded, "DOT": tl.bfloat16,
    }  # fmt: skip
    names = attend_split.arg_names
    signature = {name: "constexpr" if name in fixed else pointers.get(name, "i32") for name in names}
    signature["scale"] = "fp32"
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name not in fixed and name != "scale"}
    places = {(names.index(name),): value for name, value in fixed.items()}
    source = ASTSource(attend_split, signature, places, aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["ptx"]


if __name__ == "__main__":
    if sys.argv[1:] == ["compile"]:
        print(json.dumps([compile_kernel(80, 1, False), compile_kernel(90, 8, True)]))
    else:
        print(json.dumps({name: case.error() for name, case in CASES.items()}))
