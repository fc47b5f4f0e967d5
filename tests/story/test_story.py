"""The README's way, and the commands of the README and the docs, run as a reader would.

Blocks of `bash` and `python` are run. Those of `yaml` are read as parts of a recipe, with a title they are files of the
reader's. What stands in `text` needs GPUs, several machines, a store or the network: its `internlm` lines are parsed.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from internlm import cli
from internlm import recipe as recipes
from internlm.errors import InternLMError
from internlm.train.metrics import read_metrics
from tests.processes import environment, forked
from tools import recipe_reference

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SHORT = "train.tokens=4096 train.log_every_steps=2"
FEW = "--validation-ratio 0.002"
"""Of the text is held out: every run on it ends with a validation on all of that."""
PART = 'head -n 100 "$DIR/corpus/train.jsonl" > "$DIR/part"; mv "$DIR/part" "$DIR/corpus/train.jsonl"\n'
"""Of the text is trained on: the tokenizer reads all of it."""
BRIEF = "--max-tokens 8"
"""Models that learned for two steps never end an answer by themselves."""


def titled(page: Path, language: str) -> list[tuple[str, str]]:
    """Return the blocks of a language with their titles, which may be empty."""
    block = re.compile(rf'^```{language}(?: title="([^"\n]+)")?\n(.*?)^```', re.MULTILINE | re.DOTALL)
    return block.findall(page.read_text(encoding="utf-8"))


def shell(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    known = environment(PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}", OVERRIDES=SHORT)
    command = f"set -euo pipefail\n{command}"
    return subprocess.run(["bash", "-c", command], cwd=folder, capture_output=True, text=True, env=known)


def typed(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a line as a reader would; one without a shell's signs in a fork, which need not import everything.

    Trainings end after few steps, answers after few tokens.
    """
    if re.match(r"internlm (launch .*)?train ", command) and "--dry-run" not in command:
        command = f"{command} {SHORT}"
    if command.startswith("internlm chat "):
        command = f"{command} {BRIEF}"
    if re.fullmatch(r"(internlm|python) [^|<>&;$*]+", command):
        return forked(*shlex.split(command)[1:], cwd=folder)
    return shell(command, folder)


def shorter(script: str) -> str:
    """Return the quickstart with less text and shorter answers."""
    corpus, chat = '|| internlm data corpus --out "$DIR/corpus"\n', 'internlm chat "$DIR/model" '
    assert corpus in script
    assert chat in script
    return script.replace(corpus, f"{corpus[:-1]} {FEW}\n{PART}").replace(chat, f"{chat}{BRIEF} ")


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder like a fresh clone in which the quickstart was run with short trainings."""
    folder = tmp_path_factory.mktemp("house")
    for name in ("recipes", "docs", "internlm", "benchmarks"):
        (folder / name).symlink_to(ROOT / name)
    script = (ROOT / "scripts" / "quickstart.sh").read_text()
    (folder / "scripts").mkdir()
    (folder / "scripts" / "quickstart.sh").write_text(shorter(script))
    done = shell("bash scripts/quickstart.sh", folder)
    assert done.returncode == 0, done.stderr
    (folder / "quickstart.txt").write_text(done.stdout)
    for page in PAGES:
        for title, text in titled(page, "yaml"):
            if title:
                (folder / title).write_text(text)
    return folder


@pytest.mark.timeout(600)
def test_the_quickstart_ends_with_a_model_a_plot_and_answers(house: Path) -> None:
    shown = (house / "quickstart.txt").read_text()
    assert shown.count("\n> ") + shown.startswith("> ") == 3
    run = house / "runs" / "quickstart"
    finished = ["corpus", "tokenizer", *(f"data/{name.name}" for name in (run / "data").iterdir())]
    assert all((run / step / "manifest.json").is_file() for step in finished), "by this a second run knows them"
    for line in ("model ", "loss plot ", "metrics ", "go on "):
        assert line in shown
    assert (run / "pretrain" / "loss.png").read_bytes().startswith(b"\x89PNG")
    metrics = read_metrics(run / "pretrain" / "metrics.jsonl")
    assert "valid/bits_per_byte/held_out" in metrics[-1]
    assert re.search(r"gzip -9 \d\.\d+, xz -9e \d\.\d+", shown)
    assert json.loads((run / "model" / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]


def blocks(page: Path, language: str) -> list[str]:
    return [text for _, text in titled(page, language)]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_of_the_documentation_runs(page: Path, house: Path) -> None:
    for block in blocks(page, "bash"):
        for command in block.splitlines():
            command = command.partition("  #")[0].strip()
            if not command or command.startswith("make "):  # make is what runs this test
                continue
            done = typed(command, house)
            assert done.returncode == 0, f"{command}\n{done.stderr}"
    for block in blocks(page, "python"):
        (house / "block.py").write_text(block)
        done = forked("block.py", cwd=house)
        assert done.returncode == 0, f"{block}\n{done.stderr}"
        assert done.stdout


def test_every_piece_of_a_recipe_in_the_documentation_is_one(tmp_path: Path) -> None:
    pieces = [block for page in PAGES for block in blocks(page, "yaml")]
    assert pieces
    # The source has the name of one of those in the page about mixtures: with it they all have a weight.
    (tmp_path / "whole.yaml").write_text(
        "{run: a, model: {preset: toy}, data: {seq_len: 8, train: {books: {path: b}}},"
        " train: {tokens: 8, batch_tokens: 8}}"
    )
    for piece in pieces:
        (tmp_path / "piece.yaml").write_text(f"base: whole.yaml\n{piece}")
        if "s3://" in piece and not find_spec("s3fs"):  # an extra, and a recipe that wants it is refused without it
            with pytest.raises(InternLMError, match=r"pip install .*\[remote\]"):
                recipes.load(tmp_path / "piece.yaml")
        else:
            recipes.load(tmp_path / "piece.yaml")


def understand(words: list[str]) -> None:
    """Parse a command, and the one inside it that a launch has; what is wrong ends the process, as on a terminal."""
    module = importlib.import_module(f"internlm.cli.{words[0]}")
    parser = argparse.ArgumentParser(f"internlm {words[0]}")
    module.add_arguments(parser)
    inner = getattr(cli.parse(parser, words[1:]), "command", None)
    if inner:
        understand(inner)


def test_every_other_command_of_the_documentation_is_understood() -> None:
    found = 0
    for page in PAGES:
        for line in "".join(blocks(page, "text")).splitlines():
            if line.startswith("internlm "):
                found += 1
                command = re.split(" {2,}", line)[0].replace(" K ", " 1 ")  # a remark stands behind two spaces
                understand(shlex.split(command)[1:])
    assert found > 10


def test_the_page_of_recipe_keys_says_what_the_code_says() -> None:
    assert recipe_reference.PAGE.read_text(encoding="utf-8") == recipe_reference.page(), "make recipe.md again"


def test_every_link_between_pages_leads_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_documentation_builds_as_a_site_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("material", reason="mkdocs-material is not installed")
    built = shell(f"{sys.executable} -m mkdocs build --strict --config-file {ROOT}/mkdocs.yml -d {tmp_path}", tmp_path)
    assert built.returncode == 0, built.stdout + built.stderr
    assert {path.parent.name for path in tmp_path.glob("*/index.html")} >= {page.stem for page in PAGES[1:]} - {"index"}


def test_every_make_command_of_the_documentation_exists() -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for page in PAGES:
        for name in re.findall(r"(?:^|`)make ([\w-]+)", page.read_text(encoding="utf-8"), re.MULTILINE):
            assert name in targets, f"{page.name}: make {name}"


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").rglob("*.yaml")), ids=lambda p: str(p.relative_to(ROOT)))
def test_every_recipe_is_valid_and_can_be_described(path: Path) -> None:
    loaded = recipes.load(path)
    if loaded.value.model is not None:
        assert "parameters" in recipes.describe(loaded)


def test_the_makefile_and_ci_run_the_same_tests() -> None:
    assert "make test" in (ROOT / ".ci" / "run").read_text()
    makefile = (ROOT / "Makefile").read_text()
    assert makefile.count("-c constraints.txt") == makefile.count("pip install") >= 2
