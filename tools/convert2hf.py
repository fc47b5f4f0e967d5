"""Turn a training checkpoint into a Transformers folder: a front of `internlm convert --remote-code`.

python tools/convert2hf.py --src_folder origin_ckpt/ --tgt_folder hf_ckpt/ --tokenizer tokenizes/tokenizer.model
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from internlm.cli import main


def convert2hf(argv: Sequence[str] | None = None) -> int:
    """Convert as the arguments say, and return the exit code of `internlm convert`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--src_folder", required=True, help="training checkpoint")
    parser.add_argument("--tgt_folder", required=True, help="folder to write; complete or absent")
    parser.add_argument("--tokenizer", required=True, help="SentencePiece model")
    parser.add_argument("--dtype", help="of the written weights: float32, bfloat16, float16 (default: as stored)")
    parser.add_argument("--max_shard", default="10GB", help="largest weight file (default: %(default)s)")
    given = parser.parse_args(argv)
    options = ["--remote-code", "--tokenizer", given.tokenizer, "--max-shard", given.max_shard]
    options += ["--dtype", given.dtype] if given.dtype else []
    return main(["convert", given.src_folder, given.tgt_folder, *options])


if __name__ == "__main__":
    sys.exit(convert2hf())
