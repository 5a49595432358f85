"""The bodies that ask for other weights, checked. No jax: both sides of the socket read them."""

import base64
from collections.abc import Mapping
from typing import Any, Literal, get_args

import msgspec

from jaxserve.body_fields import as_object, flag, integer, text, texts
from jaxserve.errors import RequestError

# What becomes of requests in flight when the weights change: they finish with the old ones while
# new requests wait; they end; they are computed anew; they go on with what they have computed.
InFlight = Literal["wait", "abort", "retract", "in_place"]
PauseMode = Literal["abort", "retract", "in_place"]
Memory = Literal["kv_cache", "weights"]  # that may be released for a while
LOAD_FORMATS = ("auto", "safetensors", "orbax")
MOST_VERSION_BYTES = 256


class WeightUpdate(msgspec.Struct, frozen=True):
    """Either a folder with all tensors, or some tensors: in memory, or files of them."""

    model_path: str | None = None
    payloads: tuple[bytes, ...] = ()  # safetensors
    files: tuple[str, ...] = ()
    load_format: str = "auto"
    in_flight: InFlight = "wait"
    weight_version: str | None = None  # the label from then on; None keeps it
    keep_pause: bool = False  # generation is paused afterwards
    keep_tokenizer: bool = False  # the folder's tokenizer and end-of-sequence ids may be others

    @property
    def is_partial(self) -> bool:
        return self.model_path is None

    def to_arguments(self) -> dict[str, Any]:
        """For `messages.Call`."""
        return msgspec.structs.asdict(self)


def parse_disk_update(body: Any) -> WeightUpdate:
    """The body of /update_weights_from_disk.

    Raises:
      RequestError: names the field.
    """
    body = as_object(body)
    path = text(body, "model_path")
    if not path:
        raise RequestError("model_path is required", param="model_path")
    if body.get("manifest") is not None:
        raise RequestError(
            "manifest is not supported: the folder is read as it is", param="manifest"
        )
    for name in ("is_async", "torch_empty_cache", "recapture_cuda_graph"):
        flag(body, name)  # nothing here would be done otherwise
    integer(body, "token_step", 0)
    return WeightUpdate(
        model_path=path,
        load_format=text(body, "load_format") or "auto",
        keep_tokenizer=flag(body, "keep_tokenizer"),
        keep_pause=flag(body, "keep_pause"),
        **_common(body),
    )


def parse_tensor_update(body: Any) -> WeightUpdate:
    """The body of /update_weights_from_tensor: some tensors, the others stay.

    `serialized_named_tensors` is a list of base64 strings, each the bytes of a safetensors file;
    `files` is a list of such files below the weights root. Pickles are never loaded.

    Raises:
      RequestError: names the field.
    """
    body = as_object(body)
    if body.get("load_format") != "safetensors":
        raise RequestError(
            'load_format must be "safetensors": pickled tensors are never loaded, and handles of '
            "CUDA memory belong to torch. Send the bytes of a safetensors file as base64 in "
            "serialized_named_tensors, or the paths of such files in files",
            param="load_format",
        )
    payloads = [_decode(one) for one in texts(body, "serialized_named_tensors")]
    files = texts(body, "files")
    if not payloads and not files:
        raise RequestError(
            "serialized_named_tensors or files is required", param="serialized_named_tensors"
        )
    if body.get("selector") not in (None, "all", "target"):
        raise RequestError("selector must be all or target: there is no draft", param="selector")
    flag(body, "torch_empty_cache")
    return WeightUpdate(
        payloads=tuple(payloads), files=tuple(files), load_format="safetensors", **_common(body)
    )


def _common(body: Mapping[str, Any]) -> dict[str, Any]:
    flag(body, "flush_cache", True)  # what other weights have computed is matched in no case
    return {"in_flight": in_flight(body), "weight_version": version(body, "weight_version")}


def in_flight(body: Mapping[str, Any]) -> InFlight:
    """`in_flight`, or what `abort_all_requests` says in its place."""
    asked, aborts = body.get("in_flight"), flag(body, "abort_all_requests")
    if asked is not None and asked not in get_args(InFlight):
        names = ", ".join(get_args(InFlight))
        raise RequestError(f"in_flight must be one of {names}, got {asked!r}", param="in_flight")
    if aborts and asked not in (None, "abort"):
        raise RequestError(
            f"in_flight {asked!r} and abort_all_requests exclude each other", param="in_flight"
        )
    return asked or ("abort" if aborts else "wait")


def version(body: Mapping[str, Any], name: str) -> str | None:
    label = text(body, name)
    if label is not None and not 0 < len(label.encode(errors="replace")) <= MOST_VERSION_BYTES:
        raise RequestError(f"{name} must have 1 to {MOST_VERSION_BYTES} bytes", param=name)
    return label


def _decode(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except ValueError as error:
        raise RequestError(
            f"serialized_named_tensors must be base64: {error}", param="serialized_named_tensors"
        ) from error
