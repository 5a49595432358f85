"""A recorded expert distribution to look at: a heat map, and figures of how even the load is."""

import pathlib

import numpy as np
from jaxtyping import Int64

from jaxserve.expert_load import balance


def describe(counts: Int64[np.ndarray, "layers E"]) -> str:
    """A line for each layer that has counts, and one for all.

    Raises:
      ValueError: there is no count at all.
    """
    if not counts.any():
        raise ValueError("nothing was recorded: no expert has a count")
    uneven = balance(counts)
    lines = ["layer  choices  experts used  busiest (share)  max/mean"]
    for layer in np.flatnonzero(counts.any(axis=1)):
        row = counts[layer]
        busiest = f"{row.argmax()} ({row.max() / row.sum():.1%})"
        used = f"{np.count_nonzero(row)}/{len(row)}"
        lines.append(f"{layer:5}{row.sum():9}{used:>14}{busiest:>17}{uneven[layer]:10.2f}")
    lines.append(f"mean of max/mean: {np.nanmean(uneven):.2f}")
    return "\n".join(lines)


def draw(counts: Int64[np.ndarray, "layers E"], path: pathlib.Path) -> None:
    """Writes the figure; the suffix says the format. Loads are relative to their layer's mean.

    Raises:
      ModuleNotFoundError: matplotlib is not installed.
      ValueError: a suffix that is no format.
    """
    from matplotlib.figure import Figure  # an extra; and no pyplot: no display is needed

    num_layers, num_experts = counts.shape
    mean = counts.mean(axis=1, keepdims=True)
    load = np.divide(counts, mean, out=np.zeros(counts.shape), where=mean > 0)
    size = (min(4 + num_experts / 8, 24), min(2.5 + num_layers / 5, 16))
    figure = Figure(figsize=size, layout="constrained")
    heat, bars = figure.subplots(1, 2, sharey=True, width_ratios=(5, 1))
    image = heat.imshow(load, aspect="auto", cmap="viridis", vmin=0, interpolation="nearest")
    heat.set(xlabel="expert", ylabel="layer", title="Load over the layer's mean")
    figure.colorbar(image, ax=heat)
    bars.barh(np.arange(num_layers), np.nan_to_num(balance(counts)))
    bars.axvline(1.0, color="gray", linewidth=0.8)
    bars.set(xlabel="max/mean", title="Balance")
    figure.savefig(path)
