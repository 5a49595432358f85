"""`jaxserve bench plot`: results as a figure."""

import math
from typing import Any

from jaxserve.bench.report import title

LATENCIES = ("itl_ms.p50", "decode_ms_per_step", "latency_ms.p50")
THROUGHPUTS = ("output_tokens_per_s", "decode_tokens_per_s")
BARS = (
    "output_tokens_per_s",
    "output_tokens_per_cpu_s",
    "ttft_ms.p50",
    "ttft_ms.p99",
    "itl_ms.p50",
    "itl_ms.p99",
    "latency_ms.p50",
    "prefill_ms",
    "decode_ms_per_step",
)


def draw(records: list[dict[str, Any]], path: str, metrics: tuple[str, ...] = ()) -> None:
    """Writes the figure; the suffix of `path` says the format. Raises as `make_figure` does, and
    ValueError for a suffix that is no format."""
    make_figure(records, metrics).savefig(path)


def make_figure(records: list[dict[str, Any]], metrics: tuple[str, ...] = ()):
    """Throughput against latency, a line per label; and bars of each metric, a bar per run.

    Args:
      metrics: names with dots for what is nested; by default those of `BARS` that are there.

    Raises:
      ValueError: no record has a metric that is asked for.
      ModuleNotFoundError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure  # an extra; and no pyplot: no display is needed

    runs = [(record["label"], run) for record in records for run in record["runs"]]
    names = [name for name in metrics or BARS if any(value_of(run, name) for _, run in runs)]
    if missing := set(metrics) - set(names):
        raise ValueError(f"--metric {sorted(missing)[0]}: no result has it")
    columns = 3
    rows = 1 + math.ceil(len(names) / columns)
    figure = Figure(figsize=(15, 4.2 * rows), layout="constrained")
    grid = figure.add_gridspec(rows, columns)
    _plot_lines(figure.add_subplot(grid[0, :]), runs)
    for index, name in enumerate(names):
        place = grid[1 + index // columns, index % columns]
        _plot_bars(figure.add_subplot(place), runs, name)
    return figure


def value_of(run: dict[str, Any], name: str) -> float | None:
    """`ttft_ms.p50` of a run's metrics; None where it is not a number there."""
    value: Any = run["metrics"]
    for key in name.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value if isinstance(value, int | float) else None


def _plot_lines(axes, runs: list[tuple[str, dict[str, Any]]]) -> None:
    """Of the latencies and the throughputs, those that most runs have."""
    x, y = _most_common(LATENCIES, runs), _most_common(THROUGHPUTS, runs)
    axes.set(xlabel=x, ylabel=y, title="Throughput against latency")
    points: dict[str, list[tuple[float, float, str]]] = {}
    for label, run in runs:
        latency, throughput = value_of(run, x), value_of(run, y)
        if latency is not None and throughput is not None:
            point = (latency, throughput, title(run["parameters"]))
            points.setdefault(label, []).append(point)
    for label, line in points.items():
        latencies, throughputs, texts = zip(*sorted(line), strict=True)
        axes.plot(latencies, throughputs, marker="o", label=label)
        for latency, throughput, text in zip(latencies, throughputs, texts, strict=True):
            offset = {"xytext": (4, 4), "textcoords": "offset points", "fontsize": 7}
            axes.annotate(text, (latency, throughput), **offset)
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    if points:
        axes.legend()


def _most_common(names: tuple[str, ...], runs: list[tuple[str, dict[str, Any]]]) -> str:
    """The first of those that the most runs have."""
    return max(names, key=lambda name: sum(value_of(run, name) is not None for _, run in runs))


def _plot_bars(axes, runs: list[tuple[str, dict[str, Any]]], name: str) -> None:
    shown = [(label, run, value_of(run, name)) for label, run in runs]
    shown = [entry for entry in shown if entry[2] is not None]
    colours = {label: f"C{index}" for index, label in enumerate(dict.fromkeys(x for x, _ in runs))}
    texts = [f"{label}\n{title(run['parameters'])}" for label, run, _ in shown]
    places = range(len(shown))
    values = [value for _, _, value in shown]
    bars = axes.barh(places, values, color=[colours[label] for label, _, _ in shown])
    axes.bar_label(bars, fmt="%.4g", padding=3, fontsize=7)
    axes.set_yticks(places, texts, fontsize=7)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set_title(name)
