"""EleutherAI's evaluation harness against the server: its scores are those that the engine gives itself.

It runs where INTERNLM_LM_EVAL names an interpreter that has `lm_eval[api]` and `transformers`, or under `--proof`,
which makes an environment for it. The command is the one of docs/serving.md; the tasks are files of our own.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from internlm.infer.engine import Engine
from internlm.infer.request import Request
from internlm.text.chat import Message, render_prompt
from internlm.text.templates import get_template
from internlm.weights import transformers as folders
from internlm.weights.talk import Talk
from internlm.weights.weight import of_tensors
from tests.environments import environment
from tests.serve.servers import SHAPE, TOKENIZER, Running, random_model, serving

PAGE = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
VERSION = "0.4.13"
ITEMS: list[dict[str, Any]] = [
    {"question": "What is the sum?", "choices": ["4", "the cat", "END"], "answer": 0},
    {"question": "你好 the cat sat on", "choices": ["the mat.", "the sum", "4 now", "你好"], "answer": 3},
    {"question": "Say", "choices": ["4 now,", "What"], "answer": 1},
    {"question": "the mat. END the cat", "choices": ["sat on the mat.", "END"], "answer": 0},
]
for _item in ITEMS:
    _item["text"] = f"{_item['question']} {' '.join(_item['choices'])} " * 5
CHOICE = {
    "output_type": "multiple_choice",
    "doc_to_choice": "{{choices}}",
    "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
}
WRITE = {
    "output_type": "generate_until",
    "generation_kwargs": {"until": ["END"], "max_gen_toks": 12, "do_sample": False},
    "metric_list": [{"metric": "exact_match"}],
}
ROLLING = {
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{text}}",
    "metric_list": [{"metric": "byte_perplexity"}],
}
pytestmark = pytest.mark.timeout(1800)


def interpreter(pytestconfig: pytest.Config) -> str:
    """Return an interpreter with the harness; skip where there is none."""
    if named := os.environ.get("INTERNLM_LM_EVAL"):
        return named
    if not pytestconfig.getoption("--proof"):
        pytest.skip("lm_eval: under --proof, or where INTERNLM_LM_EVAL names an interpreter that has it")
    return str(environment(f"lm-eval-{VERSION}", f"lm_eval[api]=={VERSION}", "transformers") / "python")


@dataclass
class Harness:
    """The harness, beside a server."""

    python: str
    server: Running
    model: Path
    work: Path

    def run(self, tasks: dict[str, dict[str, Any]], **changes: str) -> dict[str, Any]:
        """Evaluate tasks over ITEMS with the command of the docs; return each one's samples, and "results".

        Args:
            tasks: name → what its file says beside where the data is.
            changes: model arguments in place of those of the docs, and with `model_kind` the kind of model.
        """
        folder = Path(tempfile.mkdtemp(dir=self.work))
        (folder / "data.jsonl").write_text("".join(json.dumps(item) + "\n" for item in ITEMS), encoding="utf-8")
        files = {"data_files": {"test": str(folder / "data.jsonl")}}
        common = {"dataset_path": "json", "dataset_kwargs": files, "test_split": "test", "doc_to_text": "{{question}}"}
        common |= {"doc_to_target": "{{answer}}", "target_delimiter": " "}
        for name, task in tasks.items():  # JSON is YAML
            (folder / f"{name}.yaml").write_text(json.dumps({"task": name, **common, **task}), encoding="utf-8")
        words = self.command(",".join(tasks), **changes)
        words += ["--include_path", str(folder), "--output_path", str(folder / "out"), "--log_samples"]
        quiet = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(self.work / "home"), "HF_DATASETS_OFFLINE": "1"}
        done = subprocess.run(words, env=os.environ | quiet, capture_output=True, text=True, timeout=900, cwd=folder)
        assert done.returncode == 0, done.stderr[-4000:]
        (results,) = (folder / "out").rglob("results_*.json")
        found: dict[str, Any] = {"results": json.loads(results.read_text())["results"]}
        for name in tasks:
            (samples,) = (folder / "out").rglob(f"samples_{name}_*.jsonl")
            lines = [json.loads(line) for line in samples.read_text(encoding="utf-8").splitlines()]
            found[name] = sorted(lines, key=lambda line: int(line["doc_id"]))
        return found

    def command(self, tasks: str, model_kind: str = "local-completions", **changes: str) -> list[str]:
        """Return the words of the docs' command, with what is different here put in."""
        (line,) = re.findall(r"^lm_eval .*$", PAGE, re.MULTILINE)
        name, *words = shlex.split(line)
        at = words.index("--model_args") + 1
        given = dict(pair.split("=", 1) for pair in words[at].split(","))
        assert given["base_url"] == "http://127.0.0.1:8000/v1/completions"
        mine = {"model": "tiny", "base_url": self.server.url + "/v1/completions", "tokenizer": str(self.model)}
        words[at] = ",".join(
            f"{key}={value}" for key, value in (given | mine | {"max_length": "256"} | changes).items()
        )
        words[words.index("--tasks") + 1] = tasks
        words[words.index("--model") + 1] = model_kind
        return [self.python, "-m", name, *words, *["--apply_chat_template"] * (model_kind == "local-chat-completions")]


@pytest.fixture(scope="module")
def harness(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Harness]:
    python = interpreter(pytestconfig)
    work = tmp_path_factory.mktemp("harness")
    talk = Talk(TOKENIZER, "internlm")
    folders.export(of_tensors(random_model().named_parameters()), SHAPE, work / "model", talk)
    with serving() as server:
        yield Harness(python, server, work / "model", work)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(random_model(), TOKENIZER)


def score(engine: Engine, context: str, continuation: str) -> float:
    """Return the log-probability of a continuation in nats."""
    ids = TOKENIZER.encode(context + continuation)
    return float(engine.score(ids)[len(TOKENIZER.encode(context)) - 1 :].sum())


@pytest.fixture(scope="module")
def found(harness: Harness) -> dict[str, Any]:
    return harness.run({"tiny_choice": CHOICE, "tiny_write": WRITE, "tiny_rolling": ROLLING})


def test_the_scores_of_choices_are_those_of_the_engine(found: dict[str, Any], engine: Engine) -> None:
    right = right_by_length = 0
    for item, sample in zip(ITEMS, found["tiny_choice"], strict=True):
        expected = [score(engine, item["question"], " " + choice) for choice in item["choices"]]
        told = [float(response[0][0]) for response in sample["resps"]]
        assert told == pytest.approx(expected, abs=1e-3)
        right += expected.index(max(expected)) == item["answer"]
        means = [value / len(choice) for value, choice in zip(expected, item["choices"], strict=True)]
        right_by_length += means.index(max(means)) == item["answer"]
    assert found["results"]["tiny_choice"]["acc,none"] == right / len(ITEMS)
    assert found["results"]["tiny_choice"]["acc_norm,none"] == right_by_length / len(ITEMS)


def test_the_perplexity_of_texts_is_that_of_the_engine(found: dict[str, Any], engine: Engine) -> None:
    for item, sample in zip(ITEMS, found["tiny_rolling"], strict=True):
        assert TOKENIZER.bos_id is not None
        ids = [TOKENIZER.bos_id, *TOKENIZER.encode(item["text"])]  # the harness puts bos before nothing
        assert len(ids) < 255, "one window"
        assert float(sample["resps"][0][0]) == pytest.approx(float(engine.score(ids).sum()), abs=1e-2)


def answers(engine: Engine, prompts: list[list[int]], **settings: Any) -> list[str]:
    stops = tuple(Talk(TOKENIZER, "internlm").stop_ids())
    settings |= {"max_tokens": 12, "temperature": 0, "stop_ids": stops, "stop_strings": ("END",)}
    return [result.text for result in engine.generate([Request(tokens=ids, **settings) for ids in prompts])]


def test_what_is_written_is_what_the_engine_writes(found: dict[str, Any], engine: Engine) -> None:
    expected = answers(engine, [TOKENIZER.encode(item["question"]) for item in ITEMS], continuation=True)
    assert [sample["resps"][0][0] for sample in found["tiny_write"]] == expected
    assert any(expected)


def test_chat_answers_are_those_of_the_engine(harness: Harness, engine: Engine) -> None:
    url = harness.server.url + "/v1/chat/completions"
    found = harness.run({"tiny_write": WRITE}, base_url=url, model_kind="local-chat-completions")
    template = get_template("internlm")
    prompts = [render_prompt([Message("user", item["question"])], template, TOKENIZER) for item in ITEMS]
    assert [sample["resps"][0][0] for sample in found["tiny_write"]] == answers(engine, prompts)
