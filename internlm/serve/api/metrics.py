"""What the server counts, in the text format that Prometheus reads.

metrics.first_token.observe(0.12)
metrics.text(worker)            # "# HELP internlm:time_to_first_token_seconds …"
"""

from __future__ import annotations

import bisect
import itertools
from collections import Counter
from collections.abc import Sequence

from internlm.infer.worker import Worker

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5)


class Histogram:
    """How often values fell under each of some bounds."""

    def __init__(self, name: str, about: str, bounds: Sequence[float]) -> None:
        self.name, self.about, self.bounds = name, about, tuple(bounds)
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        """Count a value."""
        self.counts[bisect.bisect_left(self.bounds, value)] += 1
        self.sum += value

    def lines(self) -> list[str]:
        """Return the histogram as text."""
        sums = list(itertools.accumulate(self.counts))
        names = [*(f"{bound:g}" for bound in self.bounds), "+Inf"]
        buckets = [f'{self.name}_bucket{{le="{name}"}} {sum_}' for name, sum_ in zip(names, sums, strict=True)]
        return [*_head(self.name, "histogram", self.about), *buckets, f"{self.name}_sum {self.sum:.6f}",
                f"{self.name}_count {sums[-1]}"]  # fmt: skip


class Metrics:
    """Everything that is counted outside the engine."""

    def __init__(self) -> None:
        self.first_token = Histogram(
            "internlm:time_to_first_token_seconds", "From the request to its first token.", _SECONDS
        )
        self.per_token = Histogram(
            "internlm:time_per_output_token_seconds", "Between two tokens of an answer.", _TOKEN_SECONDS
        )
        self.total = Histogram("internlm:e2e_request_latency_seconds", "From the request to its end.", _SECONDS)
        self.queue = Histogram("internlm:request_queue_time_seconds", "Before the first step.", _SECONDS)
        self.ended: Counter[str] = Counter()
        self.errors: Counter[int] = Counter()
        """Failed responses by status; 500 counts answers that failed in the midst of a stream too."""

    def text(self, worker: Worker) -> str:
        """Return all figures as Prometheus reads them."""
        stats, health = worker.stats, worker.health
        counters = stats.counters
        lines: list[str] = []
        for name, kind, about, value in (
            ("num_requests_running", "gauge", "Answers being written.", stats.running),
            ("num_requests_waiting", "gauge", "Answers not begun.", stats.waiting),
            ("cache_blocks", "gauge", "Blocks of the cache.", stats.blocks),
            ("cache_blocks_used", "gauge", "Blocks that answers under way hold.", stats.blocks_used),
            ("kv_cache_usage_ratio", "gauge", "Share of the blocks in use.", stats.blocks_used / max(stats.blocks, 1)),
            ("healthy", "gauge", "Whether the engine works.", int(health.is_good)),
            ("prompt_tokens_total", "counter", "Tokens of prompts.", counters.prompt_tokens),
            ("cached_tokens_total", "counter", "Of them, those found in the cache.", counters.cached_tokens),
            ("generation_tokens_total", "counter", "Tokens written.", counters.written_tokens),
            ("steps_total", "counter", "Steps of the engine.", counters.steps),
            ("preemptions_total", "counter", "Answers that lost their place for a time.", counters.preemptions),
            ("failed_steps_total", "counter", "Steps that were taken back.", counters.failed_steps),
            ("aborts_total", "counter", "Answers that were aborted.", self.ended["abort"]),
        ):
            lines += [*_head(f"internlm:{name}", kind, about), f"internlm:{name} {value}"]
        for name, label, about, counts in (
            ("answers_total", "finished", "Answers by why they ended.", self.ended),
            ("http_errors_total", "code", "Failed responses by status.", self.errors),
        ):
            lines += _head(f"internlm:{name}", "counter", about)
            lines += [f'internlm:{name}{{{label}="{key}"}} {count}' for key, count in sorted(counts.items())]
        for histogram in (self.first_token, self.per_token, self.total, self.queue):
            lines += histogram.lines()
        return "\n".join(lines) + "\n"


def _head(name: str, kind: str, about: str) -> list[str]:
    return [f"# HELP {name} {about}", f"# TYPE {name} {kind}"]
