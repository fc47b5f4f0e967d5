"""Files of `torch.save` from strangers, read without running anything they ask for.

    states = load("model_tp0_pp0.pt")        # {"model.norm.weight": tensor, …}, mapped, not read

A pickle is a program: it names functions and calls them. Only what builds tensors and plain containers is called here
(PyTorch's `weights_only` list). Checkpoints of InternLM v0.2 and InternEvo also name classes of their framework (a dict
with attributes, an enum). Those names stand for nothing: a dict subclass arrives as a plain dict, an enum as the text
of its value, and no module is imported for them, ours least of all, which has the same name. Other names are refused.

Limits: files in the zip format, which PyTorch writes since 1.6; tensors map the file and must not be written to.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch

from internlm.errors import WeightsError, first_line
from internlm.weights.bin_files import check_archive

FRAMEWORK = "internlm."
"""How names of the framework's classes begin."""


class _Inert:
    """Stands for a class of the framework: called with a value it gives the text of it, else an empty dict."""

    def __new__(cls, *values: object) -> Any:
        """Return a plain object: there is never one of this class, so nothing can be set on it."""
        return str(values[0]) if values else {}


def load(path: Path) -> Any:
    """Return the content of a file of `torch.save`; its tensors are on the CPU and map the file.

    Raises:
        WeightsError: it names anything but tensors, plain containers and classes of the framework, or is damaged.
    """
    try:
        check_archive(path)
        # Only names that are not known to be harmless; found by reading the program, without running it.
        names = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(str(path)))
        foreign = [name for name in names if not name.startswith(FRAMEWORK)]
        if foreign:
            raise WeightsError(
                f"would run {', '.join(foreign)} when it is loaded, and was not read",
                where=path,
                do="A checkpoint needs tensors and plain containers only: do not trust this file.",
            )
        with torch.serialization.safe_globals([(_Inert, name) for name in names]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise WeightsError("is missing", where=path) from None
    except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError, OSError, KeyError, IndexError) as error:
        what = f"cannot be read as a file of torch.save: {first_line(error)}"
        raise WeightsError(what, where=path, do="Copy it again.") from None
    except (TypeError, AttributeError, AssertionError) as error:
        raise WeightsError(f"holds a program that makes no sense: {error}", where=path, do="Do not trust it.") from None
