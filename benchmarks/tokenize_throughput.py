"""Tokenising, in MB of text per second: `internlm data tokenize` beside the libraries under it; and the loader.

    python benchmarks/tokenize_throughput.py                            a BPE of 4,096 ids, trained on the same text
    python benchmarks/tokenize_throughput.py --tokenizer V7_sft.model   any tokenizer

Text: the embedded corpus. Peers hold the text and keep the ids in memory; ours reads JSON lines, writes shards and
their checksums, and starts its workers, all of which is inside its time. Rounds interleave the contenders; medians.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import report

from internlm.data import corpus
from internlm.data.formats import read_documents
from internlm.data.tokenize import Options, tokenize
from internlm.text.training import train_to_folder

SEQ_LEN, ROWS, STEPS = 2048, 16, 50


def contenders(path: Path, texts: list[str], tokenizer: Path, out: Path) -> dict[str, Callable[[], object]]:
    """Return what is timed, by name; a library that cannot read this tokenizer is left out."""
    options = Options(str(tokenizer))
    found: dict[str, Callable[[], object]] = {
        f"internlm, {n} workers": lambda n=n: tokenize(
            [path], out, options, workers=n, unit_bytes=2 << 20, replace=True
        )
        for n in (1, 2)
    }
    if tokenizer.suffix == ".model":
        from sentencepiece import SentencePieceProcessor

        processor = SentencePieceProcessor(model_file=str(tokenizer))
        found["sentencepiece, 1 thread"] = lambda: [processor.encode(text) for text in texts]
        found["sentencepiece, 2 threads"] = lambda: processor.encode(texts, num_threads=2)
    else:
        from tokenizers import Tokenizer

        fast = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))

        def parallel() -> object:
            os.environ["TOKENIZERS_PARALLELISM"] = "true"
            try:
                return fast.encode_batch(texts)
            finally:
                os.environ["TOKENIZERS_PARALLELISM"] = "false"

        found["tokenizers, 1 thread"] = lambda: [fast.encode(text).ids for text in texts]
        found["tokenizers, all cores"] = parallel
    return found


def loader_speed(shards: Path) -> float:
    """Return packed tokens per second of the loader, in one thread."""
    # Torch: workers, which import this file again, do without.
    from internlm.data.loader import DataConfig, Loader, SourceConfig

    loader = Loader(DataConfig(train={"a": SourceConfig(path=str(shards))}, seq_len=SEQ_LEN))
    started = time.perf_counter()
    for _ in range(STEPS):
        loader.next_batch(ROWS)
    return STEPS * ROWS * SEQ_LEN / (time.perf_counter() - started)


def main() -> None:
    parser = report.parser(__doc__)
    parser.add_argument("--tokenizer", type=Path, help=".model file or folder with tokenizer.json")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        corpus.build(folder / "corpus")
        path = folder / "corpus/train.jsonl"
        texts = [document.text for document in read_documents(path)]
        megabytes = sum(len(text.encode()) for text in texts) / 1e6
        if options.tokenizer is None:
            train_to_folder(texts, folder / "tokenizer", 4096)
        tokenizer = options.tokenizer or folder / "tokenizer"
        times: dict[str, list[float]] = {}
        for _ in range(options.rounds):
            for name, call in contenders(path, texts, tokenizer, folder / "shards").items():
                started = time.perf_counter()
                call()
                times.setdefault(name, []).append(time.perf_counter() - started)
        speeds = {name: megabytes / statistics.median(seconds) for name, seconds in times.items()}
        packed = loader_speed(folder / "shards")
    table = report.Table({"": "<28", "MB/s": "8.2f"})
    rows = [{"name": name, "mb_per_s": speed} for name, speed in speeds.items()]
    for row in rows:
        table.row(*row.values())
    print(f"loader, rows of {SEQ_LEN:,}: {packed / 1e6:.2f} M tokens/s")
    kind = "trained here" if options.tokenizer is None else tokenizer.name
    facts = {"tokenizer": kind, "megabytes": megabytes, "loader_tokens_per_s": packed}
    report.write(options.out, report.result(**facts, rows=rows))


if __name__ == "__main__":
    main()
