"""The plot of `gpu_train.py`: where the time of a step goes, a bar per contender."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

COLORS = {
    "matmul": "#1f5fa8", "attention": "#d1622b", "norms and elementwise": "#3a8f4d", "copies and casts": "#b08d1e",
    "optimizer": "#8a4fa3", "communication": "#9db8d9", "compiled": "#c7889f", "other": "#808080", "gaps": "#dddddd",
}  # fmt: skip


def bars(facts: dict[str, Any], path: Path) -> Path | None:
    """Draw the groups below each other; return the path, or None when matplotlib or the figures are missing."""
    groups = [group for group in facts["groups"] if any("step_ms" in row for row in group["rows"])]
    if not groups or importlib.util.find_spec("matplotlib") is None:
        return None
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    rows = [sum("step_ms" in row for row in group["rows"]) for group in groups]
    figure, all_axes = pyplot.subplots(
        len(groups), figsize=(9, 1.4 * len(groups) + 0.45 * sum(rows)), dpi=120, squeeze=False, height_ratios=rows
    )
    for axes, group in zip(all_axes[:, 0], groups, strict=True):
        _draw(axes, group)
    all_axes[-1, 0].set_xlabel("milliseconds a step")
    labelled = [pair for axes in all_axes[:, 0] for pair in zip(*axes.get_legend_handles_labels(), strict=True)]
    handles = {label: handle for handle, label in labelled}
    figure.legend(handles.values(), handles.keys(), frameon=False, ncols=4, loc="lower center", fontsize=8)
    figure.suptitle(facts["device"]["name"], fontsize=10)
    figure.tight_layout(rect=(0, 0.9 / figure.get_figheight(), 1, 1))
    figure.savefig(path)
    pyplot.close(figure)
    return path


def _draw(axes: Any, group: dict[str, Any]) -> None:
    done = [row for row in group["rows"] if "step_ms" in row][::-1]
    places = range(len(done))
    left = [0.0] * len(done)
    for name, color in COLORS.items():
        widths = [row["gap_ms"] if name == "gaps" else row["breakdown"]["ms"].get(name, 0.0) for row in done]
        if any(widths):
            axes.barh(places, widths, left=left, color=color, label=name)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for place, row in zip(places, done, strict=True):
        mfu = "" if row["mfu"] is None else f", MFU {row['mfu']:.0%}"
        axes.text(left[place], place, f" {row['tokens_per_s']:.0f} tokens/s{mfu}", va="center", fontsize=7)
    axes.set_yticks(list(places), [row["name"] for row in done], fontsize=8)
    axes.set_xlim(0, 1.35 * max(left))
    case = group["case"]
    title = f"{case['preset']}, {group['layers']} blocks, {case['micro_rows']} × {case['seq_len']} tokens"
    axes.set_title(f"{title}, recompute {case['recompute']}", fontsize=8, loc="left")
