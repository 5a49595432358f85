"""Whether another folder's tokenizer is the one that runs: by content, since whoever saves one anew
may write it otherwise. The other is never loaded: a library that a bad one crashes takes all that
is served with it."""

import hashlib
import pathlib
from collections.abc import Callable
from typing import Any

import msgspec

ReadText = Callable[[pathlib.Path], str]
# What newer versions of the library write and older ones leave out, by the type of the part.
DEFAULTS = {
    "BPE": {
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
    },
    "Unigram": {"unk_id": None, "byte_fallback": False},
    "ByteLevel": {"use_regex": True},
    "Metaspace": {"prepend_scheme": "always", "split": True},
    "Punctuation": {"behavior": "Isolated"},
    "BertNormalizer": {"strip_accents": None},
}
CALLERS = {"version", "truncation", "padding"}  # of the whole: the caller's affair
PARTS = ("added_tokens", "normalizer", "pre_tokenizer", "post_processor", "decoder", "model")


class TokenizerIdentity:
    """Of the tokenizer in a folder. Remembers the files that were equal: parsing two of a large
    vocabulary takes a moment in which nothing else in this process runs."""

    def __init__(self, folder: str | pathlib.Path):
        self._folder = pathlib.Path(folder)
        self._equal: dict[str, set[bytes]] = {}

    def differences(self, folder: pathlib.Path, read_text: ReadText) -> list[str]:
        """The names of the other folder's files that mean something else; what it lacks, or has
        and we have not, is no difference.

        Raises:
          ValueError: a file is no tokenizer's.
        """
        different = []
        for name, meaning in (("tokenizer.json", _canonical), ("tokenizer_config.json", _eos)):
            ours, theirs = self._folder / name, folder / name
            if ours.exists() and theirs.exists():
                texts = ours.read_text(), read_text(theirs)
                if not self._is_equal(name, meaning, *texts):
                    different.append(name)
        return different

    def _is_equal(self, name: str, meaning: Callable[[str], Any], ours: str, theirs: str) -> bool:
        equal = self._equal.setdefault(name, {_digest(ours)})
        if _digest(theirs) in equal:
            return True
        try:
            is_equal = meaning(ours) == meaning(theirs)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{name} is not sound: {error}") from error
        if is_equal:
            equal.add(_digest(theirs))
        return is_equal


def _canonical(text: str) -> dict[str, Any]:
    """As every version of the library would write it. The order of `added_tokens` means
    something, that of keys does not."""
    content = _read_object(text)
    whole = dict.fromkeys(PARTS) | {"added_tokens": []} | content
    model = whole["model"]
    if isinstance(model, dict):
        kind = {"type": "BPE"} if "merges" in model else {}  # early files do not name it
        merges = {"merges": [_pair(merge) for merge in _list(model.get("merges"))]}
        whole["model"] = _part(kind | model) | (merges if "merges" in model else {})
    parts = {name: part if name == "model" else _filled(part) for name, part in whole.items()}
    return {name: part for name, part in parts.items() if name not in CALLERS}


def _filled(value: Any) -> Any:
    """With the defaults of all parts within."""
    if isinstance(value, list):
        return [_filled(item) for item in value]
    if isinstance(value, dict):
        return _part({key: _filled(item) for key, item in value.items()})
    return value


def _part(part: dict[str, Any]) -> dict[str, Any]:
    kind = part.get("type")
    if kind == "Metaspace":  # "prepend_scheme" says it, and nothing reads the other
        part = {key: part[key] for key in part if key not in ("add_prefix_space", "str_rep")}
    return (DEFAULTS.get(kind, {}) if isinstance(kind, str) else {}) | part


def _pair(merge: Any) -> Any:
    """Early files write "a b" for ["a", "b"]."""
    return merge.split(" ") if isinstance(merge, str) else merge


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _eos(text: str) -> Any:
    token = _read_object(text).get("eos_token")
    return token.get("content") if isinstance(token, dict) else token


def _read_object(text: str) -> dict[str, Any]:
    content = msgspec.json.decode(text)
    if not isinstance(content, dict):
        raise ValueError("it holds no JSON object")
    return content


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
