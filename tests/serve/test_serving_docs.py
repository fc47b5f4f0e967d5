"""The examples of docs/serving.md, against the server that it starts."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.serve.servers import serving

PAGE = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
PLACE = "http://127.0.0.1:8000"


def blocks(language: str) -> list[str]:
    found = re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    assert found
    return found


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_the_lines_with_curl_are_answered() -> None:
    with serving() as server:
        for line in "".join(blocks("sh")).splitlines():
            assert PLACE in line
            command = line.replace(PLACE, server.url).replace("curl -s", "curl -sS --fail-with-body")
            done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
            assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
            if "/metrics" in line:
                assert "internlm:" in done.stdout
            else:
                assert json.loads(done.stdout)


def test_the_lines_with_openai_s_client_are_answered() -> None:
    pytest.importorskip("openai")
    with serving() as server:
        for block in blocks("py"):
            code = block.replace(PLACE, server.url)
            done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
            assert done.returncode == 0, done.stderr
            assert done.stdout.strip()
