"""What packed weights cost a trained model: loss, choices and answers beside the plain fp32 model.

    python benchmarks/pack_quality.py runs/quickstart/model
    python benchmarks/pack_quality.py MODEL --text held-out.txt --rows 64 --out results.json

MODEL is whatever `internlm chat` opens. Text is by default the part of the embedded corpus that the quickstart holds
out, scored as the quickstart scores it: packed rows, documents that do not see each other, every token once.

    loss         nats per token; bits per byte of the text
    same next    share of tokens after which the most probable next one is the plain model's, the text being given
    logit        largest difference of a logit anywhere, beside the standard deviation of the plain model's logits
    greedy       tokens of an answer before the first that is not the plain model's, on average over prompts, which are
                 beginnings of rows; and the share of answers that are the same to the end
    memory       of parameters and packed weights, biases of packed layers left out

Random weights say little here: their logits lie so close that the order of a sum decides between them.
"""

from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path

import report
import torch
import torch.nn.functional as F
from torch import Tensor

from internlm.data import corpus, loader
from internlm.data.batch import Batch
from internlm.data.loader import DataConfig, SourceConfig
from internlm.data.tokenize import Options, tokenize
from internlm.infer.engine import Engine, Limits
from internlm.model.quant import KINDS, Kind
from internlm.model.transformer import Transformer
from internlm.source import Hints, Source, open_source

BYTES: dict[Kind, int] = {"split": 4, "fp32": 4, "fp16": 2, "bf16": 2, "int8": 1}
_FP16_INPUTS = 512
"""fbgemm fills the inputs of a weight up to a multiple of this."""
_ROWS = 8
"""Of a forward pass."""
_CHUNK = 512
"""Tokens whose logits are compared at once."""
SHOWN = (
    "loss_nats_per_token", "bits_per_byte", "loss_difference_percent", "perplexity_difference", "same_next_token",
    "largest_logit_difference", "greedy_tokens_equal", "greedy_answers_equal",
)  # fmt: skip
COLUMNS = {
    "weights": "<8", "loss": "8.4f", "bits/byte": "9.4f", "loss +%": "+8.4f", "ppl +": "+9.4f", "same next": "9.2%",
    "logit": "8.4f", "greedy": "7.1f", "to the end": "10.0%", "MB": "7.1f",
}  # fmt: skip


def batches_of(source: Source, text: Path | None, length: int, rows: int | None) -> list[Batch]:
    """Return a text as packed rows; None: the held-out part of the embedded corpus."""
    assert source.talk.tokenizer is not None, "the model has no tokenizer: give --tokenizer"
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if text is None:
            corpus.build(folder / "corpus")
            text = folder / "corpus/validation.jsonl"
        (folder / "tokenizer").mkdir()
        source.talk.tokenizer.save(folder / "tokenizer")
        tokenize([text], folder / "held-out", Options(str(folder / "tokenizer")), workers=1)
        held_out = {"held-out": SourceConfig(path=str(folder / "held-out"))}
        config = DataConfig(train=held_out, validation=held_out, seq_len=length)
        return list(loader.Loader(config).validation_batches("held-out", _ROWS, rows))


class Comparison:
    """Sums over the scored tokens of a text, of a model and of the plain one."""

    def __init__(self) -> None:
        self.nats = torch.zeros(2, dtype=torch.float64)
        self.squares = 0.0
        self.tokens = self.logits = self.same = 0
        self.largest = 0.0

    def add(self, plain: Tensor, other: Tensor, labels: Tensor) -> None:
        """Add logits [N, V] of both and the labels [N]."""
        for i, logits in enumerate((plain, other)):
            self.nats[i] += F.cross_entropy(logits.double(), labels, reduction="sum")
        self.tokens += len(labels)
        self.same += int((plain.argmax(-1) == other.argmax(-1)).sum())
        self.largest = max(self.largest, (plain - other).abs().max().item())
        self.squares += (plain - plain.mean(-1, keepdim=True)).double().square().sum().item()
        self.logits += plain.numel()

    def figures(self, text_bytes: int) -> dict[str, float]:
        """Return what the sums say."""
        plain, other = (self.nats / self.tokens).tolist()
        return {
            "loss_nats_per_token": other,
            "bits_per_byte": self.nats[1].item() / math.log(2) / text_bytes,
            "loss_difference_percent": 100 * (other / plain - 1),
            "perplexity": math.exp(other),
            "perplexity_difference": math.exp(other) - math.exp(plain),
            "same_next_token": self.same / self.tokens,
            "largest_logit_difference": self.largest,
            "logit_deviation": math.sqrt(self.squares / self.logits),
        }


def hidden_states(model: Transformer, batch: Batch) -> Tensor:
    """Return the hidden states [N, D] of the tokens whose labels are scored."""
    return model(batch.tokens, batch.positions, batch.documents)[batch.weights > 0]


def compare(
    plain: Transformer, states: list[Tensor], other: Transformer, batches: list[Batch], label_bytes: Tensor
) -> dict[str, float]:
    """Return what a model says to a text, and how far from the plain one, whose hidden states are `states`."""
    sums, text_bytes = Comparison(), 0
    for batch, known in zip(batches, states, strict=True):
        labels = batch.labels[batch.weights > 0]
        text_bytes += int(label_bytes[labels].sum())
        hidden = known if other is plain else hidden_states(other, batch)
        for h, o, wanted in zip(*(x.split(_CHUNK) for x in (known, hidden, labels)), strict=True):
            sums.add(plain.head.logits(h), other.head.logits(o), wanted)
    return sums.figures(text_bytes)


def answers(model: Transformer, kind: Kind | None, prompts: list[list[int]], new: int) -> list[list[int]]:
    """Return greedy answers of `new` tokens."""
    length = max(map(len, prompts)) + new
    engine = Engine(model, limits=Limits(length=length), pack=kind)
    return [list(result.tokens) for result in engine.generate(prompts, max_tokens=new, temperature=0.0)]


def agreement(wanted: list[list[int]], given: list[list[int]]) -> dict[str, float]:
    """Return how long answers are the same."""
    equal = [
        next((i for i, (a, b) in enumerate(zip(*pair, strict=True)) if a != b), len(pair[0]))
        for pair in zip(wanted, given, strict=True)
    ]
    whole = sum(count == len(answer) for count, answer in zip(equal, wanted, strict=True))
    return {"greedy_tokens_equal": sum(equal) / len(equal), "greedy_answers_equal": whole / len(equal)}


def memory(plain: Transformer, model: Transformer, kind: Kind | None) -> int:
    """Return the bytes of a model's parameters and packed weights."""
    kept = dict(model.named_parameters())
    total = sum(4 * parameter.numel() for parameter in kept.values())
    for name, parameter in plain.named_parameters(remove_duplicate=False):  # a tied head is packed for itself
        if kind is not None and name not in kept and parameter.ndim == 2:
            outputs, inputs = parameter.shape
            filled = -(-inputs // _FP16_INPUTS) * _FP16_INPUTS if kind == "fp16" else inputs
            total += outputs * filled * BYTES[kind]
    return total


@torch.inference_mode()
def measure(source: Source, batches: list[Batch], prompts: list[list[int]], new: int) -> dict[str, dict[str, float]]:
    """Return the figures of the plain model and of each kind, and print them."""
    assert source.talk.tokenizer is not None, "asked for before"
    label_bytes = torch.from_numpy(loader.label_bytes(source.talk.tokenizer))
    plain = source.model(torch.float32)
    states = [hidden_states(plain, batch) for batch in batches]
    wanted = answers(plain, None, prompts, new)
    table = report.Table(COLUMNS)
    found: dict[str, dict[str, float]] = {}
    for kind in (None, *KINDS):
        model = plain if kind is None else source.model(torch.float32, pack=kind)
        row = compare(plain, states, model, batches, label_bytes)
        row |= agreement(wanted, wanted if kind is None else answers(model, kind, prompts, new))
        row["weight_bytes"] = memory(plain, model, kind)
        found[kind or "plain"] = row
        table.row(kind or "plain", *(row[key] for key in SHOWN), row["weight_bytes"] / 1e6)
    return found


def main() -> None:
    parser = report.parser(__doc__)
    parser.add_argument("model", type=Path, help="a run, a checkpoint, a Transformers folder, a GGUF file")
    parser.add_argument("--tokenizer", type=Path, help="where none lies beside the model")
    parser.add_argument("--text", type=Path, help="what the model has not seen: .txt, .jsonl (the embedded corpus's)")
    parser.add_argument("--length", type=int, help="tokens of a row (the model's context, 512 at most)")
    parser.add_argument("--rows", type=int, help="rows, spread over the text (all)")
    parser.add_argument("--prompts", type=int, default=64, help="greedy answers (64)")
    parser.add_argument("--prompt", type=int, default=32, help="tokens of a prompt (32)")
    parser.add_argument("--new", type=int, default=128, help="tokens of an answer (128)")
    parser.add_argument("--threads", type=int, help="of torch (its own choice)")
    parser.add_argument("--name", help="of the model in --out (its path), which keeps what it says of other models")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    source = open_source(options.model, Hints(tokenizer=options.tokenizer))
    length = options.length or min(source.config.context_length, 512)
    batches = batches_of(source, options.text, length, options.rows)
    rows = [row for batch in batches for row in batch.tokens.tolist()]
    prompts = [rows[i * len(rows) // options.prompts][: options.prompt] for i in range(options.prompts)]
    tokens = sum(batch.num_tokens for batch in batches)
    print(f"{options.model}: {source.config.num_parameters:,} parameters, {tokens:,} tokens scored")
    found = measure(source, batches, prompts, options.new)
    if options.out:
        facts = {
            "model": options.name or report.place(str(options.model)),
            "parameters": source.config.num_parameters,
            "trained_tokens": source.facts.get("tokens"),
            "tokens_scored": tokens,
            "row_tokens": length,
            "greedy": {"prompts": len(prompts), "prompt_tokens": options.prompt, "new_tokens": options.new},
            "weights": found,
        }
        known = json.loads(options.out.read_text(encoding="utf-8")) if options.out.exists() else []
        others = [other for other in known if other["model"] != facts["model"]]
        report.write(options.out, [*others, report.result(**facts)])


if __name__ == "__main__":
    main()
