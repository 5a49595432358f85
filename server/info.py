"""What the server is and how it is: model, limits, health. Nothing here changes anything."""

import asyncio
import importlib.metadata
import sys
import time
import uuid

from sanic import Blueprint, Request
from sanic.response import HTTPResponse

import jaxserve
from jaxserve.config import ServerConfig, shown
from jaxserve.errors import EngineDied
from jaxserve.frontend import Frontend
from jaxserve.request_builder import longest_prompt
from jaxserve.server import bodies
from jaxserve.server.call import ask_engine

blueprint = Blueprint("info")
HEALTH_SECONDS = 20.0  # without a sign of life from the engine, then it is not well
POLL_SECONDS = 0.02


@blueprint.get("/get_model_info")
async def get_model_info(request: Request) -> HTTPResponse:
    """Exactly the three keys that the documented clients compare with."""
    return bodies.json(_model_names(request.app.ctx.frontend))


@blueprint.get("/model_info")
async def model_info(request: Request) -> HTTPResponse:
    frontend = request.app.ctx.frontend
    config, info = frontend.config, frontend.info
    return bodies.json(
        {
            **_model_names(frontend),
            "preferred_sampling_params": config.preferred_sampling_params,
            "weight_version": frontend.state.weight_version,
            "has_image_understanding": False,
            "has_audio_understanding": False,
            "model_type": info.model_type,
            "architectures": [info.architecture],
            "served_model_name": frontend.state.model_name,
            "load_format": config.load_format,
        }
    )


@blueprint.get("/get_server_info")
@blueprint.get("/server_info", name="server_info")
async def get_server_info(request: Request) -> HTTPResponse:
    frontend = request.app.ctx.frontend
    info = frontend.info
    state = await ask_engine(request, "internal_state")
    return bodies.json(
        {
            **shown(frontend.config),
            **_model_names(frontend),
            "served_model_name": frontend.state.model_name,
            "weight_version": frontend.state.weight_version,
            "launch_command": _without_secrets(" ".join(sys.argv), frontend.config),
            "status": "ready",
            "dtype": info.dtype,
            "device": info.device,
            "num_devices": info.num_devices,
            "tp_size": 1,
            "dp_size": 1,
            "context_length": info.context_length,
            "page_size": info.page_size,
            "max_running_requests": info.max_running_requests,
            "chunked_prefill_size": info.chunked_prefill_size,
            "max_total_num_tokens": info.max_total_num_tokens,
            "max_req_input_len": longest_prompt(info),
            "startup_time": info.startup_seconds,
            "startup_phases": info.startup_phases,
            "num_weight_updates": frontend.state.num_updates,
            "is_paused": frontend.state.is_paused,
            "released_memory": frontend.state.released,
            "fault": frontend.state.fault,
            "internal_states": [state],
            "vocab_size": info.vocab_size,
            "version": jaxserve.__version__,
            "jax_version": importlib.metadata.version("jax"),
        }
    )


@blueprint.get("/health")
@blueprint.get("/health_generate", name="health_generate")
async def health(request: Request) -> HTTPResponse:
    """200 as soon as the engine has produced anything, for whomever; else it is asked for the least
    that it can do, so that an idle engine must prove itself too."""
    frontend, app = request.app.ctx.frontend, request.app
    if app.ctx.is_stopping:
        return bodies.empty(503)
    began = time.monotonic()
    if frontend.state.is_paused or frontend.state.refusal:
        return await _health_without_generating(request)
    body = {
        "rid": f"HEALTH_CHECK_{uuid.uuid4().hex}",
        "input_ids": [0],
        "sampling_params": {"max_new_tokens": 1, "temperature": 0.0},
    }
    try:
        answers = frontend.submit(*frontend.prepare_own(body))
    except EngineDied:
        return bodies.empty(503)
    try:
        while frontend.last_progress < began:
            if time.monotonic() - began > HEALTH_SECONDS or app.ctx.is_stopping:
                return bodies.empty(503)
            await asyncio.sleep(POLL_SECONDS)
        return bodies.empty()
    finally:
        frontend.abandon(answers)


async def _health_without_generating(request: Request) -> HTTPResponse:
    """An engine that may not generate is well if it answers."""
    try:
        async with asyncio.timeout(HEALTH_SECONDS):
            await ask_engine(request, "internal_state")
    except (EngineDied, TimeoutError):
        return bodies.empty(503)
    return bodies.empty()


@blueprint.get("/ready")
async def ready(request: Request) -> HTTPResponse:
    """Whether new requests are wanted: without asking the engine."""
    state = request.app.ctx.frontend.state
    is_unwanted = request.app.ctx.is_stopping or state.is_paused or state.refusal
    return bodies.empty(503 if is_unwanted else 200)


@blueprint.get("/ping")
async def ping(request: Request) -> HTTPResponse:
    """Whether this process lives."""
    return bodies.empty()


def _without_secrets(text: str, config: ServerConfig) -> str:
    secrets = (value for name, value in vars(config).items() if name not in shown(config))
    for secret in filter(None, secrets):
        text = text.replace(secret, "***")
    return text


def _model_names(frontend: Frontend) -> dict[str, object]:
    config = frontend.config
    return {
        "model_path": frontend.state.model_path,
        "tokenizer_path": config.tokenizer_path or config.model_path,
        "is_generation": frontend.info.embedding is None,
    }
