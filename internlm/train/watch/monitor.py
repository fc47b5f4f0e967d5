"""What the files of a run say about it: for `internlm monitor`, while it runs and afterwards.

    watch = Monitor(run)
    watch.look()                     # reads what is new; as often as wanted
    watch.facts()                    # plain values, as --json prints them
    lines(watch.facts(), width=80)   # as the terminal shows them

Every file may be missing, damaged, or written at this moment: what cannot be read is left out, and a line of metrics
that is not complete is read with the next look.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import math
import os
import statistics
import time
import unicodedata
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from internlm.checkpoint import listing
from internlm.errors import StorageError
from internlm.log import duration, quantity, size
from internlm.train.watch import goodput

WARNINGS = "warnings.jsonl"
_MOST_BYTES = 2**20
"""Of the file of warnings; then it is moved aside and a new one begun."""
_HELD = 240
"""Values of a metric that are kept for its curve."""
_SURVEY_EVERY_S = 10.0
_HEARTBEAT_S = 5.0
"""Between two signs of life, where the recipe does not say."""
_PACES = 10
_SEEN = 200
"""Bytes by which a file is known again; the last line of metrics holds the time of its step."""
BLOCKS = "▁▂▃▄▅▆▇█"
_CURVES = ("train/loss", "optim/grad_norm", "optim/lr", "perf/tokens_per_s_per_device")


class _Writer(logging.Handler):
    """Appends warnings to a file of the run, and never harms it."""

    def __init__(self, path: Path) -> None:
        super().__init__(logging.WARNING)
        self.path = path

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(OSError, TypeError, ValueError):
            self.note(record.getMessage(), record.created)

    def note(self, text: str, when: float) -> None:
        if self.path.exists() and self.path.stat().st_size > _MOST_BYTES:
            os.replace(self.path, self.path.with_name(f"{self.path.name}.old"))
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"time": round(when, 3), "text": text}) + "\n")


@contextlib.contextmanager
def noted(run: Path | None) -> Iterator[None]:
    """Keep the warnings of the block, and the error that ends it, in RUN/warnings.jsonl; None: another rank does."""
    if run is None:
        yield
        return
    writer = _Writer(run / WARNINGS)
    logger = logging.getLogger("internlm")
    logger.addHandler(writer)
    try:
        yield
    except Exception as error:
        with contextlib.suppress(OSError):
            writer.note(f"ended: {type(error).__name__}: {str(error).strip()}", time.time())
        raise
    finally:
        logger.removeHandler(writer)


class Lines:
    """The lines of a JSONL file that grows, or is replaced by another."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._at = 0
        self._seen = b""
        """What stands before that place: where it is something else, so is the file."""

    def new(self) -> tuple[bool, list[dict[str, Any]]]:
        """Return whether the file is another than at the last call, and the complete lines that came since."""
        try:
            with open(self.path, "rb") as file:
                file.seek(self._at - len(self._seen))
                text = file.read()
                is_other = not text.startswith(self._seen)
                if is_other:
                    file.seek(0)
                    text, self._at, self._seen = file.read(), 0, b""
        except OSError:
            return False, []
        text = text[len(self._seen) :]
        end = text.rfind(b"\n") + 1
        self._at += end
        self._seen = (self._seen + text[:end])[-_SEEN:]
        found = []
        for line in text[:end].splitlines():
            with contextlib.suppress(ValueError):
                value = json.loads(line)
                if isinstance(value, dict):
                    found.append(value)
        return is_other, found


class Monitor:
    """What is known about a run, by its folder.

    Raises:
        StorageError: there is none, or it holds no run.
    """

    def __init__(self, run: Path) -> None:
        self.run = run
        if not run.is_dir():
            raise StorageError("no such folder", where=run)
        if not any((run / name).exists() for name in ("recipe.yaml", "metrics.jsonl", "checkpoints", "alive")):
            raise StorageError("holds no run", where=run, do="Give the folder that `run` names in the recipe.")
        self._metrics, self._warnings = Lines(run / "metrics.jsonl"), Lines(run / WARNINGS)
        self._surveyed = -math.inf
        self._checkpoints: list[dict[str, Any]] = []
        self.warnings: deque[dict[str, Any]] = deque(maxlen=5)
        self._forget()

    def _forget(self) -> None:
        self.last: dict[str, float] = {}
        """The last value of each metric."""
        self.step = 0
        self.curves: dict[str, deque[float]] = {}
        self.best: dict[str, tuple[float, int]] = {}
        """Lowest value of each loss, and at which step."""
        self.paces: deque[float] = deque(maxlen=_PACES)

    def look(self) -> None:
        """Read what is new."""
        is_other, lines = self._metrics.new()
        if is_other:
            self._forget()
        for line in lines:
            self._take(line)
        is_other, lines = self._warnings.new()
        if is_other:
            self.warnings.clear()
        self.warnings += [
            {"time": line["time"], "text": line["text"]}
            for line in lines
            if isinstance(line.get("text"), str) and _is_number(line.get("time"))
        ]
        if time.monotonic() - self._surveyed > _SURVEY_EVERY_S:
            # one that is being removed, or is no checkpoint of ours, may fail in many ways: the list before stays
            with contextlib.suppress(OSError, StorageError, ValueError, KeyError, TypeError, AttributeError):
                self._checkpoints = [_checkpoint(one) for one in listing.survey(self.run)]
            self._surveyed = time.monotonic()

    def _take(self, line: dict[str, Any]) -> None:
        step = line.pop("step", None)
        if not isinstance(step, int):
            return
        self.step = max(self.step, step)
        for name, value in line.items():
            if value is None:  # not a number then: what was one before is no longer true
                self.last.pop(name, None)
            if not _is_number(value):
                continue
            self.last[name] = value
            if name in _CURVES or name.startswith("valid/loss/"):
                self.curves.setdefault(name, deque(maxlen=_HELD)).append(value)
                if value < self.best.get(name, (math.inf, 0))[0]:
                    self.best[name] = value, step
        if _is_number(line.get("perf/step_s")):
            self.paces.append(line["perf/step_s"])

    def facts(self) -> dict[str, Any]:
        """Return all that is known, as plain values that JSON takes."""
        now = time.time()
        total, heartbeat_s = _plan(self.run / "recipe.yaml")
        members = _ranks(self.run, now)
        step = max([self.step, *(one["step"] for one in members)])
        silent_after_s = 4 * heartbeat_s + 10
        state = _state(members, step, total, silent_after_s, self._age(now))
        left = (total - step) * statistics.median(self.paces) if total and self.paces else None
        spent = goodput.read(self.run / goodput.FILE) or {"seconds": {}, "starts": None}
        wall = sum(spent["seconds"].values())
        return {
            "run": str(self.run),
            "time": now,
            "state": state,
            "step": step,
            "steps": total,
            "eta_s": left if state == "running" else None,
            "metrics": self.last,
            "best": {name: {"value": value, "step": at} for name, (value, at) in self.best.items()},
            "curves": {name: list(values) for name, values in self.curves.items()},
            "goodput": {name: seconds / wall for name, seconds in spent["seconds"].items()} if wall else None,
            "wall_s": wall or None,
            "starts": spent["starts"],
            "checkpoints": self._checkpoints,
            "ranks": members,
            "silent_after_s": silent_after_s,
            "warnings": list(self.warnings),
        }

    def _age(self, now: float) -> float | None:
        with contextlib.suppress(OSError):
            return max(0.0, now - (self.run / "metrics.jsonl").stat().st_mtime)
        return None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _plan(path: Path) -> tuple[int | None, float]:
    """Return the steps of a run and the seconds between two signs of life, as its recipe says."""
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
        total = -(-int(recipe["train"]["tokens"]) // int(recipe["train"]["batch_tokens"]))
        return total, float(recipe.get("watch", {}).get("heartbeat_s", _HEARTBEAT_S))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError, yaml.YAMLError):
        return None, _HEARTBEAT_S


def _ranks(run: Path, now: float) -> list[dict[str, Any]]:
    found = []
    for path in sorted((run / "alive").glob("rank-*.json")):
        try:
            beat = json.loads(path.read_text(encoding="utf-8"))
            # clocks of hosts differ, and so may that of the file system: the younger counts
            age = max(0.0, min(now - float(beat["time"]), now - path.stat().st_mtime))
            one = {"rank": int(path.stem.rpartition("-")[2]), "step": int(beat["step"]), "age_s": age}
            found.append(one | {name: str(beat.get(name, "?")) for name in ("phase", "host")})
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
    return sorted(found, key=lambda one: one["rank"])


def _state(members: list[dict[str, Any]], step: int, total: int | None, limit_s: float, age_s: float | None) -> str:
    """Return `running`, `done`, `stopped`, `failed`, `stalled`, `silent` (it gives no sign) or `unknown`."""
    if members:
        phases = {one["phase"] for one in members}
        for over in ("failed", "stalled", "stopped"):
            if over in phases:
                return over
        if phases == {"done"}:
            return "done"
        return "running" if min(one["age_s"] for one in members) < limit_s else "silent"
    if total is not None and step >= total:
        return "done"
    if age_s is None:
        return "unknown"
    return "running" if age_s < 10 * limit_s else "silent"


def _checkpoint(found: listing.Found) -> dict[str, Any]:
    metrics = found.meta.get("metrics", {})
    loss = metrics.get("train/loss") if isinstance(metrics, dict) else None
    loss = loss if _is_number(loss) else None
    return {"step": found.step, "bytes": found.bytes, "problem": found.problem, "loss": loss}


def lines(facts: dict[str, Any], width: int = 80, blocks: str = BLOCKS) -> list[tuple[str, str]]:
    """Return (colour, text) of each line of a dashboard; the colour is a word, or "" for none.

    `blocks` are what bars and curves are drawn with, lowest first.
    """
    state, step, total = facts["state"], facts["step"], facts["steps"]
    colour = {"running": "green", "done": "green", "unknown": "", "stopped": "yellow"}.get(state, "red")
    starts = f" · start {facts['starts']}" if (facts["starts"] or 1) > 1 else ""
    clock = time.strftime("%H:%M:%S", time.localtime(facts["time"]))
    head = f"{state} · step {step}/{total or '?'}{starts} · {clock} · "
    place, room = facts["run"], max(8, width - len(head))
    shown = [(colour, head + (place if len(place) <= room else "…" + place[1 - room :]))]
    if total:
        share = min(1.0, step / total)
        eta = f"eta {duration(facts['eta_s'])}" if facts["eta_s"] is not None else ""
        room = max(10, width - 22)
        full = round(share * room)
        shown.append((colour, f"{blocks[-1] * full}{'·' * (room - full)} {share:6.1%} {eta}"))
    shown += _numbers(facts, width, blocks)
    shown += _validations(facts, width, blocks)
    shown += _saved(facts)
    shown += _members(facts)
    trouble = ("skipped_steps", "spikes", "rollbacks")
    counts = {name.replace("_", " "): int(facts["metrics"].get(f"optim/{name}", 0)) for name in trouble}
    if any(counts.values()):
        text = " · ".join(f"{name} {count}" for name, count in counts.items())
        shown.append(_line("trouble", text, "yellow"))
    for warning in facts["warnings"]:
        when = time.strftime("%m-%d %H:%M", time.localtime(warning["time"]))
        shown.append(("yellow", f"{when} {warning['text'].removeprefix('warning: ')}"))
    return [(colour, clip(text, width)) for colour, text in shown]


def _line(title: str, text: str, colour: str = "") -> tuple[str, str]:
    return colour, f"{title:10}{text}"


_SPEED: dict[str, Callable[[float], str]] = {
    "perf/tokens_per_s_per_device": lambda value: f"{quantity(value)} tok/s/device",
    "perf/mfu": "mfu {:.1%}".format,
    "perf/step_s": "step {:.3g}s".format,
    "perf/data_wait_s": "data {:.3g}s".format,
    "perf/comm_wait_s": "comm wait {:.3g}s".format,
    "mem/peak_gib": "mem {:.1f} GiB".format,
}


def _numbers(facts: dict[str, Any], width: int, blocks: str) -> Iterator[tuple[str, str]]:
    last = facts["metrics"]
    if not last:
        yield "", "no metrics yet"
        return
    room = max(10, min(60, width - 22))
    figures = (("loss", "train/loss", ".4f"), ("grad", "optim/grad_norm", ".3g"), ("lr", "optim/lr", ".2e"))
    for title, name, form in figures:
        if name in last:
            curve = spark(facts["curves"].get(name, []), room, blocks)
            yield _line(title, f"{format(last[name], form):10} {curve}")
    if speed := [show(last[name]) for name, show in _SPEED.items() if name in last]:
        yield _line("speed", " · ".join(speed))
    if "progress/tokens" in last:
        best = facts["best"].get("train/loss")
        lowest = f" · lowest loss {best['value']:.4f} at step {best['step']}" if best else ""
        yield _line("tokens", quantity(last["progress/tokens"]) + lowest)
    if facts["goodput"]:
        yield _line("goodput", goodput.sentence(facts["goodput"], facts["wall_s"]).removeprefix("goodput "))


def _validations(facts: dict[str, Any], width: int, blocks: str) -> Iterator[tuple[str, str]]:
    for name, value in sorted(facts["metrics"].items()):
        if not name.startswith("valid/loss/"):
            continue
        source = name.removeprefix("valid/loss/")
        bits = facts["metrics"].get(f"valid/bits_per_byte/{source}")
        best = facts["best"][name]
        more = f" · {bits:.4f} bits per byte" if bits is not None else ""
        text = f"{source} {value:.4f}{more} · lowest {best['value']:.4f} at step {best['step']} "
        curve = spark(facts["curves"].get(name, []), max(4, width - 10 - len(text)), blocks)
        yield _line("held out", text + curve)


def _saved(facts: dict[str, Any]) -> Iterator[tuple[str, str]]:
    if not facts["checkpoints"]:
        yield _line("saved", "no checkpoint yet")
    for one in facts["checkpoints"][-4:]:
        loss = f" · loss {one['loss']:.4f}" if one["loss"] is not None else ""
        text = f"step {one['step']} · {size(one['bytes'])}{loss} · {one['problem'] or 'complete'}"
        yield _line("saved", text, "red" if one["problem"] else "")


def _members(facts: dict[str, Any]) -> Iterator[tuple[str, str]]:
    members = facts["ranks"]
    if not members:
        return
    over = ("done", "stopped", "failed", "stalled")
    silent = [one for one in members if one["age_s"] > facts["silent_after_s"] and one["phase"] not in over]
    phases = sorted({one["phase"] for one in members})
    text = f"{len(members) - len(silent)} of {len(members)} heard of · {', '.join(phases)}"
    ratio = facts["metrics"].get("ranks/slowest_ratio")
    if ratio is not None:
        text += f" · slowest rank {int(facts['metrics'].get('ranks/slowest_rank', 0))}: {ratio:.2f} × the median"
    yield _line("ranks", text, "red" if silent else "")
    for one in silent[:4]:
        what = f"silent for {duration(one['age_s'])}, in {one['phase']} after step {one['step']}"
        yield _line("", f"rank {one['rank']} on {one['host']} {what}", "red")
    if len(silent) > 4:
        yield _line("", f"and {len(silent) - 4} more", "red")


def spark(values: list[float], room: int, blocks: str = BLOCKS) -> str:
    """Return a curve of at most so many characters; neighbours share one as their mean."""
    if not values:
        return ""
    count = min(room, len(values))
    edges = [round(i * len(values) / count) for i in range(count + 1)]
    means = [statistics.fmean(values[a:b]) for a, b in itertools.pairwise(edges)]
    low, high = min(means), max(means)
    scale = (len(blocks) - 1) / (high - low) if high > low else 0.0
    return "".join(blocks[round((mean - low) * scale)] for mean in means)


def clip(text: str, width: int) -> str:
    """Return a text of one line that takes at most so many columns, without what would move a terminal's cursor."""
    shown: list[str] = []
    used = 0
    for letter in text:
        if unicodedata.category(letter)[0] == "C":
            letter = " "
        used += 2 if unicodedata.east_asian_width(letter) in "WF" else 1
        if used > width:
            return "".join(shown[:-1]) + "…"
        shown.append(letter)
    return "".join(shown)
