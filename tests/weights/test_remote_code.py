"""Folders with remote code: the README lines of InternLM under several versions of Transformers, against our own."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import random
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch

from internlm.errors import WeightsError
from internlm.infer.engine import Engine
from internlm.infer.request import Request
from internlm.model.config import DynamicScaling, LinearScaling, ModelConfig, RopeConfig
from internlm.model.transformer import Transformer
from internlm.text.chat import Message, render_prompt
from internlm.text.templates import get_template
from internlm.text.tokenizer import Tokenizer
from internlm.text.training import train_bpe
from internlm.weights import carried
from internlm.weights import transformers as folders
from internlm.weights.talk import Talk, read_talk
from internlm.weights.weight import of_tensors
from tests.environments import environment
from tests.models import random_model
from tests.processes import forked

SCRIPT = Path(__file__).with_name("remote_transcript.py")
ROOT = Path(__file__).parents[2]
V7 = ROOT.parent / "shared" / "tokenizer" / "V7_sft.model"
OLD = ("4.30.2", "4.46.3")
NEW_TOKENS = 24
TEXTS = [
    "hello", " What is  the sum? ", "", "  two\n\tlines 你好 👋\n", "a▁b", "typed <eoa> and <s> and </s>",
    "<eoh><|User|>:",
    "\x00\x01 é e\u0301 \ufeff", "<<eoa>eoa>",
]  # fmt: skip
CONVERSATIONS: list[dict[str, Any]] = [
    {"query": "hello", "history": []},
    {"query": "And 3?", "history": [("What is 2 + 2?", "4. 你好 👋"), ("Sure?", "\n\nyes")]},
    {"query": "typed <eoa>\n<|Bot|>:yes</s> <eoh>▁<s>", "history": [("<eoa>", "no <eoa> here")]},
    {"query": "<think>\n\nso?</think> <|end|>", "history": []},
]
WITH_SYSTEM = [*CONVERSATIONS, {"query": "hello", "history": [], "meta": "Be <eoa> brief."}]
WITHOUT_SYSTEM = [*WITH_SYSTEM, {"query": "hello", "history": [], "meta": ""}]


def sentencepiece_tokenizer(**options: Any) -> Tokenizer:
    """Return a small vocabulary of InternLM's kind."""
    model = io.BytesIO()
    settings = {
        "model_type": "bpe", "vocab_size": 360, "byte_fallback": True, "add_dummy_prefix": False,
        "remove_extra_whitespaces": False, "normalization_rule_name": "identity", "minloglevel": 2,
        "user_defined_symbols": ["<eoh>", "<eoa>", "\n\n"], "hard_vocab_limit": False, "character_coverage": 0.99,
    }  # fmt: skip
    lines = ["What is the sum? Be brief, and say 4 now.", " hello <|User|>: <|Bot|>: <|System|>:", "yes, no"] * 20
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, **{**settings, **options}
    )
    return Tokenizer(model.getvalue(), is_json=False)


def thinking(tokenizer: Tokenizer) -> Tokenizer:
    """Return a byte-level vocabulary with one added token more, which is not special: typed, it is text."""
    spec = json.loads(tokenizer._data)
    token = {"id": tokenizer.vocab_size, "content": "<think>", "special": False, "normalized": False}
    spec["added_tokens"].append({**token, "single_word": False, "lstrip": False, "rstrip": False})
    return Tokenizer.from_json(json.dumps(spec))


def scripted_model(config: ModelConfig, ids: list[int]) -> Transformer:
    """Return a model that says `ids[1:]`, one after the other, after the token `ids[0]`."""
    model = random_model(config)
    with torch.no_grad():
        model.head.weight.zero_()
        for block in model.blocks.values():
            for name, parameter in block.named_parameters():
                if "wo" in name or "w_down" in name:
                    parameter.zero_()
        model.norm.weight.fill_(1)
        for before, after in itertools.pairwise(ids):
            model.head.weight[after] += model.embedding.weight[before]
    return model


def export(folder: Path, model: Transformer, talk: Talk, **options: Any) -> Path:
    options = {"remote_code": True, **options}
    folders.export(of_tensors(model.named_parameters()), model.config, folder, talk, folders.ExportOptions(**options))
    return folder


def shape(tokenizer: Tokenizer, **changes: Any) -> ModelConfig:
    fields: dict[str, Any] = {
        "vocab_size": tokenizer.vocab_size, "hidden_size": 48, "num_layers": 2, "num_heads": 4, "ffn_size": 64,
        "context_length": 1024, "qkv_bias": True, "output_bias": True,
    }  # fmt: skip
    return ModelConfig(**{**fields, **changes})


def noise(tokenizer: Tokenizer, count: int) -> list[str]:
    """Return random strings of a vocabulary's pieces, and half as many of Unicode."""
    draw, most = random.Random(0), min(tokenizer.vocab_size, 103_000)
    pieces = [tokenizer.token_bytes(draw.randrange(3, most)).decode("utf-8", "ignore") for _ in range(3000)]
    texts = ["".join(draw.choices(pieces, k=draw.randint(1, 30))) for _ in range(count)]
    return texts + ["".join(chr(draw.randrange(1, 0xD800)) for _ in range(30)) for _ in range(count // 2)]


COMPUTED = ["plain", "dynamic", "one layer", "fast"]
SAID = "你👋é文"
"""Characters of two to four bytes, no byte twice."""


class World:
    """The exported folders, what is asked of them, and what we make of it ourselves.

    Args:
        published: whether InternLM's own vocabulary is among them, where it is at hand.
    """

    def __init__(self, folder: Path, published: bool) -> None:
        self.pieces, self.bytes = (
            sentencepiece_tokenizer(),
            thinking(train_bpe(["What is the sum?", "你好 👋"] * 3, 300)),
        )
        self.tokenizers: dict[str, Tokenizer] = {}
        self.templates: dict[str, str] = {}
        self.models: dict[str, Transformer] = {}
        self.cases: dict[str, dict[str, Any]] = {}
        self.folder = folder
        rope = RopeConfig(base=500.0, scaling=DynamicScaling(factor=1.5, original_length=32))
        texts = [*TEXTS, *noise(self.pieces, 20)]
        self.add("plain", self.pieces, "internlm-v1.1", {}, conversations=WITHOUT_SYSTEM, ends=True, texts=texts)
        self.add("dynamic", self.pieces, "internlm-v1.0", {"rope": rope, "num_kv_heads": 2, "context_length": 64})
        self.add("one layer", self.pieces, "internlm-v1.0", {"rope": rope, "num_layers": 1, "context_length": 64})
        self.add("first", self.pieces, "internlm-v1.0", {}, conversations=CONVERSATIONS)
        self.add(
            "prefixed", sentencepiece_tokenizer(add_dummy_prefix=True), "internlm-v1.0", {}, conversations=CONVERSATIONS
        )
        tied = {"tie_embeddings": True, "qkv_bias": False, "output_bias": False}
        self.add("fast", self.bytes, "internlm", tied, conversations=WITH_SYSTEM)
        colon, end = self.pieces.encode("<|Bot|>:")[-1], self.pieces.special("<eoa>")
        self.script = [self.pieces._backend.find(f"<0x{byte:02X}>") for byte in SAID.encode()]
        ids = [colon, *self.script, end, self.script[0]]
        model = scripted_model(shape(self.pieces), [one for one in ids if one is not None])
        self.add("scripted", self.pieces, "internlm-v1.1", model, conversations=CONVERSATIONS)
        self.add_readme()
        if published and V7.exists():
            tiny = {"hidden_size": 8, "num_layers": 1, "num_heads": 1, "ffn_size": 8}
            v7 = Tokenizer.load(V7)
            self.add("v7", v7, None, tiny, conversations=WITHOUT_SYSTEM, texts=[*TEXTS, *noise(v7, 100)])

    def add(self, name: str, tokenizer: Tokenizer, template: str | None, model: Any, **case: Any) -> None:
        model = model if isinstance(model, Transformer) else random_model(shape(tokenizer, **model))
        self.tokenizers[name], self.models[name] = tokenizer, model
        self.templates[name] = template or "internlm-v1.1"
        case = {"texts": TEXTS, "options": {"do_sample": False, "max_new_tokens": NEW_TOKENS}, **case}
        if name in COMPUTED:
            case["ids"] = torch.randint(tokenizer.vocab_size, (2, 60), generator=torch.Generator().manual_seed(3))
        case["folder"] = str(export(self.folder / f"case_{name.replace(' ', '_')}", model, Talk(tokenizer, template)))
        self.cases[name] = case

    def add_readme(self) -> None:
        """Add what the command of InternLM's README makes of a checkpoint and a tokenizer."""
        model, work = random_model(shape(self.pieces)), self.folder / "readme"
        export(work / "origin_ckpt", model, Talk(), remote_code=False)
        (work / "tokenizes").mkdir()
        (work / "tokenizes" / "tokenizer.model").write_bytes(self.pieces._data)
        command = [str(ROOT / "tools" / "convert2hf.py"), "--src_folder", "origin_ckpt/"]
        command += ["--tgt_folder", "hf_ckpt/", "--tokenizer", "tokenizes/tokenizer.model"]
        with contextlib.chdir(work), pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", command)
            with pytest.raises(SystemExit) as left:
                runpy.run_path(command[0], run_name="__main__")
        assert left.value.code == 0
        self.tokenizers["readme"], self.models["readme"] = self.pieces, model
        self.cases["readme"] = {"folder": f"{work}/hf_ckpt/", "texts": TEXTS[:2], "readme": "What is the sum?"}

    def prompt(self, name: str, asked: dict[str, Any]) -> list[int]:
        messages = [] if asked.get("meta") is None else [Message("system", asked["meta"])]
        for query, answer in asked["history"]:
            messages += [Message("user", query), Message("assistant", answer)]
        messages.append(Message("user", asked["query"]))
        return render_prompt(messages, get_template(self.templates[name]), self.tokenizers[name])

    def answers(self, name: str) -> list[str]:
        """Return what our engine says."""
        case = self.cases[name]
        stops = tuple(carried.chat_format(Talk(self.tokenizers[name], self.templates[name]))["stops"])  # type: ignore[index]
        engine = Engine(self.models[name], self.tokenizers[name])
        prompts = [self.prompt(name, asked) for asked in case["conversations"]]
        requests = [Request(tokens=ids, max_tokens=NEW_TOKENS, temperature=0, stop_ids=stops) for ids in prompts]
        return [result.text for result in engine.generate(requests)]


@pytest.fixture(scope="module")
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("remote"), published=request.config.getoption("--proof"))


@pytest.fixture(scope="module", params=["newest", *OLD])
def seen(request: pytest.FixtureRequest, world: World, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return what the script saw under one version; the old ones under `--proof` only."""
    version = request.param
    work = tmp_path_factory.mktemp("seen")
    words = [str(SCRIPT), str(work / "request.pt"), str(work / "answer.pt")]
    # The modules' cache too is this run's own: no earlier one is found there, and none is left behind.
    quiet = {"HF_MODULES_CACHE": str(work / "modules"), "HF_HUB_OFFLINE": "1", "HF_HOME": str(work / "home")}
    torch.save(world.cases, work / "request.pt")
    if version == "newest":
        pytest.importorskip("transformers")
        ran = forked(*words, cwd=work, **quiet)  # 5 s of imports less
    elif request.config.getoption("--proof"):
        wanted = [f"torch=={torch.__version__.split('+')[0]}", f"transformers=={version}", "numpy<2"]
        programs = environment(f"transformers-{version}", *wanted, "sentencepiece", "safetensors", "jinja2")
        ran = subprocess.run(
            [str(programs / "python"), *words], env={**os.environ, **quiet}, capture_output=True, text=True,
            timeout=600, check=False, cwd=work,
        )  # fmt: skip
    else:
        pytest.skip(f"transformers {version}: under --proof")
    assert ran.returncode == 0, ran.stderr[-4000:]
    found: dict[str, Any] = torch.load(work / "answer.pt")
    assert version in ("newest", found["version"])
    return found


pytestmark = pytest.mark.timeout(1800)
PUBLISHED = pytest.param("v7", marks=pytest.mark.proof)  # 8 s for a vocabulary of 103,168 pieces
SPOKEN = ["plain", "first", "prefixed", "fast", "scripted", PUBLISHED]


def of(seen: dict[str, Any], name: str) -> dict[str, Any]:
    if name not in seen:
        pytest.skip(f"{V7} is not here")
    return seen[name]


@pytest.mark.parametrize("name", ["plain", "fast", PUBLISHED])
def test_every_auto_class_gives_the_language_model(seen: dict[str, Any], name: str) -> None:
    *models, tokenizer = of(seen, name)["classes"]
    assert models == ["InternLMForCausalLM"] * 2
    assert (tokenizer == "InternLMTokenizer") == (name != "fast")


@pytest.mark.parametrize("name", COMPUTED)
def test_logits_equal_ours_below_and_beyond_the_trained_length(seen: dict[str, Any], world: World, name: str) -> None:
    model, ids = world.models[name], world.cases[name]["ids"]
    with torch.no_grad():
        ours = model.head.logits(model(ids))
        assert (ours - seen[name]["logits"]).abs().max() < 1e-5 * ours.abs().max()
        short = model.head.logits(model(ids[:, :20]))
        assert (short - seen[name]["short"]).abs().max() < 1e-5 * short.abs().max()
    assert ((short - ours[:, :20]).abs().max() > 1e-2) == (model.config.rope.scaling is not None), (
        "the base follows the length"
    )


@pytest.mark.parametrize("name", COMPUTED)
def test_a_cache_batches_and_beams_change_nothing(seen: dict[str, Any], world: World, name: str) -> None:
    found = seen[name]
    if name == "dynamic":  # beyond the trained length deeper layers keep what they made with an earlier base
        assert found["cached"] > 1e-2
    else:
        assert found["cached"] < 1e-4
        assert found["beams"]
    assert found["padded"] < 1e-4
    assert found["attentions"] < 1e-4
    assert found["batched"]
    assert found["hidden"] == world.models[name].config.num_layers + 1


@pytest.mark.parametrize("name", COMPUTED)
def test_it_can_be_trained_and_saved_and_eos_learns(seen: dict[str, Any], name: str) -> None:
    found = seen[name]
    assert found["eos_grad"] > 0
    assert found["recompute"]
    assert found["saved"]


@pytest.mark.parametrize("name", ["plain", "prefixed", PUBLISHED])
def test_the_tokenizer_gives_sentencepieces_ids_after_one_bos(seen: dict[str, Any], world: World, name: str) -> None:
    found, tokenizer = of(seen, name), world.tokenizers[name]
    reference = sentencepiece.SentencePieceProcessor(model_proto=tokenizer._data)
    bos = tokenizer.bos_id
    assert found["roles"] == (bos, tokenizer.eos_id)
    assert found["pad"] == tokenizer.eos_id, "batches can be padded"
    assert found["pickled_ids"] == found["ids"]
    for text, ids, after in zip(world.cases[name]["texts"], found["ids"], found["after_bos"], strict=True):
        assert after[:2].count(bos) == 1, "a rendered template may be encoded as it is"
        if "<s>" in text or "</s>" in text:
            continue  # names of special tokens in text are structure to Transformers, as they always were
        assert ids == [bos, *reference.encode(text)]
        if name != "prefixed":  # there the text after <s> gets a space too
            assert after == ids
    assert found["silent"] == "a<eoa>b", "as ever, <eoa> is not among what Transformers leaves out"
    rows, mask = found["batch"]
    assert rows.shape == mask.shape
    assert mask[0, 0] == 0, "the shorter row is padded on the left"


@pytest.mark.parametrize("name", ["plain", "prefixed", PUBLISHED])
def test_text_comes_back_and_typed_structure_stays_text(seen: dict[str, Any], world: World, name: str) -> None:
    found, tokenizer = of(seen, name), world.tokenizers[name]
    for text, decoded, ids in zip(world.cases[name]["texts"], found["decoded"], found["text_ids"], strict=True):
        if name != "prefixed" or "<s>" not in text:  # there the text after <s> gets a space
            assert decoded == text.replace("▁", " "), "SentencePiece takes the mark for a space"
        assert ids == tokenizer.encode(text)
        assert tokenizer.special_ids.isdisjoint(ids)


def is_cut_elsewhere(seen: dict[str, Any], name: str, asked: dict[str, Any]) -> bool:
    """Return whether a prompt has other ids of the same text.

    Fast tokenizers of Transformers 4.30 do not tell which added tokens are special: none that is typed stays whole.
    """
    return name == "fast" and seen["version"] == "4.30.2" and ("<eo" in repr(asked) or "<think>" in repr(asked))


@pytest.mark.parametrize("name", SPOKEN)
def test_prompts_are_those_of_our_renderer(seen: dict[str, Any], world: World, name: str) -> None:
    prompts = of(seen, name)["prompts"]
    for asked, ids in zip(world.cases[name]["conversations"], prompts, strict=True):
        ours = world.prompt(name, asked)
        assert ids.count(world.tokenizers[name].bos_id) == 1
        if is_cut_elsewhere(seen, name, asked):
            tokenizer = world.tokenizers[name]
            assert tokenizer.decode(ids) == tokenizer.decode(ours), "cut elsewhere, the same text"
        else:
            assert ids == ours


@pytest.mark.parametrize("name", SPOKEN)
def test_greedy_answers_are_those_of_our_engine(seen: dict[str, Any], world: World, name: str) -> None:
    found, ours = of(seen, name), world.answers(name)
    for asked, answer, expected in zip(world.cases[name]["conversations"], found["answers"], ours, strict=True):
        assert answer == expected or is_cut_elsewhere(seen, name, asked)
    assert all(found["histories"])


@pytest.mark.parametrize("name", SPOKEN)
def test_a_stream_grows_from_nothing_to_the_answer(seen: dict[str, Any], name: str) -> None:
    found = of(seen, name)
    for pieces, answer in zip(found["streams"], found["answers"], strict=True):
        assert pieces[0] == ""
        assert pieces[-1] == answer
        for before, after in itertools.pairwise(pieces):
            assert after.startswith(before)
            assert after != before


def test_answers_end_at_eoa_and_come_in_whole_characters(seen: dict[str, Any]) -> None:
    found = seen["scripted"]
    assert found["answers"] == [SAID] * len(CONVERSATIONS)
    assert found["streams"] == [[SAID[:count] for count in range(len(SAID) + 1)]] * len(CONVERSATIONS)


def test_a_stream_that_is_left_ends_its_thread(seen: dict[str, Any]) -> None:
    running, steps = seen["plain"]["left"]
    assert running == 0
    assert 3 <= steps < 60
    assert seen["plain"]["first"] == ("", [("hello", "")])
    assert seen["plain"]["abandoned"] == 0


def test_an_error_in_generation_reaches_the_loop(seen: dict[str, Any]) -> None:
    message, pieces, running = seen["plain"]["error"]
    assert message == "planted"
    assert 1 <= pieces <= 4
    assert running == 0


def test_sampling_repeats_with_its_seed_and_halves_can_talk(seen: dict[str, Any]) -> None:
    first, again, streamed, other = seen["plain"]["sampled"]
    assert first == again == streamed != other
    assert seen["plain"]["half"]


def test_the_code_imports_nothing_of_this_package_and_is_carried_whole(world: World) -> None:
    there = {path.name for path in Path(world.cases["plain"]["folder"]).glob("*.py")}
    assert there == {path.name for path in carried.CODE.glob("*.py")}
    for path in carried.CODE.glob("*.py"):
        assert "import internlm" not in path.read_text(encoding="utf-8")
        assert "from internlm" not in path.read_text(encoding="utf-8")


def test_only_the_code_carried_here_counts_as_ours(world: World, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(world.cases["plain"]["folder"], folder)
    assert carried.is_ours(folder)
    described = json.loads((folder / "config.json").read_text())
    elsewhere = {**described, "auto_map": {"AutoModel": "someone/else--modeling_internlm.InternLMForCausalLM"}}
    (folder / "config.json").write_text(json.dumps(elsewhere))
    assert not carried.is_ours(folder)
    (folder / "config.json").write_text(json.dumps(described))
    code = folder / "chat_internlm.py"
    code.write_text(code.read_text() + "\n")
    assert not carried.is_ours(folder)
    shutil.copyfile(carried.CODE / code.name, code)
    (folder / "more.py").write_text("")
    assert not carried.is_ours(folder)
    (folder / "more.py").unlink()
    assert carried.is_ours(folder)
    inside = {**described, "auto_map": {**described["auto_map"], "AutoConfig": "../more.InternLMConfig"}}
    (folder / "config.json").write_text(json.dumps(inside))
    assert not carried.is_ours(folder)
    assert not carried.is_ours(tmp_path)


def test_a_folder_with_code_is_read_back_as_it_was(world: World) -> None:
    for name in ("plain", "dynamic", "fast"):
        folder, tokenizer = world.cases[name]["folder"], world.tokenizers[name]
        assert folders.read_config(folder) == world.models[name].config
        assert read_talk(folder).template == world.templates[name]
        assert Tokenizer.load(folder) == tokenizer
        assert Tokenizer.load(folder).fingerprint == tokenizer.fingerprint


def test_what_the_code_does_not_know_is_refused(tmp_path: Path) -> None:
    tokenizer = train_bpe(["What is the sum?"] * 3, 300)
    linear = random_model(shape(tokenizer, rope=RopeConfig(scaling=LinearScaling(factor=2.0))))
    with pytest.raises(WeightsError, match="rotary scaling"):
        export(tmp_path / "a", linear, Talk(tokenizer))
    with pytest.raises(WeightsError, match="model\\.chat"):
        export(tmp_path / "b", random_model(shape(tokenizer)), Talk(tokenizer), family="llama")
    assert not (tmp_path / "a").exists()


def test_a_vocabulary_without_eoa_and_a_format_has_no_chat() -> None:
    assert carried.chat_format(Talk(train_bpe(["What is the sum?"] * 3, 300))) is None
    assert carried.chat_format(Talk()) is None
    form = carried.chat_format(Talk(sentencepiece_tokenizer()))
    assert form is not None
    assert form["name"] == "internlm-v1.1"
    assert json.loads(json.dumps(form)) == form


def test_the_readme_command_gives_a_folder_that_automodel_loads(seen: dict[str, Any], world: World) -> None:
    ids, logits, is_answered = seen["readme"]["readme"]
    tokenizer, model = world.tokenizers["readme"], world.models["readme"]
    assert is_answered
    assert ids[0].tolist() == [tokenizer.bos_id, *tokenizer.encode("What is the sum?")]
    with torch.no_grad():
        ours = model.head.logits(model(ids))
    assert (logits - ours).abs().max() < 1e-5 * ours.abs().max()
