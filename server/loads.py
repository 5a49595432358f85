"""/v1/loads and /get_load: how busy the server is, for routers that choose among several."""

import datetime

from sanic import Blueprint, Request
from sanic.response import HTTPResponse

import jaxserve
from jaxserve.errors import RequestError
from jaxserve.server import bodies
from jaxserve.server.call import ask_engine

blueprint = Blueprint("loads")


@blueprint.get("/v1/loads")
async def loads(request: Request) -> HTTPResponse:
    """One entry: there is one engine. `include` is taken, and all is told whatever it says."""
    _check(request)
    info, state = request.app.ctx.frontend.info, await ask_engine(request, "internal_state")
    load = {
        "dp_rank": 0,
        "num_running_reqs": state["num_running_reqs"],
        "num_waiting_reqs": state["num_queue_reqs"],
        "num_used_tokens": state["num_used_tokens"],
        "num_total_tokens": state["num_used_tokens"] + state["num_waiting_tokens"],
        "max_total_num_tokens": info.max_total_num_tokens,
        "max_running_requests": info.max_running_requests,
        "token_usage": round(state["token_usage"], 4),
        "gen_throughput": round(state["last_gen_throughput"], 2),
        "cache_hit_rate": round(request.app.ctx.metrics.cache_hit_rate, 4),
        "utilization": round(state["num_running_reqs"] / info.max_running_requests, 4),
    }
    return bodies.json(
        {
            "timestamp": datetime.datetime.now(datetime.UTC).isoformat(),
            "version": jaxserve.__version__,
            "accelerator": info.device,
            "num_accelerators": 1,
            "loads": [load],
        }
    )


@blueprint.get("/get_load")
async def get_load(request: Request) -> HTTPResponse:
    """As routers of mid-2025 ask."""
    state = await ask_engine(request, "internal_state")
    load = {
        "dp_rank": 0,
        "num_reqs": state["num_running_reqs"] + state["num_queue_reqs"],
        "num_waiting_reqs": state["num_queue_reqs"],
        "num_tokens": state["num_used_tokens"] + state["num_waiting_tokens"],
    }
    return bodies.json([load])


def _check(request: Request) -> None:
    if (rank := request.args.get("dp_rank", "0")) != "0":
        raise RequestError(f"dp_rank {rank}: there is rank 0 alone", param="dp_rank")
    if (kind := request.args.get("format", "json")) != "json":
        raise RequestError(f"format {kind!r}: only json; /metrics is Prometheus'", param="format")
