"""From timelines to figures. Times are milliseconds where a name ends with _ms, seconds with _s."""

import collections
import math
from collections.abc import Iterable
from typing import Any

from jaxserve.bench.timeline import Timeline

PERCENTILES = (50, 90, 99)


def summarize(timelines: list[Timeline], *, is_streamed: bool) -> dict[str, Any]:
    """Everything that the timelines tell. Failed requests are counted and otherwise left out.

    Args:
      is_streamed: events came as tokens did; else there is one event, at the end, and nothing can
        be said of the times in between.
    """
    complete = [timeline for timeline in timelines if timeline.is_complete]
    metrics = _counts(timelines, complete) | _rates(complete)
    metrics["latency_ms"] = distribution(timeline.latency for timeline in complete)
    if is_streamed:
        metrics["ttft_ms"] = distribution(timeline.time_to_first_token for timeline in complete)
        metrics["tpot_ms"] = distribution(
            timeline.time_per_output_token
            for timeline in complete
            if timeline.time_per_output_token is not None
        )
        metrics["itl_ms"] = distribution(
            gap for timeline in complete for gap in timeline.inter_token_latencies
        )
    metrics["send_delay_ms"] = distribution(
        timeline.sent - timeline.due for timeline in timelines if timeline.sent
    )
    return metrics


def _counts(timelines: list[Timeline], complete: list[Timeline]) -> dict[str, Any]:
    errors = collections.Counter(
        timeline.error or "no token came" for timeline in timelines if not timeline.is_complete
    )
    return {
        "num_requests": len(timelines),
        "num_succeeded": len(complete),
        "num_failed": len(timelines) - len(complete),
        "num_shorter_than_asked": sum(
            timeline.num_tokens < timeline.asked_tokens for timeline in complete
        ),
        "errors": [{"message": text, "count": count} for text, count in errors.most_common()],
        "input_tokens": sum(timeline.prompt_tokens for timeline in complete),
        "cached_tokens": sum(timeline.cached_tokens for timeline in complete),
        "output_tokens": sum(timeline.num_tokens for timeline in complete),
    }


def _rates(complete: list[Timeline]) -> dict[str, float | None]:
    """Per second from the first sending to the last token."""
    seconds = max((timeline.finished for timeline in complete), default=0.0)
    seconds -= min((timeline.sent for timeline in complete), default=0.0)
    prompt_tokens = sum(timeline.prompt_tokens for timeline in complete)
    output_tokens = sum(timeline.num_tokens for timeline in complete)
    totals = {
        "requests_per_s": len(complete),
        "input_tokens_per_s": prompt_tokens,
        "output_tokens_per_s": output_tokens,
        "total_tokens_per_s": prompt_tokens + output_tokens,
        "mean_concurrency": sum(timeline.latency for timeline in complete),
    }
    rates = {name: total / seconds if seconds else None for name, total in totals.items()}
    return {"duration_s": seconds, **rates}


def distribution(seconds: Iterable[float]) -> dict[str, float] | None:
    """Mean and percentiles, in milliseconds; None of nothing."""
    ordered = sorted(second * 1e3 for second in seconds)
    if not ordered:
        return None
    mean = math.fsum(ordered) / len(ordered)
    return {"mean": mean} | {f"p{share}": percentile(ordered, share) for share in PERCENTILES}


def percentile(ordered: list[float], share: float) -> float:
    """Between the two values around the rank, as far along as the rank is; `share` is 0 to 100."""
    rank = (len(ordered) - 1) * share / 100
    low = math.floor(rank)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (rank - low)
