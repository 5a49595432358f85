"""The options of the benchmarks, written once: the command line is made from them."""

import dataclasses
import json
import math
from typing import Any

from jaxserve.config import option

DATASET, LOAD, BATCH, SERVER, REPORT = (
    "Requests",
    "Load",
    "Batch",
    "Server",
    "Report",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DatasetOptions:
    """Which requests are sent."""

    dataset: str = option(
        "random",
        group=DATASET,
        choices=("random", "shared-prefix", "file"),
        help="random token ids; such with a prefix shared by a group; or a file's prompts",
    )
    dataset_path: str | None = option(
        None,
        group=DATASET,
        help='the file: lines of {"prompt": text or ids, "output_len": N}, or conversations as '
        'ShareGPT has them ({"conversations": [{"from": "human", "value": text}, ...]}), whose '
        "first human turn is taken; one record a line, or one JSON array",
    )
    num_prompts: int | None = option(
        None, group=DATASET, help="requests (default: 64, of a file all)"
    )
    input_len: int = option(
        64, group=DATASET, help="tokens of a random prompt, beside what a group shares"
    )
    output_len: int = option(64, group=DATASET, help="tokens of an answer, unless a file says it")
    range_ratio: float = option(
        1.0,
        group=DATASET,
        help="random lengths are drawn evenly, from this share of the above to all of it",
    )
    num_groups: int = option(4, group=DATASET, help="groups that each share a prefix")
    system_prompt_len: int = option(256, group=DATASET, help="tokens that a group shares")
    vocab_size: int | None = option(
        None, group=DATASET, help="random ids are below it (default: the model's)"
    )
    seed: int = option(0, group=DATASET, help="of prompts, lengths, arrivals and sampling")

    def __post_init__(self) -> None:
        """Raises ValueError; names the flag."""
        names = ("num_prompts", "input_len", "output_len", "num_groups", "vocab_size")
        for name in names:
            _check(name, getattr(self, name), 1)
        _check("system_prompt_len", self.system_prompt_len, 1)
        _check("range_ratio", self.range_ratio, 0.0, 1.0)
        _check("seed", self.seed, 0)
        if (self.dataset == "file") != (self.dataset_path is not None):
            raise ValueError("--dataset file and --dataset-path go together")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """How requests are sent. Of several values each makes a run of its own."""

    max_concurrency: tuple[int, ...] = option(
        (), group=LOAD, help="requests at once; several make several runs (default: no limit)"
    )
    request_rate: tuple[float, ...] = option(
        (math.inf,),
        group=LOAD,
        help="requests that arrive in a second, as a Poisson process; inf: all at the start",
    )
    warmup_requests: int = option(
        8, group=LOAD, help="requests that are sent before each run and not counted"
    )
    keep_cache: bool = option(
        False, group=LOAD, help="do not flush the prefix cache before each run"
    )
    sampling_params: str = option(
        "{}",
        group=LOAD,
        help='a JSON object laid over {"temperature": 0, "ignore_eos": true, '
        '"max_new_tokens": N} of each request',
    )

    def __post_init__(self) -> None:
        """Raises ValueError; names the flag."""
        for count in self.max_concurrency:
            _check("max_concurrency", count, 1)
        for rate in self.request_rate:
            if not rate > 0:
                raise ValueError(f"--request-rate {rate}: must be above 0")
        _check("warmup_requests", self.warmup_requests, 0)
        self.sampling()

    def sampling(self) -> dict[str, Any]:
        """What `--sampling-params` lays over the defaults."""
        try:
            given = json.loads(self.sampling_params)
        except ValueError as error:
            raise ValueError(f"--sampling-params is not JSON: {error}") from error
        if not isinstance(given, dict):
            raise ValueError("--sampling-params must be a JSON object")
        if given.get("n", 1) != 1:
            raise ValueError(f"--sampling-params: n is 1 here, not {given['n']!r}")
        return given


@dataclasses.dataclass(frozen=True, kw_only=True)
class OfflineOptions:
    stream: bool = option(
        False,
        group=LOAD,
        help="take every answer as a stream, which costs time, and tells TTFT and ITL",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchOptions:
    """The batches of `one-batch`: every combination."""

    batch_size: tuple[int, ...] = option((1,), group=BATCH, help="requests of a batch")
    input_len: tuple[int, ...] = option((64,), group=BATCH, help="tokens of each prompt")
    output_len: tuple[int, ...] = option((64,), group=BATCH, help="tokens of each answer")
    seed: int = option(0, group=BATCH, help="of the prompts, which are random ids")

    def __post_init__(self) -> None:
        """Raises ValueError; names the flag."""
        for name, lowest in (("batch_size", 1), ("input_len", 1), ("output_len", 2)):
            for value in getattr(self, name):
                _check(name, value, lowest)
        _check("seed", self.seed, 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """Where the server is."""

    base_url: str | None = option(
        None, group=SERVER, help="URL of the server (default: made of --host and --port)"
    )
    host: str = option("127.0.0.1", group=SERVER, help="address of the server")
    port: int = option(30000, group=SERVER, help="port of the server")
    api_key: str | None = option(None, group=SERVER, help="sent as Authorization: Bearer KEY")
    timeout: float = option(600.0, group=SERVER, help="seconds until a request is given up")
    server_pid: int | None = option(
        None,
        group=SERVER,
        help="process whose CPU time is counted, with its children "
        "(default: whoever answers, if it runs on this machine)",
    )

    def __post_init__(self) -> None:
        """Raises ValueError; names the flag."""
        _check("port", self.port, 1, 65535)
        if not self.timeout > 0:
            raise ValueError(f"--timeout {self.timeout}: must be above 0")

    @property
    def url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return (self.base_url or f"http://{host}:{self.port}").rstrip("/")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportOptions:
    output: str | None = option(None, group=REPORT, help="file for the result, as JSON")
    label: str | None = option(
        None, group=REPORT, help="what a plot calls it (default: the benchmark and the model)"
    )


def _check(name: str, value: float | None, low: float, high: float = math.inf) -> None:
    if value is None or low <= value <= high:
        return
    limits = f"at least {low}" if high == math.inf else f"from {low} to {high}"
    raise ValueError(f"--{name.replace('_', '-')} {value}: must be {limits}")
