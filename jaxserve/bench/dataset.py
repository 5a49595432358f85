"""The requests of a benchmark: prompts, and how many tokens are asked for. The same options give
the same requests, on every machine."""

import dataclasses
import json
import pathlib
import random
from collections.abc import Iterator
from typing import Any

from jaxserve.bench.options import DatasetOptions

NUM_PROMPTS = 64
HUMAN = ("human", "user")


@dataclasses.dataclass(frozen=True)
class Sample:
    """One request."""

    prompt: str | list[int]
    output_len: int


def make_samples(options: DatasetOptions, vocab_size: int | None) -> list[Sample]:
    """The requests that the options describe.

    Args:
      vocab_size: the model's, where it is known.

    Raises:
      ValueError: a record of the file is wrong, or the vocabulary is unknown; says which.
      OSError: the file cannot be read.
    """
    if options.dataset == "file":
        return read_samples(options.dataset_path, options.output_len, options.num_prompts)
    vocab_size = options.vocab_size or vocab_size
    if vocab_size is None:
        raise ValueError("the size of the model's vocabulary is unknown: --vocab-size tells it")
    draw = random.Random(options.seed)
    if options.dataset == "random":
        return random_samples(options, vocab_size, draw)
    return shared_prefix_samples(options, vocab_size, draw)


def random_samples(options: DatasetOptions, vocab_size: int, draw: random.Random) -> list[Sample]:
    return [
        Sample(
            _ids(draw, _length(draw, options.input_len, options.range_ratio), vocab_size),
            _length(draw, options.output_len, options.range_ratio),
        )
        for _ in range(options.num_prompts or NUM_PROMPTS)
    ]


def shared_prefix_samples(
    options: DatasetOptions, vocab_size: int, draw: random.Random
) -> list[Sample]:
    """Groups of equal size, or nearly; in a random order."""
    prefixes = [
        _ids(draw, options.system_prompt_len, vocab_size) for _ in range(options.num_groups)
    ]
    tails = random_samples(options, vocab_size, draw)
    samples = [
        Sample(prefixes[index % len(prefixes)] + tail.prompt, tail.output_len)
        for index, tail in enumerate(tails)
    ]
    draw.shuffle(samples)
    return samples


def read_samples(path: str, output_len: int, most: int | None = None) -> list[Sample]:
    """The first `most` prompts of a file; conversations in which no human speaks are left out.

    Args:
      output_len: for records that do not say their own.

    Raises:
      ValueError: a record is wrong; names the file, the place and the field.
      OSError: the file cannot be read.
    """
    samples = []
    for place, record in _records(path):
        if most is not None and len(samples) >= most:
            break
        try:
            sample = _sample(record, output_len)
        except ValueError as error:
            raise ValueError(f"{path}, {place}: {error}") from error
        if sample is not None:
            samples.append(sample)
    if not samples:
        raise ValueError(f"{path}: no prompt in it")
    return samples


def _records(path: str) -> Iterator[tuple[str, Any]]:
    """Each record and where it stands."""
    try:
        text = pathlib.Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8: {error}") from error
    if text.lstrip().startswith("["):
        for number, record in enumerate(_parse(text, path), 1):
            yield f"record {number}", record
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield f"line {number}", _parse(line, f"{path}, line {number}")


def _parse(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place}: not JSON: {error}") from error


def _sample(record: Any, output_len: int) -> Sample | None:
    if not isinstance(record, dict):
        raise ValueError(f"must be an object, got {_short(record)}")
    if "prompt" in record:
        prompt = _checked_prompt(record["prompt"])
    elif "conversations" in record or "messages" in record:
        name = "conversations" if "conversations" in record else "messages"
        prompt = _first_human_turn(record[name], name)
        if prompt is None:
            return None
    else:
        raise ValueError('has neither "prompt" nor "conversations"')
    wanted = record.get("output_len", output_len)
    if not _is_int(wanted) or wanted < 1:
        raise ValueError(f'"output_len" must be a positive integer, got {_short(wanted)}')
    return Sample(prompt, wanted)


def _checked_prompt(prompt: Any) -> str | list[int]:
    is_ids = isinstance(prompt, list) and all(_is_int(token) and token >= 0 for token in prompt)
    if not prompt or not (isinstance(prompt, str) or is_ids):
        raise ValueError(f'"prompt" must be a text or a list of token ids, got {_short(prompt)}')
    return prompt


def _first_human_turn(turns: Any, name: str) -> str | None:
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError(f'"{name}" must be a list of objects, got {_short(turns)}')
    for turn in turns:
        text = turn.get("value", turn.get("content"))
        if turn.get("from", turn.get("role")) in HUMAN and text:
            if not isinstance(text, str):
                raise ValueError(f'a turn of "{name}" must be a text, got {_short(text)}')
            return text
    return None


def _ids(draw: random.Random, count: int, vocab_size: int) -> list[int]:
    return draw.choices(range(vocab_size), k=count)


def _length(draw: random.Random, most: int, ratio: float) -> int:
    return draw.randint(max(1, int(most * ratio)), most)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
