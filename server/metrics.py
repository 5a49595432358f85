"""/metrics, for Prometheus: SGLang's names, and ours after `jaxserve:`."""

from typing import Any

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from sanic import Blueprint, Request
from sanic.response import HTTPResponse, raw

from jaxserve.frontend import Frontend
from jaxserve.generation import Generation, Progress
from jaxserve.server.call import ask_engine

blueprint = Blueprint("metrics")
LABEL = "model_name"
# Seconds, as SGLang has them.
TTFT = (0.1, 0.2, 0.4, 0.6, 0.8, 1, 2, 4, 6, 8, 10, 20, 40, 60, 80, 100, 200, 400)
ITL = (0.002, 0.004, 0.006, 0.008, 0.01, 0.015, 0.02, 0.025, 0.03, 0.035, 0.04, 0.06, 0.08)
ITL += (0.1, 0.2, 0.4, 0.6, 0.8, 1, 2, 4, 6, 8)
E2E = (0.1, 0.2, 0.4, 0.6, 0.8, 1, 2, 4, 6, 8, 10, 20, 40, 60, 80, 100, 200, 400, 600, 1200, 1800)
GAUGES = {  # by what the engine calls it: the name, and what it is
    "num_running_reqs": ("sglang:num_running_reqs", "requests in the batch"),
    "num_queue_reqs": ("sglang:num_queue_reqs", "requests that wait for a place in it"),
    "num_used_tokens": ("sglang:num_used_tokens", "tokens of running requests in the KV cache"),
    "token_usage": ("sglang:token_usage", "share of the KV cache in use, cached prefixes too"),
    "last_gen_throughput": ("sglang:gen_throughput", "output tokens per second"),
    "num_retractions": ("sglang:num_retracted_reqs", "requests sent back to wait since the start"),
    "compiled_after_ready": ("jaxserve:compiled_after_ready", "programs; more than 0 is a bug"),
}


class Metrics:
    """What is counted of requests as they get on; the engine is asked for the rest."""

    def __init__(self, frontend: Frontend):
        prometheus_client.disable_created_metrics()
        self.registry = CollectorRegistry()
        self._frontend = frontend
        self._num_prompt = self._num_cached = 0  # tokens, whatever the model's name
        self._prompt_tokens = self._counter("prompt_tokens", "prompt tokens of ended requests")
        self._cached_tokens = self._counter("cached_tokens", "of these, found in the prefix cache")
        self._output_tokens = self._counter("generation_tokens", "output tokens")
        self._requests = self._counter("num_requests", "requests that have ended")
        self._aborted = self._counter("num_aborted_requests", "requests ended before their time")
        self._ttft = self._histogram("time_to_first_token_seconds", "from arrival", TTFT)
        self._itl = self._histogram("inter_token_latency_seconds", "from token to token", ITL)
        self._e2e = self._histogram("e2e_request_latency_seconds", "from arrival to end", E2E)
        self._gauges = {key: self._gauge(*described) for key, described in GAUGES.items()}
        self._hit_rate = self._gauge("sglang:cache_hit_rate", "cached of all prompt tokens")
        self._capacity = self._gauge("sglang:max_total_num_tokens", "tokens the KV cache holds")
        self._startup = self._gauge("sglang:startup_time_seconds", "until the engine was ready")

    def observe(self, generation: Generation, before: Progress) -> None:
        """A request has got on since it was at `before`."""
        label, now = self._frontend.state.model_name, generation.progress
        new = now.num_output - before.num_output
        if new:
            self._output_tokens.labels(label).inc(new)
            if not before.num_output:
                self._ttft.labels(label).observe(now.finished - generation.created)
            else:
                for _ in range(new):
                    self._itl.labels(label).observe((now.finished - before.finished) / new)
        if now.finish_reason is None:
            return
        self._requests.labels(label).inc()
        self._aborted.labels(label).inc(now.finish_reason.type == "abort")
        num_prompt = len(generation.request.prompt_ids)
        self._prompt_tokens.labels(label).inc(num_prompt)
        self._cached_tokens.labels(label).inc(now.cached_tokens)
        self._num_prompt += num_prompt
        self._num_cached += now.cached_tokens
        self._e2e.labels(label).observe(now.finished - generation.created)

    @property
    def cache_hit_rate(self) -> float:
        """Of the prompt tokens of all requests that have ended, those found in the cache."""
        return self._num_cached / max(self._num_prompt, 1)

    def render(self, state: dict[str, Any]) -> bytes:
        """In Prometheus' text format.

        Args:
          state: the engine's own, of `/server_info`.
        """
        label, info = self._frontend.state.model_name, self._frontend.info
        for key, gauge in self._gauges.items():
            gauge.labels(label).set(state[key])
        self._hit_rate.labels(label).set(self.cache_hit_rate)
        self._capacity.labels(label).set(info.max_total_num_tokens)
        self._startup.labels(label).set(info.startup_seconds)
        return prometheus_client.generate_latest(self.registry)

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(f"sglang:{name}", text, [LABEL], registry=self.registry)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(name, text, [LABEL], registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        options = {"buckets": buckets, "registry": self.registry}
        return Histogram(f"sglang:{name}", text, [LABEL], **options)


@blueprint.get("/metrics")
async def metrics(request: Request) -> HTTPResponse:
    state, counted = await ask_engine(request, "internal_state"), request.app.ctx.metrics
    return raw(counted.render(state), content_type=prometheus_client.CONTENT_TYPE_LATEST)
