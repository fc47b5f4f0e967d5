"""The chat page over time: what is kept, other tabs, long conversations, servers that change."""

from __future__ import annotations

import json
import threading
from typing import Any

import pytest

from tests.serve.chromium import ask, opened, said, send, wait_for_answer
from tests.serve.openai_stub import Answer, Stub, serving


def stored(page: Any, id: str, **changes: Any) -> None:
    """Put a conversation where the browser keeps them."""
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    chat = {"id": id, "title": id, "system": "", "created": 1, "changed": 1, "messages": said, **changes}
    page.evaluate("([name, text]) => localStorage.setItem(name, text)", [f"internlm.chat.{id}", json.dumps(chat)])


def test_a_conversation_kept_by_another_version_harms_nothing(page: Any) -> None:
    stored(page, "good")
    stored(page, "no-title", title=None)
    stored(page, "no-system", system={"a": 1})
    stored(page, "no-time", created="soon")
    failed = {"role": "assistant", "content": "c", "error": {"kind": "moon", "status": 7}, "finish": "newly"}
    stored(page, "newer", changed=0, messages=[{"role": "user", "content": "a"}, failed])
    page.reload()
    assert page.locator("#chats .open").all_inner_texts() == ["good", "newer"]
    page.locator("#chats .open").nth(1).click()
    page.get_by_role("button", name="Try again").click()
    wait_for_answer(page, "Fine.")


def test_what_is_typed_here_outlives_what_happens_in_another_tab(page: Any, stub: Stub) -> None:
    ask(page, "mine", "Fine.")
    page.locator("article.user").hover()
    page.locator("article.user").get_by_role("button", name="Edit").click()
    page.get_by_label("Edit your message").fill("half a thought")
    other = page.context.new_page()
    other.goto(stub.url)
    ask(other, "there", "Fine.")
    page.locator("#chats .open", has_text="there").wait_for()
    assert page.get_by_label("Edit your message").input_value() == "half a thought"
    other.locator("#chats .open", has_text="mine").click()
    stub.answers = [Answer(["More."])]
    ask(other, "more", "More.")
    page.bring_to_front()
    page.locator(".said", has_text="more").wait_for()
    assert said(page)[-2:] == ["more", "More."], "the conversation that both show is the newest"


def test_messages_that_are_shown_are_not_made_anew(page: Any, stub: Stub) -> None:
    ask(page, "one", "Fine.")
    page.evaluate("window.first = document.querySelector('article.assistant')")
    stub.answers = [Answer(["Two."])]
    ask(page, "two", "Two.")
    page.locator("#chats li").hover()
    page.get_by_role("button", name="Rename").click()
    page.keyboard.type("Named")
    page.keyboard.press("Enter")
    assert page.title() == "Named · InternLM"
    assert page.evaluate("window.first === document.querySelector('article.assistant')")


def test_of_a_long_conversation_only_what_is_in_sight_is_laid_out(page: Any, stub: Stub) -> None:
    text = "Some **words**.\n\n- one\n- two\n\n```py\nx = 1\n```\n\nlast words"
    turn = [{"role": "user", "content": "question"}, {"role": "assistant", "content": text}]
    stored(page, "long", messages=turn * 100)
    page.goto(f"{stub.url}/#long")
    page.reload()
    assert page.locator("article").count() == 200
    page.wait_for_function("""() => {
        const scroll = document.querySelector("#scroll");
        return scroll.scrollTop > 1000 && scroll.scrollHeight - scroll.scrollTop - scroll.clientHeight < 2;
    }""")
    shown = """(index) => {
        const [code] = document.querySelectorAll("article.assistant")[index].getElementsByTagName("pre");
        return code.checkVisibility({ contentVisibilityAuto: true });
    }"""
    assert not page.evaluate(shown, 5)
    assert page.evaluate(shown, 99)
    page.locator("#scroll").evaluate("(scroll) => scroll.scrollTop = 0")
    page.wait_for_function(f"() => ({shown})(0)")
    stub.answers = [Answer(["End."])]
    ask(page, "next", "End.")
    page.wait_for_function("""() => {
        const scroll = document.querySelector("#scroll");
        return scroll.scrollHeight - scroll.scrollTop - scroll.clientHeight < 2;
    }""")


def test_a_key_of_any_characters_is_sent_as_it_is(browser: Any) -> None:
    with serving(key="schlüssel-密钥".encode().decode("latin-1")) as stub, opened(browser, stub.url) as page:
        page.locator("#key").fill("schlüssel-密钥")
        page.keyboard.press("Enter")
        page.locator("#ask-key").wait_for(state="hidden")
        ask(page, "hi", "Fine.")


def test_a_server_that_serves_another_model_now_is_asked_for_that(page: Any, stub: Stub) -> None:
    ask(page, "hi", "Fine.")
    stub.models = ["other"]
    stub.answers = [Answer([], status=404, message="no such model")]
    send(page, "still there?")
    page.locator("article .trouble", has_text="no such model").wait_for()
    page.locator("#model option", has_text="other").wait_for(state="attached")
    stub.answers = [Answer(["Now."])]
    page.get_by_role("button", name="Try again").click()
    wait_for_answer(page, "Now.")
    assert [request["model"] for request in stub.requests] == ["tiny", "tiny", "other"]


@pytest.mark.parametrize("body", ["<html>proxy</html>", "null", '{"data": 5}', '{"error": {"message": "odd"}}'])
def test_a_list_of_models_that_is_none_is_said(browser: Any, stub: Stub, body: str) -> None:
    with opened(browser, stub.url) as page:
        page.route("**/v1/models", lambda route: route.fulfill(status=200, body=body))
        page.reload()
        page.locator("#trouble", has_text="The server failed").wait_for()


def test_escape_that_closes_a_menu_or_ends_a_word_does_not_stop_the_answer(page: Any, stub: Stub) -> None:
    gate = threading.Event()
    stub.answers = [Answer(["Begin ", "end."], gate=gate)]
    send(page, "go")
    page.get_by_text("Begin").wait_for()
    page.dispatch_event("#input", "keydown", {"key": "Escape", "isComposing": True, "bubbles": True})
    page.get_by_role("button", name="Export").click()
    page.keyboard.press("Escape")
    page.locator("#export").wait_for(state="hidden")
    gate.set()
    wait_for_answer(page, "Begin end.")
    assert page.get_by_text("Stopped.").count() == 0
