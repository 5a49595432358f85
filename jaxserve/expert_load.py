"""How evenly the tokens spread over the experts."""

import numpy as np
from jaxtyping import Float, Int


def balance(counts: Int[np.ndarray, "*passes layers E"]) -> Float[np.ndarray, "*passes layers"]:
    """The busiest expert's load over the mean expert's: 1 where all are the same, the number of
    experts where one does all; NaN in layers without any."""
    mean = counts.mean(axis=-1)
    return np.divide(counts.max(axis=-1), mean, out=np.full(mean.shape, np.nan), where=mean > 0)


def utilization(counts: Int[np.ndarray, "passes layers E"]) -> float:
    """The mean of 1 / `balance`, over all passes and layers with experts."""
    uneven = balance(counts)
    return float((1 / uneven[~np.isnan(uneven)]).mean()) if counts.any() else 0.0
