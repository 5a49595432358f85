"""Every option of the engine and the server, written once: the command line is made from it."""

import dataclasses
from typing import Any


def option(
    default: Any = dataclasses.MISSING,
    *,
    group: str,
    help: str,
    choices: tuple[str, ...] = (),
    aliases: tuple[str, ...] = (),
    is_secret: bool = False,
) -> Any:
    """A secret one is shown nowhere: not in the repr, and not by `shown`."""
    metadata = {"group": group, "help": help, "choices": choices, "aliases": aliases}
    return dataclasses.field(default=default, metadata=metadata, repr=not is_secret)


def shown(config: "EngineConfig") -> dict[str, Any]:
    """All options that are no secrets."""
    fields = (field for field in dataclasses.fields(config) if field.repr)
    return {field.name: getattr(config, field.name) for field in fields}


MODEL, MEMORY, API, SERVER, LOGS = (
    "Model and weights",
    "Memory and scheduling",
    "API behaviour",
    "HTTP server",
    "Logging",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """What the engine needs to know; names and meanings are SGLang's."""

    model_path: str = option(
        group=MODEL,
        aliases=("--model",),
        help="folder with config.json and safetensors or an orbax checkpoint, or a name on the "
        "Hugging Face hub",
    )
    tokenizer_path: str | None = option(
        None, group=MODEL, help="folder or hub name of the tokenizer (default: --model-path)"
    )
    skip_tokenizer_init: bool = option(
        False, group=MODEL, help="load no tokenizer: requests carry input_ids, answers output_ids"
    )
    load_format: str = option(
        "auto",
        group=MODEL,
        choices=("auto", "safetensors", "orbax", "dummy"),
        help="of the checkpoint (auto: safetensors, or orbax where there are none); dummy draws "
        "random weights of its shape",
    )
    dtype: str = option(
        "auto",
        group=MODEL,
        choices=("auto", "bfloat16", "float16", "float32"),
        help="of weights, activations and KV cache (auto: as config.json says)",
    )
    context_length: int | None = option(
        None, group=MODEL, help="most tokens of a request, prompt and output (default: the model's)"
    )
    is_embedding: bool = option(
        False,
        group=MODEL,
        help="answer with vectors (/encode) in place of tokens; a model that can do nothing else "
        "needs no flag",
    )
    served_model_name: str | None = option(
        None, group=MODEL, help="the id in /v1/models (default: --model-path)"
    )
    revision: str | None = option(None, group=MODEL, help="branch, tag or commit on the hub")
    download_dir: str | None = option(
        None, group=MODEL, help="where hub downloads are kept (default: the hub's own cache)"
    )
    json_model_override_args: str = option(
        "{}", group=MODEL, help="a JSON object laid over config.json"
    )
    weight_version: str = option(
        "default", group=MODEL, help="a label of the weights, reported in every meta_info"
    )
    weight_reload: str = option(
        "auto",
        group=MODEL,
        choices=("auto", "aside", "host", "in-place"),
        help="where new weights are loaded to while the old ones serve: aside, room for a second "
        "copy on the device, the shortest pause; host, its memory, and a pause to copy them; "
        "in-place, nowhere: they are read over the old ones, and a file that cannot be read then "
        "leaves no weights (auto: aside if they take under a fifth of the device, else host)",
    )
    weights_root: str | None = option(
        None,
        group=MODEL,
        help="folder below which new weights may lie (default: the folder that holds the model's; "
        "/ allows all)",
    )
    weight_load_timeout: float = option(
        300.0,
        group=MODEL,
        help="seconds without a byte read after which a load of new weights is given up",
    )
    random_seed: int | None = option(
        None, group=MODEL, help="of dummy weights and of requests without a sampling_seed"
    )

    device: str = option(
        "auto",
        group=MEMORY,
        choices=("auto", "cpu", "cuda", "tpu"),
        help="where the model runs (auto: the accelerator that JAX finds)",
    )
    mem_fraction_static: float = option(
        0.88, group=MEMORY, help="share of the device's memory for weights and KV cache"
    )
    max_total_tokens: int | None = option(
        None, group=MEMORY, help="tokens in the KV cache (default: as many as fit)"
    )
    page_size: int = option(16, group=MEMORY, help="tokens in a page of the KV cache, 1 to 128")
    max_running_requests: int | None = option(
        None, group=MEMORY, help="requests in a step (default: 16 on a CPU, 256 elsewhere)"
    )
    chunked_prefill_size: int | None = option(
        None,
        group=MEMORY,
        help="most prompt tokens in a step; longer prompts take several, but an encoder's raise it "
        "(default: 512 on a CPU, 8192 elsewhere)",
    )
    max_prefill_tokens: int = option(
        16384, group=MEMORY, help="most prompt tokens of all requests in a step"
    )
    schedule_policy: str = option(
        "fcfs",
        group=MEMORY,
        choices=("fcfs", "lpm"),
        help="who is admitted first: fcfs who came first, lpm who has the longest cached prefix",
    )
    schedule_conservativeness: float = option(
        1.0,
        group=MEMORY,
        help="above 1 fewer requests run at once and fewer are retracted, below 1 more",
    )
    enable_priority_scheduling: bool = option(
        False, group=MEMORY, help="admit requests of a higher `priority` first"
    )
    max_queued_requests: int | None = option(
        None, group=MEMORY, help="requests that may wait, beyond it 503 (default: no limit)"
    )
    num_continuous_decode_steps: int = option(
        1, group=MEMORY, help="decode steps in one dispatch; more cost less host time per token"
    )
    disable_radix_cache: bool = option(
        False, group=MEMORY, help="compute every prompt anew: no prefix cache"
    )
    deterministic: bool = option(
        False,
        group=MEMORY,
        aliases=("--enable-deterministic-inference",),
        help="tokens and logprobs of a request are the same to the bit whatever is served beside "
        "it, and as models.forward.served_logprobs has them; on a CPU only, and slower",
    )
    compilation_cache_dir: str | None = option(
        None,
        group=MEMORY,
        help="where compiled programs are kept between starts; 'none' keeps none "
        "(default: ~/.cache/jaxserve)",
    )

    allow_auto_truncate: bool = option(
        False, group=API, help="cut a prompt that is too long instead of refusing it"
    )
    preferred_sampling_params: str | None = option(
        None, group=API, help="a JSON object of sampling parameters, under each request's own"
    )
    stream_interval: int = option(
        1, group=API, help="tokens from one event of a stream to the next"
    )

    expert_distribution_recorder_mode: str | None = option(
        None,
        group=LOGS,
        choices=("stat", "per_pass", "per_token"),
        help="what /dump_expert_distribution_record writes, as safetensors: stat, the counts of "
        "each forward pass and how even they are; per_pass, the counts with the passes' numbers; "
        "per_token, each token with its experts, prompts and answers therefore (mode 0600) "
        "(default: all counts together, as a CSV in the working directory)",
    )
    expert_distribution_recorder_dir: str = option(
        "/tmp",
        group=LOGS,
        help="folder of a mode's files; the command line takes it from the environment's "
        "SGLANG_EXPERT_DISTRIBUTION_RECORDER_DIR too",
    )
    expert_distribution_recorder_buffer_size: int = option(
        1000,
        group=LOGS,
        help="forward passes that a mode keeps in memory, the latest ones; -1 keeps all",
    )
    record_plans: str | None = option(
        None,
        group=LOGS,
        help="write every step to this file, for `jaxserve replay`; it holds the prompts and "
        "answers of all requests (mode 0600)",
    )
    log_level: str = option(
        "info", group=LOGS, choices=("debug", "info", "warning", "error"), help="of all logs"
    )
    decode_log_interval: int = option(
        40, group=LOGS, help="decode steps from one throughput line to the next"
    )

    def __post_init__(self) -> None:
        """Raises ValueError for a value that no model could make right; names the flag."""
        for name, low, high in _RANGES:
            value = getattr(self, name, None)  # an EngineConfig has not the server's
            if value is not None and not low <= value <= high:
                flag = "--" + name.replace("_", "-")
                raise ValueError(f"{flag} {value}: must be from {low} to {high}")
        if self.expert_distribution_recorder_buffer_size == 0:
            raise ValueError("--expert-distribution-recorder-buffer-size 0: would keep nothing")

    @property
    def model_name(self) -> str:
        return self.served_model_name or self.model_path


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServerConfig(EngineConfig):
    """The engine's options and the HTTP server's."""

    host: str = option("127.0.0.1", group=SERVER, help="address to listen on")
    port: int = option(30000, group=SERVER, help="port to listen on, 0 for a free one")
    api_key: str | None = option(
        None,
        group=SERVER,
        is_secret=True,
        help="what callers must send as `Authorization: Bearer KEY`, but for health, /ready, "
        "/ping and /metrics",
    )
    admin_api_key: str | None = option(
        None,
        group=SERVER,
        is_secret=True,
        help="the key of what changes the server (weights, cache, pauses, aborts, recordings) in "
        "place of --api-key",
    )
    skip_server_warmup: bool = option(
        False, group=SERVER, help="do not answer a first request of its own before saying ready"
    )
    max_request_bytes: int = option(
        16 << 20, group=SERVER, help="largest body of a request, beyond it 413"
    )
    shutdown_timeout: float = option(
        30.0, group=SERVER, help="seconds that calls get to finish after SIGTERM"
    )
    enable_metrics: bool = option(False, group=LOGS, help="not needed: /metrics is always there")
    log_requests: bool = option(False, group=LOGS, help="log every request's parameters and length")


_MOST = 2**31 - 1
_RANGES = (
    ("page_size", 1, 128),
    ("mem_fraction_static", 0.01, 1.0),
    ("context_length", 2, _MOST),
    ("max_total_tokens", 1, _MOST),
    ("max_running_requests", 1, 4096),
    ("chunked_prefill_size", 1, 1 << 20),
    ("max_prefill_tokens", 1, _MOST),
    ("schedule_conservativeness", 0.01, 100.0),
    ("max_queued_requests", 0, _MOST),
    ("num_continuous_decode_steps", 1, 64),
    ("stream_interval", 1, _MOST),
    ("decode_log_interval", 1, _MOST),
    ("expert_distribution_recorder_buffer_size", -1, _MOST),
    ("random_seed", 0, 2**63 - 1),
    ("weight_load_timeout", 0.01, _MOST),
    ("port", 0, 65535),
    ("max_request_bytes", 1, _MOST),
    ("shutdown_timeout", 0, _MOST),
)
