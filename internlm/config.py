"""Recipes on disk → validated, frozen dataclasses.

A recipe is YAML whose keys are the fields of plain dataclasses. Three layers, each over the one before:

    base: ../common.yaml          # 1. another recipe, or a list of them, relative to this file
    optim: {lr: 3e-4}             # 2. this file
    $ internlm train r.yaml optim.lr=1e-4      # 3. dotted overrides on the command line

Mappings merge key by key, everything else replaces. Where a layer changes `kind` (the tag of a variant) the keys that
earlier layers gave to the old variant go with it; where it names another `preset`, all that they gave goes. Every leaf
remembers where it came from (`file:line`, `default`, `command line`), which is what errors and `--dry-run` print.
Scalars are those of YAML 1.2; decoding is pydantic's: unknown keys are errors.

    loaded = load(Recipe, "r.yaml", ["optim.lr=1e-4"])
    loaded.value.optim.lr, loaded.origins["optim.lr"]      # 0.0001, 'command line'
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar, dataclass_transform

from internlm.errors import ConfigError, did_you_mean

T = TypeVar("T")
Tree = dict[str, Any]
Origins = dict[str, str]

_SCALARS = {
    "int": re.compile(r"[-+]?(0|[1-9]\d*)$"),
    "float": re.compile(
        r"[-+]?(\.\d+|\d+\.\d*)([eE][-+]?\d+)?$|[-+]?\d+[eE][-+]?\d+$|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$"
    ),
    "bool": re.compile(r"(true|True|TRUE|false|False|FALSE)$"),
}
"""Of YAML 1.2 (https://yaml.org/spec/1.2.2/#103-core-schema)."""


@dataclass_transform(kw_only_default=True, frozen_default=True)
def section(cls: type[T]) -> type[T]:
    """Make a frozen, keyword-only dataclass that takes no unknown keys from a recipe."""
    cls.__pydantic_config__ = {"extra": "forbid", "coerce_numbers_to_str": True}  # type: ignore[attr-defined]
    return dataclass(frozen=True, kw_only=True)(cls)


def require_positive(value: Any, place: str, *names: str) -> None:
    """Check that the named fields of a section are at least 1, as `require` does."""
    require(value, place, names, lambda number: number >= 1, "must be at least 1")


def require(value: Any, place: str, names: Iterable[str], fits: Callable[[float], bool], what: str) -> None:
    """Check that the named fields of a section are finite and fit, where they are given at all.

    `place`: the section's path in the recipe; `fits`: says whether a number does, and NaN must not.

    Raises:
        ConfigError: says `what` of the first that does not fit.
    """
    for name in names:
        number = getattr(value, name)
        if number is not None and not (fits(number) and number < math.inf):
            raise ConfigError("must be finite" if number == math.inf else what, where=f"{place}.{name}", got=number)


@dataclass(frozen=True)
class Loaded(Generic[T]):
    """A validated recipe, and where each of its leaves (`a.b.c`) came from."""

    value: T
    origins: Origins


def default_kind(kind: str) -> Any:
    """Return an annotation for a union of variants: a mapping without `kind` means this one."""
    import pydantic

    return pydantic.BeforeValidator(lambda v: {"kind": kind, **v} if isinstance(v, dict) and "kind" not in v else v)


def or_number() -> Any:
    """Return an annotation for a choice of texts, of which one may look like a number to YAML."""
    import pydantic

    return pydantic.BeforeValidator(lambda v: str(v) if isinstance(v, int) and not isinstance(v, bool) else v)


def load(
    schema: type[T],
    path: str | Path | None = None,
    overrides: Iterable[str] = (),
    expand: Callable[[Tree, Origins], None] | None = None,
    elsewhere: Mapping[str, str] | None = None,
) -> Loaded[T]:
    """Read, merge, override and validate a recipe.

    Args:
        schema: the root dataclass.
        path: the YAML file; None: the defaults alone.
        overrides: `dotted.key=value`, the value in YAML.
        expand: fills further keys into the merged tree and its origins.
        elsewhere: advice for unknown keys, by name.

    Raises:
        ConfigError: everything that is wrong with it, all at once.
    """
    tree, origins = _layers(path, overrides, _variants(schema))
    if expand is not None:
        expand(tree, origins)
    return Loaded(decode(schema, tree, origins, elsewhere), origins)


def read_tree(path: str | Path | None, overrides: Iterable[str] = ()) -> Tree:
    """Return the merged recipe as plain values, not validated: for a look before heavy imports."""
    return _layers(path, overrides, ())[0]


def decode(
    schema: type[T],
    tree: Mapping[str, Any],
    origins: Origins | None = None,
    elsewhere: Mapping[str, str] | None = None,
) -> T:
    """Validate a tree of plain values against a dataclass; `origins` and `elsewhere` as of `load`, for the message.

    Raises:
        ConfigError: one line per problem, each with its place, the value and the next step.
    """
    import pydantic

    origins = origins or {}
    try:
        value = _reader(schema)(tree)  # type: ignore[arg-type]  # mypy: a class is hashable
        problems = [f"{_placed(path, origins)}: {what}" for path, what in _misread(_variants(schema), tree)]
        if not problems:
            return value
    except pydantic.ValidationError as error:
        problems = [_explain_problem(schema, dict(problem), origins, elsewhere or {}) for problem in error.errors()]
    except ConfigError as error:  # raised by a __post_init__
        problems = [str(error)]
    problems = list(dict.fromkeys(problems))
    head = "the recipe has a mistake" if len(problems) == 1 else f"the recipe has {len(problems)} mistakes"
    raise ConfigError(head + "\n  " + "\n  ".join(problems))


@functools.cache
def _reader(schema: type[T]) -> Callable[[Mapping[str, Any]], T]:
    """Return pydantic's reader of a schema: that of a recipe takes 50 ms to make."""
    import pydantic

    return pydantic.TypeAdapter(schema).validate_python


def encode(value: Any) -> Any:
    """Return a section as plain values that `decode` reads back to an equal one."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: encode(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: encode(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [encode(item) for item in value]
    return value


def dump(value: Any) -> str:
    """Return a section as YAML that loads to an equal one."""
    import yaml

    class Dumper(yaml.SafeDumper):
        """Quotes the text that our loader would take for a number too."""

    Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _SCALARS["float"], None)
    return yaml.dump(encode(value), Dumper=Dumper, sort_keys=False, allow_unicode=True, width=120)


def explain(loaded: Loaded[Any]) -> str:
    """Return a table of every leaf of the recipe, its value and origin."""
    rows = [(key, repr(value), loaded.origins.get(key, "default")) for key, value in leaves(encode(loaded.value))]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    widths[1] = min(widths[1], 60)
    return "\n".join(f"{key:{widths[0]}}  {value:{widths[1]}}  {origin}" for key, value, origin in rows)


def leaves(value: Any, prefix: str = "") -> list[tuple[str, Any]]:
    """Return (dotted path, value) of what stands in a tree; an empty mapping is a leaf."""
    if isinstance(value, dict) and value:
        return [leaf for key, item in value.items() for leaf in leaves(item, f"{prefix}{key}.")]
    return [(prefix.removesuffix("."), value)]


def changes(old: Tree, new: Tree, prefix: str = "") -> list[tuple[str, Any, Any]]:
    """Return (dotted path, before, now) where two trees both say something, and not the same."""
    found: list[tuple[str, Any, Any]] = []
    for key in (key for key in new if key in old and old[key] != new[key]):
        before, now = old[key], new[key]
        if isinstance(before, dict) and isinstance(now, dict) and before.keys() == now.keys():
            found += changes(before, now, f"{prefix}{key}.")
        else:
            found.append((prefix + key, before, now))
    return found


def merge(
    tree: Tree, origins: Origins, layer: Tree, layer_origins: Origins, hints: Sequence[Any] = (), prefix: str = ""
) -> None:
    """Lay `layer` over `tree`, in place; `origins` follow.

    `hints`: what the tree may be. They say where another `kind` is another variant, and another preset ends what was
    there; without any every key stays until it is replaced. `prefix`: path of the tree, with a dot at its end.
    """
    kind = layer.get("kind")
    is_union = sum(map(dataclasses.is_dataclass, hints)) > 1
    is_other = is_union and kind is not None and tree.get("kind") not in (None, kind)
    if is_other or (hints and "preset" in layer and tree.get("preset") != layer["preset"]):
        for key in tree:
            _forget(origins, prefix + key)
        tree.clear()
    for key, value in layer.items():
        path = prefix + key
        if isinstance(value, dict) and isinstance(tree.get(key), dict):
            merge(tree[key], origins, value, layer_origins, _below(hints, key), path + ".")
            continue
        _forget(origins, path)
        tree[key] = value
        origins.update({k: v for k, v in layer_origins.items() if k == path or k.startswith(path + ".")})


def _parse_override(text: str) -> tuple[Tree, Origins]:
    """Turn `a.b=1` into a tree and its origins."""
    key, equals, raw = text.partition("=")
    key = key.strip()
    if not equals or not all(key.split(".")):
        raise ConfigError("not an override", got=text, do="Write dotted.key=value.")
    below: Origins = {}
    tree = _parse(raw, f"override {key}", below, got=raw)
    for part in reversed(key.split(".")):
        tree = {part: tree}
    return tree, dict.fromkeys([key, *(f"{key}.{name}" for name in below)], "command line")


def _parse(text: str, place: str, origins: Origins, got: str | None = None) -> Any:
    """Return the plain value of a YAML text, noting the line of every key in `origins`."""
    import yaml

    try:
        node = yaml.compose(text, Loader=_yaml_loader())
        return None if node is None else _construct(node, place, "", origins)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"is not YAML: {error}", where=place, got=got) from error


def _layers(path: str | Path | None, overrides: Iterable[str], hints: Sequence[Any]) -> tuple[Tree, Origins]:
    tree: Tree = {}
    origins: Origins = {}
    if path is not None:
        tree, origins = _read(Path(path), (), hints)
    given: Tree = {}  # one layer, so that `optim.lr=1 optim.kind=muon` means the same in either order
    given_origins: Origins = {}
    for override in overrides:
        merge(given, given_origins, *_parse_override(override))
    merge(tree, origins, given, given_origins, hints)
    return tree, origins


def _read(path: Path, seen: tuple[Path, ...], hints: Sequence[Any]) -> tuple[Tree, Origins]:
    """Read one file and the bases under it."""
    if path.resolve() in seen:
        raise ConfigError("a recipe cannot be its own base", where=path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError("no such recipe", where=path) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot be read: {error}", where=path) from error
    origins: Origins = {}
    own = _parse(text, str(path), origins)
    own = {} if own is None else own
    if not isinstance(own, dict):
        raise ConfigError("a recipe is a mapping of keys to values", where=path, got=own)
    bases = own.pop("base", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not (isinstance(bases, list) and all(isinstance(base, str) for base in bases)):
        raise ConfigError("is a path or a list of paths", where=origins.get("base", path), got=bases)
    tree: Tree = {}
    merged: Origins = {}
    for base in bases:
        merge(tree, merged, *_read(path.parent / base, (*seen, path.resolve()), hints), hints)
    merge(tree, merged, own, origins, hints)
    return tree, merged


@functools.cache
def _yaml_loader() -> Any:
    """Return YAML's safe loader with the scalars of YAML 1.2.

    `3e-4` is a number, `off` a word; `007`, `12:30`, `1_000` and `2024-01-01` stay text: a path may look like them.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    Loader.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag.rpartition(":")[2] not in (*_SCALARS, "timestamp")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    for tag, pattern in _SCALARS.items():
        Loader.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", pattern, None)
    return Loader


def _construct(node: Any, file: str, prefix: str, origins: Origins) -> Any:
    """Return the plain value of a YAML node, noting the line of every key."""
    import yaml

    if isinstance(node, yaml.MappingNode):
        tree: Tree = {}
        for key_node, value_node in node.value:
            key, line = str(key_node.value), key_node.start_mark.line + 1
            if key in tree:
                raise ConfigError("the key stands twice", where=f"{file}:{line}", got=prefix + key)
            origins[prefix + key] = f"{file}:{line}"
            tree[key] = _construct(value_node, file, f"{prefix}{key}.", origins)
        return tree
    if isinstance(node, yaml.SequenceNode):
        return [_construct(item, file, f"{prefix}{i}.", origins) for i, item in enumerate(node.value)]
    return yaml.constructor.SafeConstructor().construct_object(node)


def _placed(path: str, origins: Origins) -> str:
    """Return a path with what gave its value, where that is known."""
    return f"{path} ({origins[path]})" if path in origins else path


def _explain_problem(schema: type, problem: dict[str, Any], origins: Origins, elsewhere: Mapping[str, str]) -> str:
    """Return one line for one pydantic error."""
    loc, kind = [str(part) for part in problem["loc"]], problem["type"]
    known, path = _fields_at(schema, loc)
    place = _placed(path, origins)
    if kind == "unexpected_keyword_argument":
        name = loc[-1]
        advice = elsewhere.get(name) or did_you_mean(name, known) or "Allowed here: " + ", ".join(known)
        return f"{place}: unknown key {name!r}. {advice}"
    if kind == "missing":
        return f"{path}: is required and was not given"
    message, got = problem["msg"], repr(problem.get("input"))
    return f"{place}: {message[0].lower() + message[1:]} (got {got if len(got) < 80 else got[:77] + '...'})"


def _fields_at(schema: Any, loc: list[str]) -> tuple[list[str], str]:
    """Return the field names known at the parent of an error's location, and its path in the recipe.

    Pydantic puts the tag of a union's chosen variant into the location.
    """
    path: list[str] = []
    hints = _variants(schema)
    for part in loc[:-1]:
        tagged = [hint for hint in hints if dataclasses.is_dataclass(hint) and _tag(hint) == part]
        if tagged and len(hints) > 1:
            hints = tagged
            continue
        following = _below(hints, part)
        if following or not path:
            path.append(part)
            hints = following or hints
    known = [f.name for hint in hints if dataclasses.is_dataclass(hint) for f in dataclasses.fields(hint)]
    return known, ".".join([*path, *loc[-1:]])


def _misread(hints: Sequence[Any], value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Yield (place, complaint) where pydantic would take true as 1, or the number 1.10 as the text "1.1"."""
    if isinstance(value, bool):
        if bool not in hints and (int in hints or float in hints):
            yield path, "should be a number (got true or false)"
    elif isinstance(value, float):
        if str in hints and float not in hints:
            yield path, f"should be text: put it in quotes (got the number {value})"
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _misread(_below(hints, key), item, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _misread(_below(hints, ""), item, path)


def _below(hints: Sequence[Any], key: str) -> list[Any]:
    """Return what may stand under a key of these, or in a list of them."""
    found: list[Any] = []
    for hint in hints:
        origin, inner = typing.get_origin(hint), typing.get_args(hint)
        if dataclasses.is_dataclass(hint):
            fields = typing.get_type_hints(hint, include_extras=True)
            found += _variants(fields[key]) if key in fields else []
        elif origin in (dict, Mapping):
            found += _variants(inner[1])
        elif origin in (list, tuple):
            found += _variants(inner[0])
    return found


def _variants(hint: Any) -> list[Any]:
    """Return the members of a union, through `Annotated`; anything else stands for itself."""
    origin = typing.get_origin(hint)
    if origin is typing.Annotated:
        return _variants(typing.get_args(hint)[0])
    if origin in (typing.Union, types.UnionType):
        return [v for member in typing.get_args(hint) if member is not type(None) for v in _variants(member)]
    return [hint]


def _tag(cls: Any) -> str | None:
    hint = typing.get_type_hints(cls).get("kind")
    values = typing.get_args(hint)
    return str(values[0]) if values else None


def _forget(origins: Origins, path: str) -> None:
    for key in [k for k in origins if k == path or k.startswith(path + ".")]:
        del origins[key]
