"""The hand-over to other engines: the commands, every check with a folder that triggers it and one that does not."""

from __future__ import annotations

import json
import os
import re
import uuid
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from internlm.checkpoint import listing, place
from internlm.cli import main
from internlm.errors import InternLMError, UsageError, WeightsError
from internlm.model.config import DynamicScaling, ExpertsConfig, ModelConfig, RopeConfig
from internlm.model.transformer import build
from internlm.serve.handover import command as handover
from internlm.serve.handover import peers
from internlm.serve.handover.checks import CHECKS
from internlm.serve.handover.found import Wish, read_export
from internlm.source import open_source
from internlm.text.templates import get_template, jinja
from internlm.text.tokenizer import Tokenizer
from internlm.text.training import train_bpe
from internlm.weights import transformers as folders
from internlm.weights.gguf import model as gguf
from internlm.weights.talk import Talk
from internlm.weights.weight import of_tensors
from tests.models import save_checkpoint
from tests.processes import forked

SHAPE = ModelConfig(
    vocab_size=300, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, ffn_size=64, context_length=64
)
WIDE = {"head_dim": 128}
"""A head size for which no check of LMDeploy's has anything to say."""
DYNAMIC = {"rope": RopeConfig(scaling=DynamicScaling(original_length=64)), "context_length": 128}
MOE = {"experts": ExpertsConfig(count=2, per_token=1)}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(["What is the sum? One and one are two."] * 3, 300)


Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Return a function that writes an export, in a folder that is the current one."""
    monkeypatch.chdir(tmp_path)

    def make(name: str = "model", template: str | None = "internlm", **changes: object) -> Path:
        talk = Talk(tokenizer if changes.pop("tokenizer", True) else None, template)
        code, dtype = changes.pop("remote_code", False), changes.pop("dtype", torch.bfloat16)
        if code:
            changes = {"hidden_size": 512, **changes}  # heads of InternLM's classes are hidden size / heads wide
        config = replace(SHAPE, **{**WIDE, **changes})  # type: ignore[arg-type]
        options = folders.ExportOptions(dtype=dtype, remote_code=bool(code))  # type: ignore[arg-type]
        folders.export(of_tensors(build(config, 0).named_parameters()), config, name, talk, options)
        return Path(name)

    return make


def edit(file: Path, **fields: object) -> None:
    content = json.loads(file.read_text())
    file.write_text(json.dumps({key: value for key, value in (content | fields).items() if value is not None}))


def found(model: Path, engine: str, **wish: object) -> list[str]:
    return [finding.what for finding in handover.plan_for(model, Wish(engine=engine, **wish)).findings]  # type: ignore[arg-type]


COMMANDS = {
    "lmdeploy": "lmdeploy serve api_server model --model-name tiny --server-name 127.0.0.1 --server-port 8000 "
    "--dtype bfloat16 --session-len 32 --chat-template hf --tp 2 --api-keys 'a b' --tool-call-parser qwen3",
    "vllm": "VLLM_API_KEY='a b' vllm serve model --served-model-name tiny --host 127.0.0.1 --port 8000 "
    "--dtype bfloat16 --max-model-len 32 --tensor-parallel-size 2 --enable-auto-tool-choice --tool-call-parser hermes",
    "sglang": "sglang serve --model-path model --served-model-name tiny --host 127.0.0.1 --port 8000 "
    "--dtype bfloat16 --context-length 32 --tp-size 2 --api-key 'a b' --tool-call-parser hermes",
    "llama.cpp": "LLAMA_API_KEY='a b' llama-server --model model-gguf/model-gguf-bf16.gguf --alias tiny "
    "--host 127.0.0.1 --port 8000 --ctx-size 32 --jinja --split-mode layer --tensor-split 1,1",
}


@pytest.mark.parametrize("engine", peers.PEERS)
def test_the_command_of_each_engine_is_exact(engine: str, make: Make) -> None:
    plan = handover.plan_for(make(), Wish(engine=engine, tensor=2, context=32, name="tiny", api_key="a b"))
    assert str(plan.command) == COMMANDS[engine]
    assert (plan.before is not None) == (engine == "llama.cpp")


def test_without_options_the_command_takes_what_the_model_says(make: Make) -> None:
    plan = handover.plan_for(make("good"), Wish(engine="vllm"))
    assert str(plan.command) == (
        "vllm serve good --served-model-name good --host 127.0.0.1 --port 8000 --dtype bfloat16 --max-model-len 64 "
        "--enable-auto-tool-choice --tool-call-parser hermes"
    )
    assert plan.findings == ()
    assert plan.facts["chat format"] == "internlm, read from tokenizer_config.json"
    assert plan.facts["answers end at"] == "ids 1, 6, read from generation_config.json"


def test_the_parser_of_calls_is_named_where_the_engine_has_one_and_the_export_tells_of_tools(make: Make) -> None:
    export = read_export(open_source(make()))
    names = ["<|im_start|>", "<|im_end|>", "<|action_start|>", "<|action_end|>", "<|plugin|>", "<eoa>"]

    def parsers(template: str, names: list[str]) -> list[str | None]:
        talk = Talk(train_bpe(["One and one are two."] * 3, 300, ["<s>", *names]), template)
        told = replace(export, talk=talk, template=talk.jinja)
        return [handover.tool_parser(told, engine) for engine in peers.PEERS]

    assert parsers("chatml", names) == ["qwen3", "hermes", "hermes", None]
    assert parsers("internlm2", names) == ["internlm", "internlm", None, None]
    assert parsers("internlm-v1.1", names) == [None] * 4
    assert parsers("internlm2", names[:2]) == [None] * 4
    before = replace(export, template=jinja(get_template("internlm")))
    assert [handover.tool_parser(before, engine) for engine in peers.PEERS] == [None] * 4
    plan = handover.plan_for(export.path, Wish(engine="vllm"))
    assert plan.facts["tools"] == "hermes format, read by the parser 'hermes'"


@pytest.mark.parametrize("engine", peers.PEERS)
def test_a_good_export_has_no_findings_on_any_engine(engine: str, make: Make) -> None:
    said = found(make(), engine)
    assert said == (["llama.cpp reads GGUF files, and this is a Transformers folder"] if engine == "llama.cpp" else [])


@pytest.mark.parametrize("engine", peers.PEERS)
def test_the_conversion_that_comes_first_makes_what_the_command_names(
    engine: str, make: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("gguf")
    published = make("published", remote_code=True)
    first = handover.plan_for(published, Wish(engine=engine))
    assert first.before is not None
    assert first.command is not None
    assert main(list(first.before.words[1:])) == 0
    target = Path("published-gguf" if engine == "llama.cpp" else "published-export")
    assert any(Path(word).exists() and target in (Path(word), Path(word).parent) for word in first.command.words)
    second = handover.plan_for(target, Wish(engine=engine, name="published"))
    assert (second.before, second.command, second.findings) == (None, first.command, ())
    assert any("is there already" in what for what in found(published, engine))


@pytest.mark.parametrize(
    ("engine", "said"), [("lmdeploy", "in 0.15"), ("vllm", "vLLM 0.23"), ("sglang", "SGLang 0.5.23 has no")]
)
def test_internlm_of_2023_as_published_is_converted_first(engine: str, said: str, make: Make) -> None:
    assert said in found(make(remote_code=True), engine)[0]


def test_a_gguf_file_is_for_llama_cpp_and_is_converted_for_others(make: Make, tokenizer: Tokenizer) -> None:
    pytest.importorskip("gguf")
    weights = of_tensors(build(SHAPE, 0).named_parameters())
    gguf.export(weights, SHAPE, "small", Talk(tokenizer, "internlm"))
    plan = handover.plan_for("small", Wish(engine="llama.cpp"))
    assert plan.before is None
    assert plan.command is not None
    assert plan.command.words[2] == "small/small-f32.gguf"
    assert plan.facts["answers end at"] == "ids 1, 6, read from the file"
    other = handover.plan_for("small", Wish(engine="sglang"))
    assert str(other.before) == "internlm convert small small-export --dtype bfloat16"


@pytest.mark.parametrize("engine", ["vllm", "llama.cpp"])
def test_a_run_is_converted_first(
    engine: str, tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("gguf")
    tensors = {f"model.{name}": p.detach() for name, p in build(SHAPE, 0).named_parameters()}
    meta = {"step": 3, "template": "internlm"}
    save_checkpoint(tmp_path / "runs" / "a" / "checkpoints" / listing.name_of(3), tensors, SHAPE, tokenizer, meta)
    monkeypatch.chdir(tmp_path)
    plan = handover.plan_for("runs/a", Wish(engine=engine))
    assert plan.before is not None
    assert plan.command is not None
    assert main(list(plan.before.words[1:])) == 0
    assert any(Path(word).exists() and "runs/a-" in word for word in plan.command.words)
    assert "a" in plan.command.words
    monkeypatch.chdir("runs/a")
    here = handover.plan_for(".", Wish(engine="vllm"))
    assert str(here.before) == f"internlm convert . {tmp_path / 'runs' / 'a-export'} --dtype bfloat16"


def test_a_run_in_a_store_is_converted_into_the_working_directory() -> None:
    url = f"memory://{uuid.uuid4().hex}/run-7"
    tensors = {f"model.{name}": p.detach() for name, p in build(SHAPE, 0).named_parameters()}
    save_checkpoint(place.at(url) / "checkpoints" / "step-00000003", tensors, SHAPE, None, {"step": 3})
    plan = handover.plan_for(url, Wish(engine="vllm"))
    assert str(plan.before) == f"internlm convert {url} run-7-export --dtype bfloat16"


def forget_stops(folder: Path) -> None:
    edit(folder / "generation_config.json", eos_token_id=1)


def write_bos(folder: Path) -> None:
    """As Transformers writes the tokenizers of Llama: bos is put before every text."""
    bos = {"id": "<|bos|>", "ids": [0], "tokens": ["<|bos|>"]}
    pieces = [{"SpecialToken": {"id": "<|bos|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    step = {"type": "TemplateProcessing", "single": pieces, "pair": pieces, "special_tokens": {"<|bos|>": bos}}
    edit(folder / "tokenizer.json", post_processor=step)


def nothing(folder: Path) -> None:
    pass


CASES = {
    "base model": ("vllm", {"template": None}, nothing, "no chat format"),
    "stops": ("vllm", {}, forget_stops, "would not end at <|end|> (6)"),
    "double bos": ("lmdeploy", {}, write_bos, "begin with bos twice"),
    "name": ("lmdeploy", {"name": "my-llama2"}, nothing, "would select the chat format 'llama2'"),
    "head size without kernels": ("lmdeploy", {"head_dim": 32}, nothing, "no attention for heads of 32"),
    "head size without small caches": ("lmdeploy", {"head_dim": 64}, nothing, "4 or 8 bits for heads of 128 only"),
    "dynamic NTK": ("vllm", DYNAMIC, nothing, "vLLM does not extend by dynamic NTK"),
    "dtype": ("sglang", {"dtype": torch.float32}, nothing, "stored as float32"),
    "copies of heads": ("vllm", {"tensor": 4}, nothing, "some hold copies"),
    "open door": ("vllm", {"host": "0.0.0.0"}, nothing, "whoever reaches 0.0.0.0:8000"),
    "key in sight": ("lmdeploy", {"api_key": "k"}, nothing, "takes the key from its command line"),
}
SIX = {"hidden_size": 48, "num_heads": 6, "num_kv_heads": 6, "ffn_size": 66}
WISHES = ("tensor", "host", "api_key")


@pytest.mark.parametrize("case", CASES)
def test_each_check_speaks_where_it_should(case: str, make: Make) -> None:
    engine, changes, spoil, said = CASES[case]
    wish = {name: value for name, value in changes.items() if name in WISHES}  # type: ignore[attr-defined]
    folder = make(**{name: value for name, value in changes.items() if name not in WISHES})  # type: ignore[attr-defined]
    spoil(folder)
    plan = handover.plan_for(folder, Wish(engine=engine, **wish))
    assert len(plan.findings) == 1, plan.findings
    assert said in plan.findings[0].what
    assert plan.findings[0].do
    assert plan.command is not None


BLOCKED = {
    "no tokenizer": ("vllm", {"tokenizer": False, "template": None}, {}, "no tokenizer"),
    "name": ("sglang", {"name": "unlimited"}, {}, "selects the chat format 'unlimited-ocr'"),
    "name of a base model": ("lmdeploy", {"name": "vicuna", "template": None}, {}, "selects the chat format 'vicuna'"),
    "tied": ("sglang", {"tie_embeddings": True, **MOE}, {}, "does not tie the head of a MixtralForCausalLM"),
    "bias": ("vllm", {"qk_norm": True, "output_bias": True}, {}, "no bias on the attention's output"),
    "tensor": ("vllm", {}, {"tensor": 3}, "3 GPUs cannot share 4 heads"),
    "not a power of 2": ("lmdeploy", SIX, {"tensor": 3}, "power of 2"),
    "layers": ("llama.cpp", {}, {"tensor": 3}, "2 layers are shared out to 3 GPUs"),
    "no such file": ("llama.cpp", {"qk_norm": True, "qkv_bias": True}, {}, "norms of queries and keys without biases"),
    "one base for all": (
        "sglang",
        {"rope": RopeConfig(scaling=DynamicScaling(factor=2.0, original_length=64))},
        {},
        "one rotary base for all texts",
    ),
}


@pytest.mark.parametrize("case", BLOCKED)
def test_a_model_that_an_engine_would_serve_wrongly_gets_no_command(case: str, make: Make) -> None:
    engine, changes, wish, said = BLOCKED[case]
    plan = handover.plan_for(make(**changes), Wish(engine=engine, **wish))  # type: ignore[arg-type]
    blocking = [finding for finding in plan.findings if finding.blocks]
    assert len(blocking) == 1, plan.findings
    assert said in blocking[0].what
    assert plan.command is None


@pytest.mark.parametrize(
    ("engine", "changes", "wish"),
    [
        ("vllm", {"tie_embeddings": True, **MOE}, {}),
        ("sglang", {"qk_norm": True, "output_bias": True}, {}),
        ("vllm", {"output_bias": True}, {}),
        ("vllm", SIX, {"tensor": 3}),
        ("lmdeploy", {"rope": RopeConfig(scaling=DynamicScaling(factor=2.0, original_length=64))}, {}),
        ("vllm", {"name": "my-llama2"}, {}),
        ("vllm", {"api_key": "k"}, {"host": "0.0.0.0"}),
    ],
)
def test_what_one_engine_cannot_another_can(
    engine: str, changes: dict[str, object], wish: dict[str, object], make: Make
) -> None:
    key = changes.get("api_key")
    folder = make(**{name: value for name, value in changes.items() if name != "api_key"})
    assert found(folder, engine, api_key=key, **wish) == []


def test_a_vocabulary_without_tokenizer_json_is_told(make: Make) -> None:
    folder = make()
    source, wish = open_source(folder), Wish(engine="vllm")
    assert [finding for check in CHECKS for finding in check(read_export(source), wish)] == []
    (folder / "tokenizer.json").rename(folder / "tokenizer.model")
    said = [finding for check in CHECKS for finding in check(read_export(source), wish)]
    assert [(finding.what, finding.blocks) for finding in said] == [
        ("there is no tokenizer.json, which engines load without further packages", False)
    ]


@pytest.mark.parametrize("spoil", [nothing, write_bos])
def test_whether_bos_is_added_is_what_transformers_does(spoil: Callable[[Path], None], make: Make) -> None:
    reference = pytest.importorskip("transformers")
    folder = make()
    spoil(folder)
    edit(folder / "tokenizer_config.json", add_bos_token=None)
    ids = reference.AutoTokenizer.from_pretrained(folder)("sum")["input_ids"]
    assert read_export(open_source(folder)).adds_bos == (ids[0] == 0)
    assert (ids[0] == 0) == (spoil is write_bos)


def test_dynamic_ntk_reaches_past_the_trained_length_on_turbomind_alone(make: Make) -> None:
    folder = make(**DYNAMIC)
    export = read_export(open_source(folder))
    lengths = {name: export.limit(name) for name in peers.PEERS}
    assert lengths == {"lmdeploy": 128, "vllm": 64, "sglang": 64, "llama.cpp": 64}
    narrow = make("narrow", **DYNAMIC, head_dim=32)
    assert read_export(open_source(narrow)).limit("lmdeploy") == 64
    assert any("LMDeploy's PyTorch engine does not extend" in what for what in found(narrow, "lmdeploy"))
    assert handover.plan_for(folder, Wish(engine="lmdeploy", context=128)).command is not None
    with pytest.raises(UsageError, match="64 tokens at most on vLLM"):
        handover.plan_for(folder, Wish(engine="vllm", context=128))


@pytest.mark.parametrize(
    "wish", [{"engine": "tgi"}, {"engine": "vllm", "port": 0}, {"engine": "vllm", "tensor": 0}], ids=str
)
def test_wishes_that_cannot_be_are_refused(wish: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        Wish(**wish)  # type: ignore[arg-type]


def test_what_is_no_model_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InternLMError, match="no such folder"):
        handover.plan_for(tmp_path / "none", Wish(engine="vllm"))


def test_a_chat_format_that_is_no_text_is_an_error_that_names_the_file(make: Make) -> None:
    folder = make()
    (folder / "chat_template.jinja").write_bytes(b"{{ \xff }}")
    with pytest.raises(WeightsError, match=r"chat_template\.jinja: cannot be read: .* Copy the file again"):
        read_export(open_source(folder))


@pytest.mark.parametrize("engine", ["vllm", "llama.cpp"])
def test_a_chat_format_that_is_not_the_recorded_one_gets_no_command_until_it_is_settled(
    engine: str, make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    folder = make()
    ours = read_export(open_source(folder)).template
    assert ours is not None
    file = folder / "chat_template.jinja"
    file.write_text(ours + "\n")
    assert handover.plan_for(folder, Wish(engine=engine)).command is not None
    assert caplog.text == ""
    file.write_text(ours[: len(ours) // 2])
    source = open_source(folder)
    assert "chat_template.jinja does not hold the chat format internlm, which internlm_template of" in caplog.text
    assert "here the recorded one counts" in caplog.text
    assert source.talk.template == "internlm"
    plan = handover.plan_for(folder, Wish(engine=engine))
    if engine == "llama.cpp":  # a file is made first, by the recorded one
        assert plan.command is not None
        return
    assert plan.command is None
    (finding,) = (finding for finding in plan.findings if finding.blocks)
    assert finding.what == "chat_template.jinja does not hold the chat format internlm, which is recorded"
    assert "`internlm convert model NEW` writes the recorded one" in finding.do
    assert main(["convert", "model", "new"]) == 0
    assert handover.plan_for("new", Wish(engine=engine)).command is not None
    edit(folder / "tokenizer_config.json", internlm_template=None)
    assert handover.plan_for(folder, Wish(engine=engine)).command is not None
    assert open_source(folder).talk.foreign is not None


def test_the_verb_prints_the_command_alone_to_stdout(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make(dtype=torch.float32)
    assert main(["deploy", str(folder), "--engine", "sglang"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("sglang serve --model-path model")
    assert out.count("\n") == 1
    assert "stored as float32" in err
    assert main(["deploy", str(folder), "--engine", "vllm", "--tensor", "3"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert "Give --tensor 1, 2, 4." in err


@pytest.mark.parametrize("words", [[], ["model"], ["model", "--engine", "vllm", "--run", "--print"]])
def test_wrong_usage_of_the_verb_exits_with_2(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["deploy", *words]) == 2


def test_the_table_says_of_every_claim_how_it_is_known(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["deploy", "--table"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(peers.SUPPORT) + 2
    for row in peers.SUPPORT.values():
        assert list(row) == list(peers.PEERS)
        for claim in row.values():
            assert re.fullmatch(r".+ \[(source|ran|documented) [\w.]+\]", claim)
    ran = {name for row in peers.SUPPORT.values() for name, claim in row.items() if "[ran " in claim}
    assert ran == {"llama.cpp"}, "no other engine has run with an export of ours"


def test_the_docs_hold_the_table() -> None:
    docs = Path(__file__).parents[2] / "docs" / "serving.md"
    assert peers.markdown() in docs.read_text(encoding="utf-8"), "paste what `internlm deploy --table` prints"


FAKE = """\
#!/bin/sh
echo "$0 $*" > said
echo "key $VLLM_API_KEY" >> said
"""


def test_run_becomes_the_engine(make: Make, tmp_path: Path) -> None:
    make()
    command = ["deploy", "model", "--engine", "vllm", "--api-key", "k e y", "--run"]
    done = forked(*command, PATH="/nowhere")
    assert done.returncode == 2
    assert "vllm is not on PATH. Install it: pip install vllm" in done.stderr
    fake = tmp_path / "bin" / "vllm"
    fake.parent.mkdir()
    fake.write_text(FAKE)
    fake.chmod(0o755)
    done = forked(*command, PATH=f"{fake.parent}:{os.environ['PATH']}")
    assert done.returncode == 0, done.stderr
    said = Path("said").read_text().splitlines()
    assert said[0].endswith("serve model --served-model-name model --host 127.0.0.1 --port 8000 --dtype bfloat16 "
                            "--max-model-len 64 --enable-auto-tool-choice --tool-call-parser hermes")  # fmt: skip
    assert said[1] == "key k e y"


def test_run_refuses_a_model_that_has_to_be_converted_first(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make(remote_code=True)
    assert main(["deploy", str(folder), "--engine", "vllm", "--run"]) == 2
    assert "Run: internlm convert model model-export --dtype bfloat16" in capsys.readouterr().err
