"""The body of /encode, in SGLang's shape, to one item per text; and its requests."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import msgspec

from jaxserve.body_fields import as_object, flag, refuse_unserved
from jaxserve.errors import RequestError
from jaxserve.messages import EmbeddingInfo, EngineInfo
from jaxserve.prompt_items import Item, body_items
from jaxserve.request import Request
from jaxserve.request_builder import make_request
from jaxserve.sampling_params import SamplingParams
from jaxserve.tokenizer import Tokenizer

MOST_TEXTS = 2048  # in one call, as OpenAI has it
NO_EMBEDDINGS = (
    "This model does not appear to be an embedding model by default. Please add `--is-embedding` "
    "when launching the server or try another model."
)
ONLY_EMBEDDINGS = (
    "This model answers with embeddings, not with text: POST /encode, or launch a server without "
    "--is-embedding, with a model that predicts tokens."
)

NO_PAIRS = "text must be a string or a list of strings: only an encoder takes pairs of texts"

# Keys that SGLang knows and we do not serve yet: these values mean "not asked for".
NOT_SERVED: dict[str, tuple[Any, ...]] = {
    "image_data": (),
    "audio_data": (),
    "video_data": (),
    "input_embeds": (),
    "lora_path": (),
    "return_pooled_hidden_states": (False,),
}


@dataclasses.dataclass(frozen=True)
class EncodeRequest:
    """A checked body. A list is answered with a list, even a list of one."""

    items: list[Item]
    is_batch: bool
    dimensions: int | None  # that the vectors are cut to

    # What a `GenerateRequest` may ask of its answers.
    stream: ClassVar[bool] = False
    return_prompt_token_ids: ClassVar[bool] = False
    return_text_in_logprobs: ClassVar[bool] = False

    @classmethod
    def parse(cls, body: Any) -> "EncodeRequest":
        """Checks everything that can be told without the engine.

        Raises:
          RequestError: names the field.
        """
        body = as_object(body)
        refuse_unserved(body, NOT_SERVED)
        if body.get("text") is None and body.get("input_ids") is None:
            raise RequestError(
                "At least one of text, input_ids, image, video, or audio should be provided"
            )
        if body.get("text") is not None and body.get("input_ids") is not None:
            raise RequestError(
                "text and input_ids cannot be provided at the same time", param="input_ids"
            )
        _check_sampling(body.get("sampling_params"))
        pairs, is_one_pair = _pairs(body)
        if pairs is None:
            items, is_batch = body_items(body, most_items=MOST_TEXTS)
            return cls(items, is_batch, _dimensions(body))
        firsts = pairs[0][0] if is_one_pair else [first for first, _ in pairs]
        items, is_batch = body_items({**body, "text": firsts}, most_items=MOST_TEXTS)
        items = [
            dataclasses.replace(item, second=second)
            for item, (_, second) in zip(items, pairs, strict=True)
        ]
        return cls(items, is_batch, _dimensions(body))

    def requests(
        self, tokenizer: Tokenizer | None, info: EngineInfo, **options: Any
    ) -> list[Request]:
        """Tokenized and checked against the limits of an engine that makes vectors.

        Args:
          options: as `make_request` takes them.

        Raises:
          RequestError: names the field.
        """
        if self.dimensions is not None:
            _check_dimensions(self.dimensions, info.embedding)
        if info.encoder is None and any(item.second is not None for item in self.items):
            raise RequestError(NO_PAIRS, param="text")
        made = (make_request(item, tokenizer, info, **options) for item in self.items)
        return [msgspec.structs.replace(one, max_new_tokens=0, is_pooled=True) for one in made]


def _check_sampling(given: Any) -> None:
    """They have no effect, but must be some."""
    for parameters in given if isinstance(given, list) else [given]:
        if parameters is not None:
            SamplingParams.parse(parameters)


def _pairs(body: Mapping[str, Any]) -> tuple[list[list[str]] | None, bool]:
    """The pairs of a body, None where it has single texts or ids, and whether it is one pair alone,
    which only `is_cross_encoder_request` tells from two texts."""
    text, is_asked = body.get("text"), flag(body, "is_cross_encoder_request")
    is_list = isinstance(text, list) and bool(text)
    if not is_asked and not (is_list and isinstance(text[0], list | tuple)):
        return None, False
    is_one = is_list and isinstance(text[0], str)
    pairs = [text] if is_one else text
    if not is_list or not all(map(_is_pair, pairs)):
        raise RequestError(
            "text must be a list of pairs, [query, document], or without is_cross_encoder_request "
            "a string or a list of strings",
            param="text",
        )
    return pairs, is_one


def _is_pair(value: Any) -> bool:
    is_two = isinstance(value, list | tuple) and len(value) == 2
    return is_two and all(isinstance(one, str) for one in value)


def _dimensions(body: Mapping[str, Any]) -> int | None:
    value = body.get("dimensions")
    if value is not None and (type(value) is not int or value < 1):
        raise RequestError(
            f"dimensions must be a positive integer, got {value!r}", param="dimensions"
        )
    return value


def _check_dimensions(count: int, embedding: EmbeddingInfo) -> None:
    if embedding.dimensions is None:
        raise RequestError(
            "dimensions: this model does not support matryoshka representation (its config.json "
            "has neither is_matryoshka nor matryoshka_dimensions)",
            param="dimensions",
        )
    if count > embedding.size:
        raise RequestError(
            f"dimensions must be at most {embedding.size}, the size of the model's vectors, got "
            f"{count}",
            param="dimensions",
        )
    if embedding.dimensions and count not in embedding.dimensions:
        raise RequestError(
            f"dimensions must be one of {embedding.dimensions}, got {count}", param="dimensions"
        )
