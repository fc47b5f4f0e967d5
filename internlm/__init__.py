"""From text to a talking model: data, tokenizer, pre-training, tuning, export, chat.

The rooms, in the order in which they may import each other, are drawn in docs/architecture.md.
"""

from __future__ import annotations

TYPE_CHECKING = False  # as type checkers know it; `typing` itself would take two thirds of the import's time
if TYPE_CHECKING:
    from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "Tokenizer": "internlm.text.tokenizer",
    "Message": "internlm.text.chat",
    "Batch": "internlm.data.batch",
    "ModelConfig": "internlm.model.config",
    "Transformer": "internlm.model.transformer",
    "Trainer": "internlm.train.trainer",
    "Engine": "internlm.infer.engine",
    "Request": "internlm.infer.engine",
    "open_source": "internlm.source",
}
"""Public name → module; importing torch takes seconds, so nothing is imported before it is asked for."""

__all__ = ["__version__", *sorted(_PUBLIC)]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'internlm' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_PUBLIC[name]), name)
