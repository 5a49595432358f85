"""What a config.json says, in one vocabulary for every architecture.

Reads the spellings of transformers 4.x (`rope_theta`, `rope_scaling`, `torch_dtype`) and 5.x
(`rope_parameters`, `dtype`, `layer_types`) by itself: no import of transformers, no remote code.
"""

import dataclasses
import json
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, Literal, Self, get_args

from jaxserve.models.encoder_config import EncoderConfig
from jaxserve.models.moe_config import MoeConfig
from jaxserve.models.pooling import PoolingConfig

RopeType = Literal["default", "linear", "dynamic", "llama3", "yarn"]


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding; the fields beyond `factor` belong to llama3 and yarn."""

    rope_type: RopeType = "default"
    theta: float = 10000.0
    factor: float = 1.0
    original_context_length: int = 0  # positions the model was trained on before scaling
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The shape of a decoder, or of an encoder."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    context_length: int  # positions served
    rms_norm_eps: float = 1e-6
    rope: RopeConfig = RopeConfig()
    attention_bias: bool = False  # on q, k and v
    attention_out_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    windows: tuple[int | None, ...] = ()  # one per layer: positions seen, None for all
    clip_qkv: float | None = None  # the largest absolute value of q, k and v
    moe: MoeConfig | None = None
    encoder: EncoderConfig | None = None  # of a model that is none, a decoder
    dtype: str = "bfloat16"
    eos_token_ids: tuple[int, ...] = ()
    pooling: PoolingConfig | None = None  # of a model that answers with vectors, not tokens

    @classmethod
    def from_pretrained(
        cls,
        folder: str | pathlib.Path,
        context_length: int | None = None,
        overrides: Mapping[str, Any] | None = None,
        read_text: Callable[[pathlib.Path], str] = pathlib.Path.read_text,
    ) -> Self:
        """Reads `config.json` (and the EOS ids of `generation_config.json`) in `folder`.

        Raises:
          FileNotFoundError, ValueError: as `from_dict`; the message names the file.
        """
        folder = pathlib.Path(folder)
        raw = _read_json(folder / "config.json", read_text) | dict(overrides or {})
        config = cls.from_dict(raw, context_length)
        generation = folder / "generation_config.json"
        if generation.exists():
            extra = _token_ids(_read_json(generation, read_text).get("eos_token_id"))
            ids = dict.fromkeys((*config.eos_token_ids, *extra))
            config = dataclasses.replace(config, eos_token_ids=tuple(ids))
        return config

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], context_length: int | None = None) -> Self:
        """Parses a config.json.

        Args:
          context_length: positions to serve, the model's own unless given.

        Raises:
          ValueError: a key is missing or has a value that is not served; names the key.
        """
        from jaxserve.models import registry  # the architecture's own rules live in its file

        architecture = registry.architecture_of(raw)
        shape = {key: _required(raw, key) for key in _REQUIRED}
        num_heads = shape["num_attention_heads"]
        longest = _required(raw, "max_position_embeddings")
        if not registry.is_encoder(architecture) and raw.get("hidden_act", "silu") != "silu":
            raise ValueError(f"config.json: hidden_act {raw['hidden_act']!r}: only silu is served")
        config = cls(
            architecture=architecture,
            vocab_size=shape["vocab_size"],
            hidden_size=shape["hidden_size"],
            intermediate_size=shape["intermediate_size"],
            num_layers=shape["num_hidden_layers"],
            num_heads=num_heads,
            num_kv_heads=size(raw, "num_key_value_heads", num_heads),
            head_dim=size(raw, "head_dim", shape["hidden_size"] // num_heads),
            context_length=context_length or longest,
            rms_norm_eps=number(raw, "rms_norm_eps", 1e-6),
            rope=_parse_rope(raw, longest),
            tie_word_embeddings=flag(raw, "tie_word_embeddings"),
            windows=(None,) * shape["num_hidden_layers"],
            dtype=raw.get("dtype") or raw.get("torch_dtype") or "bfloat16",
            eos_token_ids=_token_ids(raw.get("eos_token_id")),
        )
        config = dataclasses.replace(
            config, **registry.model_class(architecture).read_config(raw, config)
        )
        _check(config)
        return config


MOST_LAYERS, MOST_SIZE = 2**14, 2**31
_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)


def layer_windows(
    raw: Mapping[str, Any], num_layers: int, window: int | None, first_windowed: int
) -> tuple[int | None, ...]:
    """Which layers see only `window` positions: `layer_types` decides, else all from a layer on."""
    if window is None:
        return (None,) * num_layers
    types = raw.get("layer_types")
    if types is None:
        return tuple(window if i >= first_windowed else None for i in range(num_layers))
    if not isinstance(types, list) or not all(isinstance(name, str) for name in types):
        raise ValueError(f"config.json: layer_types is {types!r}, needs a list of names")
    if len(types) != num_layers:
        raise ValueError(f"config.json: {len(types)} layer_types for {num_layers} layers")
    known = {"sliding_attention": window, "full_attention": None}
    if unknown := set(types) - set(known):
        raise ValueError(f"config.json: layer_types {sorted(unknown)} are not served")
    return tuple(known[name] for name in types)


def _parse_rope(raw: Mapping[str, Any], longest: int) -> RopeConfig:
    scaling = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if not isinstance(scaling, dict):
        raise ValueError(f"config.json: rope_scaling is {scaling!r}, needs an object")
    rope_type = scaling.get("rope_type") or scaling.get("type") or "default"
    if rope_type not in get_args(RopeType):
        names = ", ".join(get_args(RopeType))
        raise ValueError(f"config.json: rope_type {rope_type!r} is not served; known: {names}")
    if scaling.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1.0)) != 1.0:
        raise ValueError("config.json: partial_rotary_factor other than 1 is not served")
    # As transformers does it: dynamic scaling starts where the model's own context ends, and the
    # key beside the scaling goes before the one within.
    original = longest
    if rope_type in ("llama3", "yarn"):
        key = "original_max_position_embeddings"
        original = size(raw, key, size(scaling, key, longest))
    factor = number(scaling, "factor", None)
    if factor is None and rope_type == "yarn" and "factor" in scaling:
        factor = longest / original
    if factor is None and rope_type != "default":
        raise ValueError(f"config.json: rope_type {rope_type!r} needs a factor")
    return RopeConfig(
        rope_type=rope_type,
        theta=number(scaling, "rope_theta", number(raw, "rope_theta", 10000.0)),
        factor=1.0 if factor is None else factor,
        original_context_length=original,
        **_rope_options(scaling, rope_type),
    )


def _rope_options(scaling: Mapping[str, Any], rope_type: str) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for name in ("low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow"):
        options[name] = number(scaling, name, None)
    for name in ("attention_factor", "mscale", "mscale_all_dim"):
        options[name] = None if scaling.get(name) == 0 else number(scaling, name, None)
    if scaling.get("truncate") is not None:
        options["truncate"] = flag(scaling, "truncate")
    options = {name: value for name, value in options.items() if value is not None}
    if rope_type == "llama3":
        for name in ("low_freq_factor", "high_freq_factor"):
            if name not in options:
                raise ValueError(f"config.json: rope_type 'llama3' needs a {name}")
        if options["low_freq_factor"] >= options["high_freq_factor"]:
            raise ValueError(
                f"config.json: low_freq_factor {options['low_freq_factor']} is not below "
                f"high_freq_factor {options['high_freq_factor']}"
            )
    return options


def _check(config: ModelConfig) -> None:
    if config.num_heads % config.num_kv_heads:
        raise ValueError(
            f"config.json: num_attention_heads {config.num_heads} is no multiple of "
            f"num_key_value_heads {config.num_kv_heads}"
        )
    if config.head_dim < 2 or config.head_dim % 2:
        raise ValueError(f"config.json: head_dim {config.head_dim} is not even and positive")
    if config.dtype not in ("bfloat16", "float16", "float32"):
        raise ValueError(f"config.json: dtype {config.dtype!r} is not served")


def size(raw: Mapping[str, Any], key: str, default: int) -> int:
    """A size that may be absent or null."""
    return default if raw.get(key) is None else _required(raw, key)


def flag(raw: Mapping[str, Any], key: str) -> bool:
    """False where it is absent or null."""
    value = raw.get(key)
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"config.json: {key} is {value!r}, needs true or false")
    return bool(value)


def number(raw: Mapping[str, Any], key: str, default: float | None) -> float | None:
    value = raw.get(key)
    if value is None:
        return default
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 < value < math.inf:
        raise ValueError(f"config.json: {key} is {value!r}, needs a positive number")
    return value


def _required(raw: Mapping[str, Any], key: str) -> int:
    """Bounded: whoever reads it may make as much of it."""
    value = raw.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"config.json: {key} is {value!r}, needs a positive integer")
    most = MOST_LAYERS if key == "num_hidden_layers" else MOST_SIZE
    if value > most:
        raise ValueError(f"config.json: {key} is more than {most}")  # it may have many digits
    return value


def _token_ids(value: int | list[int] | None) -> tuple[int, ...]:
    ids = [] if value is None else value if isinstance(value, list) else [value]
    for token in ids:
        if not isinstance(token, int) or isinstance(token, bool) or token < 0:
            raise ValueError(f"config.json: eos_token_id is {value!r}, needs token ids")
    return tuple(ids)


def _read_json(path: pathlib.Path, read_text: Callable[[pathlib.Path], str]) -> dict[str, Any]:
    try:
        raw = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{path} holds no JSON object")
    return raw
