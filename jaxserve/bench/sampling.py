"""The sampling parameters of a benchmark's requests."""

from typing import Any

from jaxserve.bench.dataset import Sample


def sampling_params(sample: Sample, given: dict[str, Any], seed: int) -> dict[str, Any]:
    """Greedy and blind to EOS, so that lengths are exact; what is `given` goes first. A request
    that draws its tokens gets a seed, so that a second run draws the same."""
    params = {"temperature": 0.0, "ignore_eos": True, "max_new_tokens": sample.output_len} | given
    if params["temperature"] != 0 and "sampling_seed" not in params:
        params["sampling_seed"] = seed
    return params
