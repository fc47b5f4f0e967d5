"""Write docs/recipe.md: every key of a recipe, as the dataclasses that read it say. A test compares the two.

python tools/recipe_reference.py
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import textwrap
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from internlm.model.presets import PRESETS
from internlm.recipe import Recipe

PAGE = Path(__file__).parents[1] / "docs" / "recipe.md"
HEAD = """# Recipe keys

Every key of a recipe with its type, its default and what it decides. How recipes are put together, and what a run does
with them: [training](training.md). This page is made from the code by `python tools/recipe_reference.py`.

Two keys stand in no table. `base: other.yaml`, or a list of such, lays a recipe over others; the paths are relative to
its own file. `model.preset` starts from a named shape:
{presets}.
"""
WORDS = {int: ["integer"], float: ["number"], str: ["text"], bool: ["`true`", "`false`"]}


@dataclasses.dataclass
class Chapter:
    """A section and where it stands in a recipe: one class may be read in several places."""

    cls: type
    paths: list[str]
    kind: str = ""
    """Which of several variants it is."""

    @property
    def heading(self) -> str:
        """Where it stands, in words."""
        return ", ".join([*self.paths, *([f"kind {self.kind}"] if self.kind else [])]) or "At the top"

    @property
    def link(self) -> str:
        """What GitHub and mkdocs make of the heading."""
        return "#" + re.sub(r"[^\w -]", "", self.heading.lower()).replace(" ", "-")


def page() -> str:
    """Return the whole page."""
    presets = ", ".join(f"`{name}`" for name in PRESETS if not name.startswith("toy"))
    wrapped = textwrap.fill(presets, 120, break_on_hyphens=False)
    return HEAD.format(presets=wrapped) + "".join(_chapter(Chapter(Recipe, [])))


def _chapter(chapter: Chapter) -> Iterator[str]:
    """Yield the table of a section, then the chapters of the sections inside it."""
    docs, hints = _docs(chapter.cls), typing.get_type_hints(chapter.cls, include_extras=True)
    prefix = f"{chapter.paths[0]}." if chapter.paths else ""
    below: dict[type, Chapter] = {}
    yield f"\n{'##' if '.' not in prefix[:-1] else '###'} {chapter.heading}\n"
    if chapter.paths:
        yield f"\n{_plain(inspect.getdoc(chapter.cls) or '')}\n"
    yield "\n| key | type | default | |\n|---|---|---|---|\n"
    fields = dataclasses.fields(chapter.cls)
    # All before the first row: a section that is read in two places has both in its heading, and so in its link.
    inner = {field.name: _inner(prefix + field.name, hints[field.name], below) for field in fields}
    for field in fields:
        if field.name in docs:  # what a variant has from another stands there
            kind = _type(hints[field.name], inner[field.name])
            yield f"| `{field.name}` | {kind} | {_default(field)} | {_plain(docs[field.name])} |\n"
    for one in below.values():
        yield from _chapter(one)


def _inner(path: str, hint: Any, below: dict[type, Chapter]) -> list[Chapter]:
    """Return the sections that a field may hold, and add them to the chapters below."""
    if typing.get_origin(hint) is dict:
        path, hint = f"{path}.NAME", typing.get_args(hint)[1]
    if typing.get_origin(hint) is tuple:
        hint = typing.get_args(hint)[0]
    found = [one for one in _options(hint) if isinstance(one, type) and dataclasses.is_dataclass(one)]
    for cls in found:
        if cls in below:
            below[cls].paths.append(path)
        else:
            kind = typing.get_args(typing.get_type_hints(cls)["kind"])[0] if len(found) > 1 else ""
            below[cls] = Chapter(cls, [path], kind)
    return [below[cls] for cls in found]


def _type(hint: Any, inner: list[Chapter]) -> str:
    """Return a field's type in words; sections are links."""
    if inner:
        many = {dict: "sections by name", tuple: "list of sections"}.get(typing.get_origin(hint), "section")
        words = [f"[{one.kind or many}]({one.link})" for one in inner]
    else:
        words = [word for option in _options(hint) for word in _words(option)]
    words += ["`null`"] * (type(None) in typing.get_args(hint))
    return " or ".join([", ".join(words[:-1])] * (len(words) > 1) + words[-1:])


def _words(hint: Any) -> list[str]:
    """Return the words for a type that is no section."""
    if typing.get_origin(hint) is typing.Literal:
        return [_yaml(value) for value in typing.get_args(hint)]
    if typing.get_origin(hint) is tuple:
        of, *others = typing.get_args(hint)
        count = "" if others == [Ellipsis] else f"{1 + len(others)} "
        return [f"list of {count}{'words' if typing.get_origin(of) is typing.Literal else f'{WORDS[of][0]}s'}"]
    return WORDS[hint]


def _options(hint: Any) -> list[Any]:
    """Return the members of a union but None, through `Annotated`."""
    if typing.get_origin(hint) is typing.Annotated:
        return _options(typing.get_args(hint)[0])
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return [o for member in typing.get_args(hint) if member is not type(None) for o in _options(member)]
    return [hint]


def _default(field: dataclasses.Field[Any]) -> str:
    """Return a default; those of a section stand in its own table."""
    value = field.default
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    if value is dataclasses.MISSING:
        return "**needed**"
    if dataclasses.is_dataclass(value):
        return ""
    return _yaml(list(value) if isinstance(value, tuple) else value)


def _yaml(value: Any) -> str:
    """Return a value as YAML writes it."""
    text = {"None": "null", "True": "true", "False": "false"}.get(str(value), str(value)).replace("'", "")
    return f'`"{text}"`' if isinstance(value, str) and text.isdigit() else f"`{text}`"


def _docs(cls: type) -> dict[str, str]:
    """Return the text under each field that a section has itself.

    Raises:
        ValueError: a field has none.
    """
    body = typing.cast(ast.ClassDef, ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]).body
    found: dict[str, str] = {}
    for statement, after in zip(body, [*body[1:], None], strict=True):
        if not (isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)):
            continue
        name = statement.target.id
        if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            found[name] = str(after.value.value)
        elif name == "kind":  # the tag of a variant
            found[name] = "Chooses this variant."
        else:
            raise ValueError(f"{cls.__name__}.{name} has no text under it")
    return found


def _plain(text: str) -> str:
    """Return a docstring as one line of a Markdown table, with YAML's words for Python's."""
    text = re.sub(r"\bNone\b", "`null`", " ".join(text.split()))
    return text.replace("|", r"\|").replace("*", r"\*")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
