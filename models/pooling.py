"""How a text becomes one vector: what config.json and the files of sentence-transformers say."""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, get_args

PoolingMode = Literal["last", "cls", "mean", "max"]  # cls: the first token
HeadKind = Literal["score", "reward", "classifier"]  # the last one of an encoder
ReadText = Callable[[pathlib.Path], str]

MODULES_FILE = "modules.json"
PREFIX = "pooling_mode_"
MODE_OF_KEY: dict[str, PoolingMode] = {
    "pooling_mode_lasttoken": "last",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
}


class Module(NamedTuple):
    """One of those that sentence-transformers runs one after the other."""

    kind: str  # "Transformer", "Pooling", "Normalize", and others
    folder: str  # of its files, below the model's; "" for that itself


@dataclasses.dataclass(frozen=True)
class PoolingConfig:
    """What follows the last layer of a model that answers with vectors."""

    size: int  # numbers of a vector
    mode: PoolingMode = "last"
    is_normalized: bool = True  # to length 1
    head: HeadKind | None = None  # scores in place of the hidden state
    is_bare: bool = False  # its tensors have no `model.` before their names
    # Sizes that a vector may be cut to (matryoshka); empty: any; None: only its own.
    dimensions: tuple[int, ...] | None = None
    labels: tuple[str, ...] = ()  # of the scores, as config.json calls them
    is_whole: bool = False  # an encoder's texts, each of them computed in one step

    @property
    def needs_all_tokens(self) -> bool:
        """Every token of a text must pass by, step after step: none may come from a prefix
        cache."""
        return self.mode != "last" and not (self.mode == "cls" and self.is_whole)

    @classmethod
    def of(
        cls,
        folder: str | pathlib.Path,
        raw: Mapping[str, Any],
        *,
        hidden_size: int,
        head: HeadKind | None,
        is_bare: bool = False,
        is_whole: bool = False,
        read_text: ReadText = pathlib.Path.read_text,
    ) -> "PoolingConfig":
        """Of a model's folder and its config.json. Without files of sentence-transformers, the
        hidden state of one token, normalized: the last one, or the first of an encoder, where it
        sees the whole text too. A head's scores are always of that token.

        Raises:
          FileNotFoundError: one is named that is missing.
          ValueError: the files are no such files, or ask for what is not served; names the file.
        """
        default_mode: PoolingMode = "cls" if is_whole else "last"
        shared = {"is_bare": is_bare, "is_whole": is_whole}
        if head is not None:
            size = _num_labels(raw, head)
            labels = _labels(raw, size)
            return cls(size, default_mode, False, head=head, labels=labels, **shared)
        mode, is_normalized = _read_pooling(pathlib.Path(folder), default_mode, read_text)
        return cls(
            hidden_size,
            mode,
            is_normalized,
            dimensions=_dimensions(raw, hidden_size),
            **shared,
        )


def _num_labels(raw: Mapping[str, Any], head: HeadKind) -> int:
    """As transformers has it: `num_labels` is written as the labels themselves, and is two where
    nothing is said. A reward model has one score."""
    labels = raw.get("id2label")
    default = len(labels) if isinstance(labels, dict) else 1 if head == "reward" else 2
    count = raw.get("num_labels", default)
    if not isinstance(count, int) or isinstance(count, bool) or not 0 < count <= 1 << 16:
        raise ValueError(f"config.json: num_labels is {count!r}, needs a positive integer")
    return count


def _labels(raw: Mapping[str, Any], count: int) -> tuple[str, ...]:
    named = raw.get("id2label")
    named = named if isinstance(named, dict) else {}
    return tuple(str(named.get(str(i), f"LABEL_{i}")) for i in range(count))


def _dimensions(raw: Mapping[str, Any], hidden_size: int) -> tuple[int, ...] | None:
    listed = raw.get("matryoshka_dimensions")
    if listed is None:
        return () if raw.get("is_matryoshka") else None
    are_sizes = isinstance(listed, list) and all(type(one) is int for one in listed)
    if not are_sizes or not all(0 < one <= hidden_size for one in listed):
        raise ValueError(
            f"config.json: matryoshka_dimensions is {listed!r}, needs sizes up to {hidden_size}"
        )
    return tuple(listed)


def read_modules(
    folder: pathlib.Path, read_text: ReadText = pathlib.Path.read_text
) -> list[Module]:
    """What a folder's modules.json lists. Raises FileNotFoundError, and ValueError where it is none
    or names a folder outside its own."""
    path, modules = folder / MODULES_FILE, []
    for one in _read_json(path, list, read_text):
        if not isinstance(one, dict):
            raise ValueError(f"{path}: {one!r} is no module")
        inner = pathlib.PurePath(str(one.get("path") or ""))
        if inner.is_absolute() or ".." in inner.parts:
            raise ValueError(f"{path} names a folder outside its own: {str(inner)!r}")
        kind = str(one.get("type")).rpartition(".")[2]
        modules.append(Module(kind, "" if inner == pathlib.PurePath() else str(inner)))
    return modules


def _read_pooling(
    folder: pathlib.Path, default_mode: PoolingMode, read_text: ReadText
) -> tuple[PoolingMode, bool]:
    """The mode, and whether vectors are normalized."""
    path = folder / MODULES_FILE
    if not path.exists():
        return default_mode, True
    modules = read_modules(folder, read_text)
    kinds = [module.kind for module in modules]
    if set(kinds) - {"Transformer", "Pooling", "Normalize"} or kinds.count("Pooling") > 1:
        raise ValueError(f"{path}: modules {kinds} are not served, only one Pooling and Normalize")
    mode = default_mode
    if "Pooling" in kinds:
        inner = modules[kinds.index("Pooling")].folder
        mode = _read_mode(folder / inner / "config.json", read_text)
    return mode, "Normalize" in kinds


def _read_mode(path: pathlib.Path, read_text: ReadText) -> PoolingMode:
    raw = _read_json(path, dict, read_text)
    chosen = [key for key, value in raw.items() if key.startswith(PREFIX) and value is True]
    modes = [MODE_OF_KEY[key] for key in chosen if key in MODE_OF_KEY]
    if isinstance(named := raw.get("pooling_mode"), str):  # as newer versions write it
        modes = [
            mode for key, mode in MODE_OF_KEY.items() if named in (mode, key.removeprefix(PREFIX))
        ]
        chosen = [named]
    if len(chosen) != 1 or len(modes) != 1:
        known = ", ".join(get_args(PoolingMode))
        raise ValueError(f"{path}: pooling by {chosen or 'nothing'} is not served; known: {known}")
    return modes[0]


def _read_json(path: pathlib.Path, kind: type, read_text: ReadText) -> Any:
    try:
        content = json.loads(read_text(path))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} is missing, which {MODULES_FILE} names") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, kind):
        raise ValueError(f"{path} holds no JSON {'array' if kind is list else 'object'}")
    return content
