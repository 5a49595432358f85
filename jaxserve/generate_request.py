"""The body of /generate, in SGLang's shape, to one item per prompt."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxserve.body_fields import as_object, flag, integer, refuse_unserved
from jaxserve.errors import RequestError
from jaxserve.logprob_options import logprob_options
from jaxserve.prompt_items import Item, namespace_of, priority_of, prompts_of, rids_of
from jaxserve.sampling_params import MOST_SAMPLES, SamplingParams

# Keys that SGLang knows and we do not serve yet: these values mean "not asked for".
NOT_SERVED: dict[str, tuple[Any, ...]] = {
    "input_embeds": (),
    "image_data": (),
    "audio_data": (),
    "video_data": (),
    "return_hidden_states": (False,),
    "lora_path": (),
    "lora_id": (),
    "session_params": (),
    "session_id": (),
    "custom_logit_processor": (),
    "bootstrap_host": (),
    "max_thinking_tokens": (),
}


@dataclasses.dataclass(frozen=True)
class GenerateRequest:
    """A checked body. A batch is answered with a list, even a batch of one."""

    items: list[Item]  # of `num_samples` answers each
    num_samples: int
    is_batch: bool
    stream: bool
    return_prompt_token_ids: bool
    return_text_in_logprobs: bool

    @classmethod
    def parse(
        cls, body: Any, preferred: Mapping[str, Any] | None = None, *, most_items: int = 256
    ) -> "GenerateRequest":
        """Checks everything that can be told without the tokenizer.

        Args:
          preferred: sampling parameters under each request's own.

        Raises:
          RequestError: names the field.
        """
        body = as_object(body)
        refuse_unserved(body, NOT_SERVED)
        texts, ids, is_batch = prompts_of(body)
        count = len(texts)
        given = _spread(body.get("sampling_params"), count, is_batch)
        merged = [_merge(preferred, own) for own in given]
        num_samples = _num_samples(merged)
        if count * num_samples > most_items:
            what = "prompts" if num_samples == 1 else "answers (prompts times n)"
            name = "input_ids" if body.get("text") is None else "text"
            raise RequestError(
                f"at most {most_items} {what} in a request, got {count * num_samples}",
                param=name if num_samples == 1 else "n",
            )
        rids = rids_of(body.get("rid") if num_samples == 1 else None, count, is_batch)
        logprobs = logprob_options(body, count, is_batch=is_batch, num_samples=num_samples)
        priority, namespace = priority_of(body), namespace_of(body)
        experts_from = _experts_from(body)
        items = [
            Item(
                rid=rids[i],
                text=texts[i],
                input_ids=ids[i],
                sampling=SamplingParams.parse(merged[i]),
                logprobs=logprobs[i],
                asked_tokens=(given[i] or {}).get("max_new_tokens"),
                priority=priority,
                namespace=namespace,
                experts_from=experts_from,
            )
            for i in range(count)
        ]
        return cls(
            items=items,
            num_samples=num_samples,
            is_batch=is_batch or num_samples > 1,
            stream=flag(body, "stream"),
            return_prompt_token_ids=flag(body, "return_prompt_token_ids"),
            return_text_in_logprobs=flag(body, "return_text_in_logprobs"),
        )


def _experts_from(body: Mapping[str, Any]) -> int | None:
    is_wanted = flag(body, "return_routed_experts")
    start = integer(body, "routed_experts_start_len", 0)
    if start < 0:
        raise RequestError(
            f"routed_experts_start_len must not be negative, got {start}",
            param="routed_experts_start_len",
        )
    return start if is_wanted else None


def _spread(given: Any, count: int, is_batch: bool) -> list[Any]:
    if isinstance(given, list):
        if not is_batch or len(given) != count:
            raise RequestError(
                f"{len(given)} sampling_params for {count} prompts", param="sampling_params"
            )
        return given
    return [given] * count


def _merge(preferred: Mapping[str, Any] | None, given: Any) -> Any:
    own = {} if given is None else given
    return {**preferred, **own} if preferred and isinstance(own, Mapping) else own


def _num_samples(parameters: list[Any]) -> int:
    """The `n` of all prompts, which must be the same; counted before anything is made of it."""
    counts = [p.get("n") or 1 for p in parameters if isinstance(p, Mapping)] or [1]
    count = counts[0]
    if counts.count(count) < len(counts):
        raise RequestError(
            "The parallel_sample_num should be the same for all samples in sample params.",
            param="n",
        )
    if type(count) is not int or not 1 <= count <= MOST_SAMPLES:
        raise RequestError(
            f"n must be an integer from 1 to {MOST_SAMPLES}, got {count!r}.", param="n"
        )
    return count
