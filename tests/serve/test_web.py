"""The chat page in a real browser, against a server that says what the test wants."""

from __future__ import annotations

import json
import re
import threading
from pathlib import Path
from typing import Any

import pytest

from internlm.serve import web
from tests.serve.chromium import ask, opened, said, send, wait_for_answer
from tests.serve.openai_stub import Answer, Stub, serving


def test_an_answer_is_shown_while_it_comes_and_finished_paragraphs_stay(page: Any, stub: Stub) -> None:
    gate = threading.Event()
    page.locator("#model option").wait_for(state="attached")  # its name goes into the request
    stub.answers = [Answer(["First para", "graph.\n\nSecond.\n\nThi", "rd.\n\nFourth.\n\n", "Fifth."], gate=gate)]
    send(page, "Tell me")
    page.get_by_text("Fourth.").wait_for()
    assert page.locator("article.assistant").get_attribute("aria-busy") == "true"
    assert page.get_by_text("Fifth.").count() == 0
    page.evaluate("window.first = document.querySelector('.prose p')")
    gate.set()
    wait_for_answer(page, "Fifth.")
    assert page.evaluate("window.first.isConnected && window.first === document.querySelector('.prose').firstChild")
    assert page.locator(".prose p").all_inner_texts() == ["First paragraph.", "Second.", "Third.", "Fourth.", "Fifth."]
    assert page.locator(".stats").inner_text().startswith("4 tokens")
    assert stub.requests == [
        {
            "messages": [{"role": "user", "content": "Tell me"}],
            "model": "tiny",
            "temperature": 0.8,
            "top_p": 0.8,
            "max_tokens": 2048,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ]


def test_the_next_question_comes_with_what_was_said(page: Any, stub: Stub) -> None:
    stub.answers = [Answer(["One."]), Answer(["Two."])]
    ask(page, "a", "One.")
    ask(page, "b", "Two.")
    assert [message["content"] for message in stub.requests[1]["messages"]] == ["a", "One.", "b"]


@pytest.mark.parametrize("way", ["button", "Escape"])
def test_stopping_keeps_what_has_come_and_tells_the_server(page: Any, stub: Stub, way: str) -> None:
    stub.answers = [Answer(["word "] * 2000, delay=0.01)]
    send(page, "Go on for ever")
    page.get_by_text("word word").wait_for()
    if way == "button":
        page.get_by_role("button", name="Stop").click()
    else:
        page.keyboard.press("Escape")
    page.get_by_text("Stopped.").wait_for()
    assert stub.gone.wait(5)
    kept = page.locator(".prose").inner_text()
    assert kept.startswith("word word")
    ask(page, "next", "Fine.")
    assert stub.requests[1]["messages"][1] == {
        "role": "assistant",
        "content": stub.requests[1]["messages"][1]["content"],
    }
    assert stub.requests[1]["messages"][1]["content"].strip() == kept.strip()


def test_answering_again_replaces_the_answer(page: Any, stub: Stub) -> None:
    stub.answers = [Answer(["Red."]), Answer(["Blue."])]
    ask(page, "A colour?", "Red.")
    page.get_by_role("button", name="Answer again").click()
    wait_for_answer(page, "Blue.")
    assert said(page) == ["A colour?", "Blue."]
    assert stub.requests[0]["messages"] == stub.requests[1]["messages"]


def test_editing_a_message_forgets_what_came_after_it(page: Any, stub: Stub) -> None:
    stub.answers = [Answer(["One."]), Answer(["Two."]), Answer(["Three."])]
    ask(page, "first", "One.")
    ask(page, "second", "Two.")
    page.locator("article.user").first.hover()
    page.locator("article.user").first.get_by_role("button", name="Edit").click()
    area = page.get_by_label("Edit your message")
    assert area.input_value() == "first"
    area.fill("thrown away")
    area.press("Escape")
    assert said(page) == ["first", "One.", "second", "Two."]
    page.locator("article.user").first.get_by_role("button", name="Edit").click()
    area.fill("other")
    area.press("Enter")
    wait_for_answer(page, "Three.")
    assert said(page) == ["other", "Three."]
    assert stub.requests[2]["messages"] == [{"role": "user", "content": "other"}]


def test_enter_sends_but_not_with_shift_and_not_while_a_word_is_composed(page: Any, stub: Stub) -> None:
    page.fill("#input", "一")
    page.dispatch_event("#input", "keydown", {"key": "Enter", "isComposing": True})
    page.press("#input", "Shift+Enter")
    page.keyboard.type("two")
    assert stub.requests == []
    page.keyboard.press("Enter")
    wait_for_answer(page, "Fine.")
    assert stub.requests[0]["messages"][0]["content"] == "一\ntwo"


def test_settings_go_into_the_request_and_survive_a_reload(page: Any, stub: Stub) -> None:
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("System prompt").fill("Be brief.")
    for name, value in (("temperature", "0.3"), ("top_p", "0.5"), ("max_tokens", "128")):
        page.locator(f"#{name}").fill(value)
        assert page.locator(f"output[for={name}]").inner_text() == value
    page.keyboard.press("Escape")
    page.reload()
    ask(page, "hi", "Fine.")
    body = stub.requests[0]
    assert (body["temperature"], body["top_p"], body["max_tokens"]) == (0.3, 0.5, 128)
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}


def test_the_model_can_be_chosen(browser: Any) -> None:
    with serving(models=["small", "large"]) as stub, opened(browser, stub.url) as page:
        page.get_by_role("combobox", name="Model").select_option("large")
        ask(page, "hi", "Fine.")
        assert stub.requests[0]["model"] == "large"


def test_conversations_are_kept_renamed_and_deleted(page: Any, stub: Stub) -> None:
    stub.answers = [Answer(["**One.**"]), Answer(["Two."])]
    ask(page, "About cats", "One.")
    page.get_by_role("button", name="New chat").click()
    ask(page, "About dogs", "Two.")
    page.reload()
    page.get_by_text("Two.").wait_for()
    names = page.locator("#chats .open")
    assert names.all_inner_texts() == ["About dogs", "About cats"]
    names.nth(1).click()
    assert said(page) == ["About cats", "One."]
    assert page.locator(".prose strong").inner_text() == "One."
    page.locator("#chats li").nth(1).hover()
    page.locator("#chats li").nth(1).get_by_role("button", name="Rename").click()
    page.keyboard.type("Felines")
    page.keyboard.press("Enter")
    assert names.all_inner_texts() == ["About dogs", "Felines"]
    page.locator("#chats li").nth(0).hover()
    page.locator("#chats li").nth(0).get_by_role("button", name="Delete").click()
    assert "About dogs" in page.locator("#confirm-question").inner_text()
    page.locator("#confirm-delete").click()
    page.reload()
    assert names.all_inner_texts() == ["Felines"]


def test_an_answer_goes_on_while_another_conversation_is_looked_at(page: Any, stub: Stub) -> None:
    gate = threading.Event()
    stub.answers = [Answer(["Begin ", "end."], gate=gate)]
    send(page, "long one")
    page.get_by_text("Begin").wait_for()
    page.get_by_role("button", name="New chat").click()
    assert said(page) == []
    gate.set()
    page.locator("#chats .running").wait_for(state="detached")
    page.locator("#chats .open").click()
    assert said(page) == ["long one", "Begin end."]


def test_damaged_or_full_storage_does_not_break_the_page(page: Any, stub: Stub) -> None:
    page.evaluate("""() => {
        localStorage.setItem("internlm.chat.a", "{");
        localStorage.setItem("internlm.chat.b", '{"id": "b", "messages": [{"role": "system"}]}');
        localStorage.setItem("internlm.settings", '{"temperature": "hot", "theme": 7}');
        localStorage.setItem("fill", "x".repeat(5000000));
        for (let size = 100000; size >= 1; size = Math.floor(size / 2)) {
            try { for (let i = 0; ; i++) localStorage.setItem(`fill-${size}-${i}`, "x".repeat(size)); } catch {}
        }
    }""")
    page.reload()
    assert page.locator("#chats li").count() == 0
    ask(page, "hi", "Fine.")
    assert "keeps no more" in page.locator("#trouble").inner_text()
    assert stub.requests[0]["temperature"] == 0.8


def test_a_key_is_asked_for_and_kept_for_the_tab_only(browser: Any) -> None:
    with serving(key="secret") as stub, opened(browser, stub.url) as page:
        page.locator("#key").fill("wrong")
        page.keyboard.press("Enter")
        page.locator("#key-trouble", has_text="Incorrect API key").wait_for()
        page.locator("#key").fill("secret")
        page.get_by_role("button", name="Use this key").click()
        page.locator("#ask-key").wait_for(state="hidden")
        ask(page, "hi", "Fine.")
        page.reload()
        stub.answers = [Answer(["Still."])]
        ask(page, "again", "Still.")
        assert "secret" not in page.evaluate("JSON.stringify(localStorage)")
        stub.key = "changed"
        send(page, "once more")
        stub.answers = [Answer(["Opened."])]
        page.locator("#key").fill("changed")
        page.keyboard.press("Enter")
        wait_for_answer(page, "Opened.")
        page.locator(".assistant .trouble").wait_for(state="detached")
        assert said(page)[-2:] == ["once more", "Opened."]


@pytest.mark.parametrize(
    ("failure", "sentence"),
    [
        (Answer([], status=500, message="the <b>model</b> broke"), "The server failed while answering."),
        (Answer([], status=400, message="too long"), "The server refused the request (400)."),
        (Answer([], status=429, message="queue full"), "The server is busy."),
        (Answer(["Half "], fails=True, message="numbers not finite"), "The server failed while answering."),
        (Answer(["Half "], breaks=True), "The connection broke before the answer was complete."),
    ],
)
def test_an_error_is_shown_and_can_be_tried_again(page: Any, stub: Stub, failure: Answer, sentence: str) -> None:
    stub.answers = [failure]
    send(page, "hi")
    trouble = page.locator("article .trouble")
    trouble.wait_for()
    assert sentence in trouble.inner_text()
    assert failure.message in trouble.inner_text()
    page.reload()
    assert sentence in trouble.inner_text()
    trouble.get_by_role("button", name="Try again").click()
    wait_for_answer(page, "Fine.")
    assert trouble.count() == 0
    assert stub.requests[0]["messages"] == stub.requests[1]["messages"]


def test_a_question_without_an_answer_is_not_sent_along(page: Any, stub: Stub) -> None:
    stub.answers = [Answer([], status=500)]
    send(page, "lost")
    page.locator("article .trouble").wait_for()
    ask(page, "next", "Fine.")
    assert stub.requests[1]["messages"] == [{"role": "user", "content": "next"}]


def test_a_server_that_has_gone_is_said_and_can_be_tried_again(browser: Any) -> None:
    with serving() as stub, opened(browser, stub.url) as page:
        page.route("**/v1/**", lambda route: route.abort())
        page.reload()
        page.locator("#trouble", has_text="cannot be reached").wait_for()
        send(page, "hi")
        page.locator("article .trouble", has_text="cannot be reached").wait_for()
        page.unroute("**/v1/**")
        page.locator("#connect").click()
        page.locator("#trouble").wait_for(state="hidden")
        page.locator("article .trouble").get_by_role("button", name="Try again").click()
        wait_for_answer(page, "Fine.")


@pytest.mark.parametrize(
    ("finish", "sentence"),
    [("length", "The answer reached the token limit."), ("timeout", "The server ended the answer early (timeout).")],
)
def test_an_answer_that_is_not_whole_says_so(page: Any, stub: Stub, finish: str, sentence: str) -> None:
    stub.answers = [Answer(["Once upon a"], finish=finish)]
    ask(page, "A tale", sentence)


def test_a_conversation_is_exported_as_json_and_markdown(page: Any, stub: Stub, tmp_path: Path) -> None:
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("System prompt").fill("Be brief.")
    page.keyboard.press("Escape")
    stub.answers = [Answer(["*Fine* 好"]), Answer([], status=500)]
    ask(page, "How/are you?", "Fine 好")
    send(page, "lost")
    page.locator("article .trouble").wait_for()
    files = {}
    for name in ("As JSON", "As Markdown"):
        page.get_by_role("button", name="Export").click()
        with page.expect_download() as download:
            page.get_by_role("button", name=name).click()
        files[name] = tmp_path / download.value.suggested_filename
        download.value.save_as(files[name])
    assert [path.name for path in files.values()] == ["How-are-you.json", "How-are-you.md"]
    record = json.loads(files["As JSON"].read_text(encoding="utf-8"))
    assert record["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "How/are you?"},
        {"role": "assistant", "content": "*Fine* 好"},
    ]
    assert "## Model\n\n*Fine* 好\n" in files["As Markdown"].read_text(encoding="utf-8")


LANGUAGES = [("zh-CN", "新对话", "zh-Hans"), ("ja-JP", "新しい会話", "ja"), ("fr-FR", "New chat", "en")]


@pytest.mark.parametrize(("locale", "word", "lang"), LANGUAGES)
def test_the_page_speaks_the_browsers_language(browser: Any, stub: Stub, locale: str, word: str, lang: str) -> None:
    with opened(browser, stub.url, locale=locale) as page:
        assert page.locator("#new-chat").inner_text() == word
        assert page.locator("html").get_attribute("lang") == lang


def test_another_language_can_be_chosen_and_stays(page: Any, stub: Stub) -> None:
    ask(page, "hi", "Fine.")
    page.get_by_role("button", name="Settings").click()
    page.locator("#language").select_option("ja")
    assert page.locator("#settings-title").inner_text() == "設定"
    page.keyboard.press("Escape")
    page.reload()
    assert page.locator("#new-chat").inner_text() == "新しい会話"
    assert page.get_by_role("button", name="もう一度回答").count() == 1


def test_every_language_says_everything(page: Any) -> None:
    words, languages = page.evaluate("""async () => {
        const { LANGUAGES, WORDS } = await import("/i18n.js");
        return [WORDS, Object.keys(LANGUAGES)];
    }""")
    sources = b"".join(file.content for path, file in web.files().items() if "i18n" not in path).decode()
    used = set(re.findall(r'data-(?:text|hint|label)="(\w+)"', sources)) | set(re.findall(r'\bt\("(\w+)"', sources))
    assert used <= set(words)
    for sentences in words.values():
        assert len(list(filter(None, sentences))) == len(languages)
        holes = [re.findall(r"\{\w+\}", sentence) for sentence in sentences]
        assert holes == [holes[0]] * len(holes)


def test_it_fits_a_phone(browser: Any, stub: Stub) -> None:
    wide = "x" * 300
    stub.answers = [Answer([f"{wide}\n\n```c\n{wide}\n```\n\n|{wide}|{wide}|\n|--|--|\n|1|2|\n\n`{wide}`"])]
    phone = {"viewport": {"width": 360, "height": 640}, "is_mobile": True, "has_touch": True}
    with opened(browser, stub.url, **phone) as page:
        ask(page, wide, "xxx")
        assert page.evaluate("document.documentElement.scrollWidth") == 360
        assert page.evaluate("document.querySelector('#scroll').scrollWidth") <= 360
        assert not page.locator("#sidebar").is_visible()
        page.get_by_role("button", name="Conversations").tap()
        page.locator("#chats .open").wait_for()
        page.touchscreen.tap(350, 320)
        page.locator("#sidebar").wait_for(state="hidden")
        assert page.evaluate("document.activeElement.id") == "open-sidebar"
        page.get_by_role("button", name="Settings").tap()
        assert page.evaluate("document.querySelector('#settings').getBoundingClientRect().width") <= 360


def brightness(page: Any) -> int:
    numbers = re.findall(r"\d+", page.evaluate("getComputedStyle(document.body).backgroundColor"))
    return sum(map(int, numbers[:3]))


def test_dark_follows_the_system_until_chosen_otherwise(browser: Any, stub: Stub) -> None:
    with opened(browser, stub.url, color_scheme="dark") as page:
        assert brightness(page) < 120
        page.get_by_role("button", name="Settings").click()
        page.locator("#theme").select_option("light")
        assert brightness(page) > 650
        page.reload()
        assert brightness(page) > 650
        page.emulate_media(color_scheme="light")
        page.get_by_role("button", name="Settings").click()
        page.locator("#theme").select_option("dark")
        assert brightness(page) < 120


def test_every_control_has_a_name_for_screen_readers(page: Any) -> None:
    ask(page, "hi", "Fine.")
    page.evaluate("document.querySelectorAll('dialog').forEach((dialog) => dialog.show())")
    nameless = page.evaluate("""() => {
        const named = (one) => one.getAttribute("aria-label") || one.labels?.length || one.textContent.trim();
        const all = [...document.querySelectorAll("button, input, select, textarea")];
        return all.filter((one) => !named(one)).map((one) => one.outerHTML);
    }""")
    assert nameless == []
    log = page.get_by_role("log")
    assert log.get_attribute("aria-live") == "polite"
    assert log.get_attribute("aria-label") == "Conversation"
    assert page.locator("#status").inner_text() == "The answer is complete"


def test_everything_comes_from_the_server_itself(page: Any, stub: Stub) -> None:
    ask(page, "hi", "Fine.")
    assert {"/".join(url.split("/")[:3]) for url in page.asked} == {stub.url}
    missing = [path for path in stub.paths if path not in web.files() and path != "/v1/models"]
    assert missing == []


def test_the_policy_forbids_foreign_code(page: Any) -> None:
    outcome = page.evaluate("""async () => {
        const tried = {};
        try { document.body.innerHTML = "<b>x</b>"; tried.html = "taken"; } catch { tried.html = "refused"; }
        const script = document.createElement("script");
        try { script.text = "window.ran = true"; document.head.append(script); } catch {}
        tried.script = window.ran ? "taken" : "refused";
        try { await fetch("http://127.0.0.1:9/"); tried.fetch = "taken"; } catch { tried.fetch = "refused"; }
        const style = document.createElement("style");
        style.textContent = "body { outline: 7px solid red }";
        document.head.append(style);
        tried.style = getComputedStyle(document.body).outlineWidth === "7px" ? "taken" : "refused";
        return tried;
    }""")
    assert outcome == {"html": "refused", "script": "refused", "fetch": "refused", "style": "refused"}
    assert page.complaints
    page.complaints.clear()


def test_files_are_those_of_the_page_and_nothing_else() -> None:
    files = web.files()
    assert files["/"].kind.startswith("text/html")
    assert files["/app.js"].kind == "text/javascript; charset=utf-8"
    assert not [path for path in files if path.endswith((".py", ".pyc", "/index.html"))]
    text = files["/"].content.decode()
    for name in re.findall(r'(?:src|href)="([^"#]+)', text):
        assert f"/{name}" in files, name
    assert "<style" not in text
    assert not re.search(r"\son\w+=|\sstyle=|<script>", text)
