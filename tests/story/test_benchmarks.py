"""What the benchmarks share: results that begin alike, and contenders in processes of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"
WORKER = """
import os, sys
sys.path.insert(0, {folder!r})
import workers

def do(job):
    print("noise of a library")
    os.system("echo noise of its program")
    if "end" in job:
        print("last words", file=sys.stderr)
        os._exit(job["end"])
    if "wait" in job:
        import time
        time.sleep(job["wait"])
    return {{"half": job["number"] / 2, "variable": os.environ.get("OF_A_WORKER")}}

workers.answer(do)
"""


@pytest.fixture(autouse=True)
def _benchmarks_are_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))


@pytest.fixture
def script(tmp_path: Path) -> str:
    path = tmp_path / "worker.py"
    path.write_text(WORKER.format(folder=str(FOLDER)))
    return str(path)


def test_a_worker_answers_job_by_job_whatever_is_printed_beside(script: str) -> None:
    import workers

    with workers.Worker(script, variables={"OF_A_WORKER": "yes"}) as worker:
        first = worker.ask({"number": 3})
        assert (first["half"], first["variable"]) == (1.5, "yes")
        assert first["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
        assert worker.ask({"number": "x"})["error"].startswith("TypeError: unsupported operand")
        assert worker.ask({"number": 8})["half"] == 4
        process = worker.process
    assert process is not None
    assert process.poll() is not None


def test_a_worker_that_dies_waits_or_is_missing_says_so(script: str) -> None:
    import workers

    with workers.Worker(script) as worker:
        assert worker.ask({"end": 3})["error"] == "exit 3: last words"
        assert worker.ask({"number": 1})["error"] == "exit 3: last words"
    assert workers.run(script, {"wait": 60, "number": 1}, timeout_s=0.5)["error"] == "not done after 0 s"
    assert workers.run(script, {}, python="/no/such/python")["error"].startswith("FileNotFoundError")


def test_ranks_answer_together_and_the_first_that_fails_ends_the_others(script: str) -> None:
    import workers

    answers = workers.together(script, [{"wait": 0.3, "number": 1}, {"number": 2}], timeout_s=60)
    assert [answer["half"] for answer in answers] == [0.5, 1.0]
    with pytest.raises(RuntimeError, match="exit 4: last words"):
        workers.together(script, [{"wait": 100, "number": 1}, {"end": 4}], timeout_s=60)
    with pytest.raises(RuntimeError, match="not done after 1 s"):
        workers.together(script, [{"wait": 100, "number": 1}], timeout_s=1)


def test_the_files_that_peers_run_need_no_internlm() -> None:
    import workers

    named = (workers.__doc__ or "").partition("at their tops:")[2].rstrip(". \n").replace(" and ", ", ")
    files = [name.strip() for name in named.split(",")]
    assert {"workers", "report", "train_peers", "decode_peers"} <= set(files)
    code = f"import sys; sys.modules['internlm'] = None; import {', '.join(files)}"
    done = subprocess.run([sys.executable, "-c", code], cwd=FOLDER, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_results_begin_alike_and_hold_no_path_of_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import report

    inside, out = str(FOLDER / "results" / "x.json"), tmp_path / "deep" / "out.json"
    words = ["--out", str(out), f"--same={inside}", "../../elsewhere/bin/python", "http://127.0.0.1:8000/v1", "A/B"]
    monkeypatch.setattr(sys, "argv", [str(FOLDER / "thing.py"), *words])
    peer = {"python": "3.0", "litgpt": "0.5", "torch": "1.0"}
    report.write(out, report.result(threads=2, rows=[{"name": "litgpt", "versions": peer}]))
    found = json.loads(out.read_text())
    assert list(found) == ["command", "date", "machine", "versions", "commit", "threads", "rows"]
    told = "--out '…/out.json' --same=benchmarks/results/x.json '…/python' http://127.0.0.1:8000/v1 A/B"
    assert found["command"] == f"python benchmarks/thing.py {told}"
    assert {"cpu", "cores", "memory_gib"} <= set(found["machine"])
    # What the peer alone has is told at the top; what both have is ours there, and the peer's in its row.
    assert found["versions"]["litgpt"] == "0.5"
    assert found["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    report.write(None, found)

    table = report.Table({"": "<6", "tokens/s": "9.1f", "share": "6.1%"})
    table.row("a", 1234.56, None)
    table.row("b", 2.0, 0.5, "a remark")
    assert capsys.readouterr().out.splitlines() == [
        "         tokens/s   share",
        "a          1234.6       –",
        "b             2.0   50.0%  a remark",
    ]


def test_a_start_ends_when_what_is_waited_for_is_said() -> None:
    import start

    said = "import time; print('x 1', flush=True); time.sleep(1)"
    whole = start.measure(start.Start([sys.executable, "-c", said]), 0)
    until = start.measure(start.Start([sys.executable, "-c", said], "x 1"), 0)
    assert 0 < until[0] < 1 < whole[0]
    assert until[1] > 1
    with pytest.raises(RuntimeError, match="x 1"):
        start.measure(start.Start([sys.executable, "-c", said], "x 2"), 0)
