"""The plot of a run. Needs matplotlib (extra `plot`)."""

from __future__ import annotations

import importlib.util
import logging
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from internlm import disk
from internlm.errors import install_command
from internlm.log import warn_once

logger = logging.getLogger(__name__)


def loss_curve(lines: Iterable[Mapping[str, Any]], path: Path, title: str) -> Path | None:
    """Draw losses and learning rate over tokens seen, from the lines of `metrics.jsonl`.

    Return the path, or None when there is nothing to draw or matplotlib is missing, which is said once.
    """
    if importlib.util.find_spec("matplotlib") is None:
        warn_once(logger, f"no plot {path}: matplotlib is missing ({install_command('plot')})")
        return None
    lines = list(lines)
    if len(_series(lines, "train/loss")[0]) < 2:
        return None
    import matplotlib as mpl

    mpl.use("Agg")
    with mpl.rc_context({"text.parse_math": False}):  # a folder or a source may have a $ in its name
        _draw(lines, path, title)
    return path


def _draw(lines: list[Mapping[str, Any]], path: Path, title: str) -> None:
    from matplotlib import pyplot, ticker

    train = _series(lines, "train/loss")
    figure, axes = pyplot.subplots(figsize=(8, 4.5), dpi=120)
    axes.plot(*train, color="#9db8d9", linewidth=1, label="train")
    axes.plot(train[0], _smooth(train[1]), color="#1f5fa8", linewidth=2, label="train, smoothed")
    axes.set_prop_cycle(color=["#d1622b", "#3a8f4d", "#8a4fa3", "#b08d1e"])
    axes.xaxis.set_major_formatter(ticker.EngFormatter())
    for name in sorted({key for line in lines for key in line if key.startswith("valid/loss/")}):
        label = name.removeprefix("valid/loss/") + " (validation)"
        axes.plot(*_series(lines, name), marker="o", markersize=4, label=label)
    axes.set(xlabel="tokens", ylabel="loss, nats per token", title=title)
    low, high = min(train[1]), max(train[1][min(len(train[1]) - 1, max(1, len(train[1]) // 50)) :])
    if high > low:
        axes.set_ylim(low - 0.05 * (high - low), high + 0.1 * (high - low))
    axes.grid(alpha=0.3)
    rate = axes.twinx()
    rate.plot(*_series(lines, "optim/lr"), color="#b0b0b0", linestyle=":", linewidth=1)
    rate.set_ylabel("learning rate", color="#808080")
    axes.legend(frameon=False)
    figure.tight_layout()
    with disk.beside(path) as draft:
        figure.savefig(draft, format=path.suffix.removeprefix("."))
    pyplot.close(figure)


def _series(lines: list[Mapping[str, Any]], name: str) -> tuple[list[float], list[float]]:
    """Return (tokens, values) of a metric, leaving out what is not finite."""
    values = [(line["progress/tokens"], line.get(name)) for line in lines]
    points = [(x, y) for x, y in values if y is not None and math.isfinite(y)]
    return [x for x, _ in points], [y for _, y in points]


def _smooth(values: list[float]) -> list[float]:
    """Return the running average over about a 25th of the points, with bias correction (as Adam's)."""
    share = 1 - 1 / max(2.0, len(values) / 25)
    average, weight, smooth = 0.0, 0.0, []
    for value in values:
        average = share * average + (1 - share) * value
        weight = share * weight + (1 - share)
        smooth.append(average / weight)
    return smooth
