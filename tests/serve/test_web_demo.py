"""`streamlit run web_demo.py` in a real browser.

With the Streamlit that is on the path, if any; under `--proof` with the newest, and with the one that InternLM's README
names.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.environments import environment
from tests.processes import finish, free_port, listened_to, start, wait_for
from tests.serve.chromium import chromium
from tests.serve.openai_stub import Answer, Stub, serving

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def stub() -> Iterator[Stub]:
    with serving(key="secret") as found:
        yield found


pytestmark = pytest.mark.timeout(1500)  # an environment is made once
VERSIONS = {"newest": ["streamlit"], "1.24.0": ["streamlit==1.24.0", "pyarrow<18"]}


@pytest.fixture(scope="module", params=["here", *VERSIONS])
def demo(request: pytest.FixtureRequest, stub: Stub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    version = request.param
    if version == "here":
        program = shutil.which("streamlit")
        if program is None:
            pytest.skip("no streamlit here")
    elif request.config.getoption("--proof"):
        program = str(environment(f"streamlit-{version}", *VERSIONS[version]) / "streamlit")
    else:
        pytest.skip(f"streamlit {version}: under --proof")
    port = free_port()
    options = ["--server.port", str(port), "--server.address", "127.0.0.1", "--server.headless", "true"]
    options += ["--browser.gatherUsageStats", "false", "--server.fileWatcherType", "none"]
    words = [program, "run", str(ROOT / "web_demo.py"), *options, "--", "--url", stub.url]
    home = tmp_path_factory.mktemp("home")
    process = start(*words, cwd=home, INTERNLM_API_KEY="secret", HOME=str(home))
    wait_for(process, lambda: listened_to(port))
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        finish(process, 10)


@pytest.fixture
def page(demo: str, stub: Stub) -> Iterator[Any]:
    stub.requests.clear()
    with chromium() as browser:
        page = browser.new_page()
        page.set_default_timeout(20_000)
        page.goto(demo)
        page.locator("textarea").wait_for()
        yield page


def ask(page: Any, text: str, answer: str) -> None:
    page.locator("textarea").fill(text)
    page.locator("textarea").press("Enter")
    page.locator("[data-testid=stChatMessageContent]", has_text=answer).wait_for()
    page.locator("[data-testid=stChatMessageContent]", has_text="▌").wait_for(state="hidden")


def test_it_talks_with_the_settings_of_the_sidebar_and_forgets_on_demand(page: Any, stub: Stub) -> None:
    stub.answers = [Answer(["**One", ".**"]), Answer(["Two."]), Answer(["Three."])]
    ask(page, "first", "One.")
    body = stub.requests[0]
    assert (body["max_tokens"], body["top_p"], body["temperature"]) == (8000, 0.8, 0.8)
    assert body["model"] == "tiny"
    assert page.locator("[data-testid=stChatMessageContent] strong").inner_text() == "One."
    sliders = page.get_by_role("slider")
    for slider, low, high in zip(sliders.all(), (32, 0, 0), (16000, 1, 1), strict=True):
        names = ("aria-valuemin", "aria-valuemax") if slider.get_attribute("aria-valuemin") else ("min", "max")
        assert [float(slider.get_attribute(name)) for name in names] == [low, high]
    sliders.nth(2).press("ArrowLeft")
    page.wait_for_timeout(1000)  # the slider's value reaches Streamlit by and by
    ask(page, "second", "Two.")
    assert [message["content"] for message in stub.requests[1]["messages"]] == ["first", "**One.**", "second"]
    assert stub.requests[1]["temperature"] == pytest.approx(0.79)
    page.get_by_role("button", name="Clear Chat History").click()
    page.locator("[data-testid=stChatMessageContent]").first.wait_for(state="detached")
    ask(page, "third", "Three.")
    assert stub.requests[2]["messages"] == [{"role": "user", "content": "third"}]


def test_html_in_an_answer_stays_text_and_an_error_is_shown(page: Any, stub: Stub) -> None:
    trap = "Look: <img src=x onerror=document.title='hacked'> there"
    stub.answers = [Answer([trap]), Answer([], status=500, message="broken")]
    ask(page, "hi", "there")
    assert page.title() != "hacked"
    page.locator("textarea").fill("again")
    page.locator("textarea").press("Enter")
    page.get_by_text("the server refuses (500): broken").wait_for()
    ask(page, "once more", "Fine.")
    assert [message["content"] for message in stub.requests[2]["messages"]][::2] == ["hi", "once more"]
