"""Names and addresses of the Hugging Face hub, such as "Qwen/Qwen2.5-0.5B", given where a path is wanted."""

from __future__ import annotations

import os
import re
from pathlib import Path

from internlm.errors import StorageError

_PAGE = re.compile(
    r"(?:hf:/+|https?:/+(?:www\.)?(?:huggingface|hf)\.co/+)(datasets/)?([\w.-]+(?:/(?!tree/|blob/|resolve/)[\w.-]+)?)"
)
"""An address there; `pathlib` makes one slash of two."""
_NAME = re.compile(r"\w[\w-]*|\w[\w.-]*/\w[\w.-]*")
"""What may be a name there: a word, or owner/name."""


def require_here(path: str | Path, *, where: str | None = None, dataset: bool = False) -> None:
    """Check that a path is no name and no address of the Hugging Face hub, from which nothing is downloaded here.

    `where`: the option or key that it was given as; `dataset`: whether a name stands for a data set, not for a model.

    Raises:
        StorageError: there is no such path and it reads like one, with the command that downloads it.
    """
    text = str(path)
    page = _PAGE.match(text)
    if page:
        name, dataset = page[2], dataset or page[1] is not None
    else:
        is_file = os.path.splitext(text)[1][1:].isalpha()  # `runs.jsonl`, not `Qwen/Qwen2.5`
        if is_file or not _NAME.fullmatch(text) or os.path.exists(text):
            return
        name = text
    words = ["hf", "download", name, *(["--repo-type", "dataset"] if dataset else []), "--local-dir", "DIR"]
    raise StorageError(
        "no such folder, and nothing is downloaded here", where=where or text, got=text if where else None,
        do=f"From the Hugging Face hub: `{' '.join(words)}`, then give DIR.",
    )  # fmt: skip
