"""Whether another folder's tokenizer is the one that runs: by content, since whoever saves one anew
may write it otherwise."""

import hashlib
import json
import pathlib
from collections.abc import Callable
from typing import Any

import tokenizers

ReadText = Callable[[pathlib.Path], str]


class TokenizerIdentity:
    """Of the tokenizer in a folder. Remembers the files that were equal: comparing two of a large
    vocabulary takes a second in which nothing else in this process runs."""

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
        except Exception as error:  # tokenizers raises nothing narrower
            raise ValueError(f"{name} is not sound: {error}") from error
        if is_equal:
            equal.add(_digest(theirs))
        return is_equal


def _canonical(text: str) -> str:
    """As this version of the library writes it; padding and truncation are the caller's affair."""
    tokenizer = tokenizers.Tokenizer.from_str(text)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer.to_str()


def _eos(text: str) -> str | None:
    token = json.loads(text).get("eos_token")
    return token.get("content") if isinstance(token, dict) else token


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
