"""`jaxserve bench serve`: a load on a server that speaks /generate, ours or another."""

import itertools
import json
from collections.abc import AsyncIterator
from typing import Any

from jaxserve.bench import cpu_time
from jaxserve.bench.cpu_time import CpuTime
from jaxserve.bench.dataset import Sample, make_samples
from jaxserve.bench.generate_client import encode, generate, message_of
from jaxserve.bench.http_client import HttpClient
from jaxserve.bench.load import run_load
from jaxserve.bench.metrics import summarize
from jaxserve.bench.options import DatasetOptions, LoadOptions, ServerOptions
from jaxserve.bench.report import shell_line
from jaxserve.bench.sampling import sampling_params
from jaxserve.bench.timeline import Timeline

FLUSH_SECONDS = 10
KEPT_INFO = (
    "model_path",
    "served_model_name",
    "dtype",
    "context_length",
    "page_size",
    "max_total_num_tokens",
    "max_running_requests",
    "chunked_prefill_size",
    "num_continuous_decode_steps",
    "disable_radix_cache",
    "schedule_policy",
    "stream_interval",
)


class Serve:
    """A client of one server."""

    def __init__(self, options: ServerOptions, load: LoadOptions, seed: int):
        """Raises ValueError for a bad URL."""
        self._client = HttpClient(options.url, api_key=options.api_key, timeout=options.timeout)
        self._url, self._keep_cache = options.url, load.keep_cache
        self._given, self._seed = load.sampling(), seed
        self.server_pid = options.server_pid
        self.info: dict[str, Any] = {}

    async def connect(self) -> None:
        """Asks the server what it is, and finds its process.

        Raises:
          ConnectionError: nobody answers as such a server does.
          ValueError: there is no process --server-pid.
        """
        self.info = await self._server_info()
        if self.server_pid is None:
            self.server_pid = cpu_time.peer_of(*await self._client.ports())
        elif not cpu_time.tree(self.server_pid):
            raise ValueError(f"--server-pid {self.server_pid}: no such process")

    async def run(
        self, dataset: DatasetOptions, load: LoadOptions
    ) -> AsyncIterator[dict[str, Any]]:
        """A run for each concurrency and rate.

        Raises:
          ConnectionError: the cache cannot be flushed.
          ValueError, OSError: the requests cannot be made; says why.
        """
        samples = make_samples(dataset, self.info.get("vocab_size"))
        bodies = [
            encode(sample, sampling_params(sample, self._given, self._seed + index))
            for index, sample in enumerate(samples)
        ]
        runs = itertools.product(load.max_concurrency or (None,), load.request_rate)
        for concurrency, rate in runs:
            await self._warm_up(samples[: load.warmup_requests], bodies)
            yield {
                "parameters": {"max_concurrency": concurrency, "request_rate": rate},
                "metrics": await self._measure(samples, bodies, concurrency, rate),
            }

    def close(self) -> None:
        self._client.close()

    async def _warm_up(self, samples: list[Sample], bodies: list[bytes]) -> None:
        if samples:
            await run_load(samples, self._sender(bodies))
        if not self._keep_cache:
            path = f"/flush_cache?timeout={FLUSH_SECONDS}"
            response = await self._client.request("POST", path)
            if response.status != 200:
                why = message_of(response.body).strip()
                raise ConnectionError(
                    f"the prefix cache cannot be flushed (--keep-cache does without): {why}"
                )

    async def _measure(
        self, samples: list[Sample], bodies: list[bytes], concurrency: int | None, rate: float
    ) -> dict[str, Any]:
        own, server = cpu_time.own(), self._server_time()
        timelines = await run_load(
            samples,
            self._sender(bodies),
            max_concurrency=concurrency,
            request_rate=rate,
            seed=self._seed,
        )
        own = cpu_time.own() - own
        metrics = summarize(timelines, is_streamed=True)
        if server is None:
            return metrics | {"client_cpu_s": own._asdict()}
        server = self._server_time() - server
        metrics["output_tokens_per_cpu_s"] = metrics["output_tokens"] / (own + server).total
        if server.total:
            metrics["output_tokens_per_server_cpu_s"] = metrics["output_tokens"] / server.total
        return metrics | {"server_cpu_s": server._asdict(), "client_cpu_s": own._asdict()}

    def _sender(self, bodies: list[bytes]):
        async def send(index: int, sample: Sample, timeline: Timeline) -> None:
            await generate(self._client, bodies[index], timeline)

        return send

    def _server_time(self) -> CpuTime | None:
        return None if self.server_pid is None else cpu_time.of_tree(self.server_pid)

    async def _server_info(self) -> dict[str, Any]:
        """Of either name that it has in SGLang."""
        for path in ("/server_info", "/get_server_info"):
            try:
                response = await self._client.request("GET", path)
            except OSError as error:
                raise ConnectionError(f"no server answers at {self._url}: {error}") from error
            if response.status == 200:
                break
        else:
            why = f"{response.status}: {message_of(response.body)}"
            raise ConnectionError(f"{self._url}{path} answers {why}")
        try:
            return dict(json.loads(response.body))
        except (ValueError, TypeError) as error:
            raise ConnectionError(f"{self._url}{path} is no server_info") from error


def describe(serve: Serve) -> dict[str, Any]:
    """What the server is, and which of its processes were looked at."""
    processes = [
        {"pid": pid, "command": shell_line(cpu_time.command_of(pid))}
        for pid in (cpu_time.tree(serve.server_pid) if serve.server_pid is not None else [])
    ]
    known = {name: serve.info[name] for name in KEPT_INFO if name in serve.info}
    return known | {"processes": processes}
