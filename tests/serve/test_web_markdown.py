"""How the chat page renders what a model writes: right, safe, quick, and the same while it grows as at once."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest

from tests.serve.chromium import chromium, opened
from tests.serve.openai_stub import Answer, serving

RENDER = """async (text) => {
    const { appendBlocks } = await import("/markdown.js");
    const box = document.createElement("div");
    appendBlocks(box, text);
    box.normalize();
    return box.innerHTML;
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def page(browser: Any) -> Iterator[Any]:
    with serving() as stub, opened(browser, stub.url) as found:
        yield found


LINK = 'target="_blank" rel="noopener noreferrer nofollow"'
CASES = [
    ("plain", "<p>plain</p>"),
    ("a\nb\n\nc", "<p>a<br>b</p><p>c</p>"),
    ("**a** *b* ***c*** __d__ _e_ ~~f~~", "<p><strong>a</strong> <em>b</em> <em><strong>c</strong></em> "
     "<strong>d</strong> <em>e</em> <del>f</del></p>"),
    ("**「强调」**的*字*。", "<p><strong>「强调」</strong>的<em>字</em>。</p>"),
    ("2 * 3 * 4, snake_case_name, a ~ b, **open", "<p>2 * 3 * 4, snake_case_name, a ~ b, **open</p>"),
    ("**a *b** c*", "<p><strong>a *b</strong> c*</p>"),
    (r"\*no\* \\ \d", r"<p>*no* \ \d</p>"),
    ("`a*b*` ``x`y`` `open", "<p><code>a*b*</code> <code>x`y</code> `open</p>"),
    ("# A\n### B ##\n#no", '<h3 class="heading-1">A</h3><h5 class="heading-3">B</h5><p>#no</p>'),
    ("# C#\n# a # # \n# ##", '<h3 class="heading-1">C#</h3><h3 class="heading-1">a #</h3><h3 class="heading-1"></h3>'),
    ("x | y\n - | :-:", '<div class="table" tabindex="0"><table><thead><tr><th class="side-left">x</th>'
     '<th class="side-center">y</th></tr></thead><tbody></tbody></table></div>'),
    ("x | y\n--- | |", "<p>x | y<br>--- | |</p>"),
    ("` a ` `  `", "<p><code>a</code> <code>  </code></p>"),
    ("[t]( https://a.b \n 'c' )", f'<p><a href="https://a.b/" {LINK}>t</a></p>'),
    ("a\n\n---\n***\nb", "<p>a</p><hr><hr><p>b</p>"),
    ("> a\n> > b\n\nc", "<blockquote><p>a</p><blockquote><p>b</p></blockquote></blockquote><p>c</p>"),
    ("- a\n- b\n  - c\n  - d\n- e", "<ul><li>a</li><li>b<ul><li>c</li><li>d</li></ul></li><li>e</li></ul>"),
    ("- a\n  more\n\n  para\n- b", "<ul><li><p>a<br>more</p><p>para</p></li><li>b</li></ul>"),
    ("3. a\n4. b\n\nc", '<ol start="3"><li>a</li><li>b</li></ol><p>c</p>'),
    ("1. a\n   - b\n\n2. c", "<ol><li>a<ul><li>b</li></ul></li><li>c</li></ol>"),
    ("* a\n+ b", "<ul><li>a</li></ul><ul><li>b</li></ul>"),
    ("In\n1984. A year", "<p>In<br>1984. A year</p>"),
    ("[t](https://a.b/c_d_(e)) <http://x.y>", f'<p><a href="https://a.b/c_d_(e)" {LINK}>t</a> '
     f'<a href="http://x.y/" {LINK}>http://x.y</a></p>'),
    ("see https://a.b/c?d=e. (http://x.y/z)", f'<p>see <a href="https://a.b/c?d=e" {LINK}>https://a.b/c?d=e</a>. '
     f'(<a href="http://x.y/z" {LINK}>http://x.y/z</a>)</p>'),
    ("![cat](https://a.b/c.png)", f'<p><a href="https://a.b/c.png" {LINK}>cat</a></p>'),
    ("|a|b|\n|:-|-:|\n|1|2|\n|`x`|", '<div class="table" tabindex="0"><table><thead><tr><th class="side-left">a</th>'
     '<th class="side-right">b</th></tr></thead><tbody><tr><td class="side-left">1</td><td class="side-right">2</td>'
     '</tr><tr><td class="side-left"><code>x</code></td><td class="side-right"></td></tr></tbody></table></div>'),
    ("a | b\nno table", "<p>a | b<br>no table</p>"),
    ("<b>x</b> &amp; <script>1</script>", "<p>&lt;b&gt;x&lt;/b&gt; &amp;amp; &lt;script&gt;1&lt;/script&gt;</p>"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "html"), CASES)
def test_markdown_is_rendered(page: Any, text: str, html: str) -> None:
    assert page.evaluate(RENDER, text) == html


def test_code_keeps_every_character_and_is_coloured(page: Any) -> None:
    code = 'def f(x):  # "why"\n    """a\n    b"""\n    return x + 0x1F, "it\'s"\n\n\ttab <b>'
    box = page.evaluate_handle(
        """async (text) => {
            const { appendBlocks } = await import("/markdown.js");
            const box = document.createElement("div");
            appendBlocks(box, text);
            return box;
        }""",
        f"```Python title\n{code}\n```",
    )
    assert box.evaluate("box => box.querySelector('pre').textContent") == code + "\n"
    assert box.evaluate("box => box.querySelector('.code-head span').textContent") == "Python"
    kinds = box.evaluate("box => [...box.querySelectorAll('code span[class]')].map(e => [e.className, e.textContent])")
    for expected in (["code-word", "def"], ["code-call", "f"], ["code-comment", '# "why"'], ["code-number", "0x1F"]):
        assert expected in kinds
    assert ["code-string", '    b"""'] in kinds


GROW = """async ([text, cuts]) => {
    const { Growing } = await import("/markdown.js");
    const { appendBlocks } = await import("/markdown.js");
    const [whole, part] = [document.createElement("div"), document.createElement("div")];
    appendBlocks(whole, text);
    const growing = new Growing(part);
    for (const cut of [...cuts, text.length]) growing.grow(text.slice(0, cut));
    whole.normalize();
    part.normalize();
    return [part.innerHTML, whole.innerHTML];
}"""
PIECES = [
    "word ", "**", "*", "`", "\n", "\n\n", "\n",
    "- item", "  - below", "1. one", "> said", "# Head", "---", "| a | b |",
    "\n|---|---|\n", "| 1 | 2 |", "\n```py\n", "\n```\n", "~~~", "x = 1  # y", "[t](http://a.b)", "    ", "'''",
    "/*", "好",
]  # fmt: skip


def test_text_that_grows_ends_as_if_it_had_come_at_once(page: Any) -> None:
    # Up to the x the third line looks like the divider of a table, which would end the paragraph.
    text = "a\n| b | c |\n|---|-x\n"
    grown, whole = page.evaluate(GROW, [text, list(range(len(text)))])
    assert grown == whole
    generator = random.Random(3)
    for _ in range(250):
        text = "".join(generator.choice(PIECES) for _ in range(generator.randrange(2, 30)))
        every = generator.random() < 0.5
        count = generator.randrange(0, 9)
        cuts = range(len(text)) if every else sorted(generator.randrange(len(text)) for _ in range(count))
        grown, whole = page.evaluate(GROW, [text, list(cuts)])
        assert grown == whole, (text, list(cuts))


HOSTILE = [
    "<script>window.hacked = 1</script>",
    "<img src=x onerror='window.hacked = 1'>",
    "<svg/onload=window.hacked=1><iframe srcdoc='<script>parent.hacked=1</script>'></iframe>",
    "<a href='javascript:window.hacked=1'>x</a><style>*{display:none}</style><base href='//evil.test'>",
    "[x](javascript:window.hacked=1) [x](JaVaScRiPt:window.hacked=1) [x](\tjavascript:window.hacked=1)",
    "[x](data:text/html,<script>window.hacked=1</script>) [x](vbscript:x) [x](file:///etc/passwd) [x](//evil.test)",
    "[x](/v1/models) [x](#y) [x](<javascript:window.hacked=1>) <javascript:window.hacked=1> [x](java\nscript:alert)",
    "[x](&#106;avascript:window.hacked=1) [x](blob:http://a/b) [x](http:javascript)",
    '[x](https://a.b/"onmouseover="window.hacked=1) [y](https://a.b "t" onclick="window.hacked=1")',
    "![x](http://evil.test/a.png) ![x](javascript:window.hacked=1) ![](https://evil.test/?q=secret)",
    "```<script>window.hacked=1</script>\n</code></pre><script>window.hacked=1</script>\n```",
    "```js\" onmouseover=\"window.hacked=1\n`</span><img src=x onerror=window.hacked=1>`\n```",
    "|<img src=x onerror=window.hacked=1>|b|\n|-|-|\n|<script>window.hacked=1</script>|[x](javascript:hacked=1)|",
    "# <img src=x onerror=window.hacked=1>\n> <script>window.hacked=1</script>\n- <script>window.hacked=1</script>",
    "`<script>window.hacked=1</script>` **<script>window.hacked=1</script>** <http://a.b/<script>>",
    "__proto__ constructor {{constructor.constructor('window.hacked=1')()}} ${window.hacked=1}",
]  # fmt: skip


def test_hostile_text_stays_text_in_answers_questions_and_titles(browser: Any) -> None:
    whole = "\n\n".join(HOSTILE)
    with serving(models=["<img src=x onerror=window.hacked=1>"]) as stub:
        stub.answers = [Answer([whole[i : i + 5] for i in range(0, len(whole), 5)])]
        with opened(browser, stub.url) as page:
            page.on("dialog", lambda dialog: page.complaints.append(dialog.message))
            page.fill("#input", whole)
            page.press("#input", "Enter")
            page.locator("article.assistant[aria-busy=false]").wait_for()
            page.reload()
            found = page.evaluate("""() => {
                const all = [...document.querySelectorAll("#log *, #chats *, #model *")];
                return {
                    hacked: window.hacked ?? null,
                    names: [...new Set(all.map((one) => one.tagName.toLowerCase()))],
                    handlers: all.flatMap((one) => one.getAttributeNames()).filter((at) => /^(on|style|src)/.test(at)),
                    links: [...document.querySelectorAll("#log a")].map((one) => [one.protocol, one.host, one.rel]),
                    text: document.querySelector("#log").textContent,
                };
            }""")
            assert found["hacked"] is None
            assert not {"script", "img", "iframe", "style", "base", "object", "embed"} & set(found["names"])
            assert found["handlers"] == []
            assert {link[0] for link in found["links"]} == {"http:", "https:"}
            assert stub.url.removeprefix("http://") not in {link[1] for link in found["links"]}
            assert {link[2] for link in found["links"]} == {"noopener noreferrer nofollow"}
            assert "<script>window.hacked = 1</script>" in found["text"]
            assert {"/".join(url.split("/")[:3]) for url in page.asked} == {stub.url}  # no image was fetched


MANY = 20_000
SLOW = [
    "*" * MANY, "*a" * MANY, "**a _b " * MANY, "[" * MANY, "[](" * MANY, "![" * MANY, "`a``" * MANY, "<" * MANY,
    "http://" * MANY, "> " * MANY, "- " * MANY, "\\" * MANY, "~~" * MANY, "|" * MANY + "\n" + "|-" * MANY, "_ _" * MANY,
    "```\n" + '"\\' * MANY, "```\n" + '"\n/*' * MANY, "(" * MANY, "[a](" + "(" * MANY, "1. " * MANY, " " * MANY + "x",
    "# " + "#" * MANY + "x", "- a\n" * MANY, "> a\n" * MANY, "[a](http://x" + ")" * MANY, "\n" * MANY, "a\n" * MANY,
    "http://x" + "." * MANY + "y", "# x" + " " * 3 * MANY + "x", "a|b\n-" + " " * 4 * MANY + "x",
    "a|b\n" + " " * 3 * MANY + "x-", "```" + " " * 3 * MANY + "`", "~" * 3 * MANY + "`",
]  # fmt: skip


@pytest.mark.parametrize("text", SLOW, ids=range(len(SLOW)))
def test_no_text_can_hang_the_page(page: Any, text: str) -> None:
    milliseconds = page.evaluate(
        """async (text) => {
            const { appendBlocks } = await import("/markdown.js");
            const start = performance.now();
            appendBlocks(document.createElement("div"), text);
            return performance.now() - start;
        }""",
        text,
    )
    assert milliseconds < 1500
