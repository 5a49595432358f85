"""Text to token ids and back. The `tokenizers` library alone; transformers only where a model has
no tokenizer.json (it takes a second to import)."""

import json
import pathlib
from collections.abc import Sequence
from typing import Any

import tokenizers

PIECE, CUT_TOKENS = 1 << 14, 64  # characters of a text, and tokens that a cut may add to it


class Tokenizer:
    """A model's tokenizer, from the files in its folder. Safe to use from several threads."""

    def __init__(self, folder: str | pathlib.Path):
        """Raises FileNotFoundError where there is no tokenizer, ValueError for a broken one."""
        folder = pathlib.Path(folder)
        config = _read_json(folder / "tokenizer_config.json")
        path = folder / "tokenizer.json"
        backend = _fast(path) if path.exists() else _slow(folder)
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self.eos_token_id = self._id_of(config, "eos_token")
        self.vocab_size = backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """With the special tokens that the tokenizer itself adds, such as a BOS, or without."""
        try:
            return self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        except BaseException as error:
            _soften(error)
            raise

    def encode_pair(self, first: str, second: str) -> tuple[list[int], int]:
        """As the tokenizer's own template joins two texts, and how many tokens come before those
        of the second one's type."""
        try:
            encoding = self._backend.encode(first, second)
        except BaseException as error:
            _soften(error)
            raise
        types = encoding.type_ids
        return encoding.ids, types.index(1) if 1 in types else len(types)

    def beginning(self, text: str, num_tokens: int) -> str:
        """As much of a long text as surely has more than `num_tokens` tokens, else all of it.

        Tokenizing takes a second and 200 MB per million bytes; this takes time for `num_tokens`
        and memory for a piece of the text. It counts the tokens of pieces, after all that the
        tokenizer normalises, folds or drops. Assumed is only that a cut between two pieces makes
        at most `CUT_TOKENS` more of them than the uncut text has: those of a word or two.
        """
        count = 0
        for end in range(PIECE, len(text), PIECE):
            count += self._count(text[end - PIECE : end]) - CUT_TOKENS
            if count > num_tokens:
                return text[:end]
        return text

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Ids beyond the vocabulary (a model's padding of it) have no text."""
        try:
            return self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
        except BaseException as error:
            _soften(error)
            raise

    def _count(self, piece: str) -> int:
        return len(self.encode(piece, add_special_tokens=False))

    def _id_of(self, config: dict[str, Any], name: str) -> int | None:
        token = config.get(name)
        content = token.get("content") if isinstance(token, dict) else token
        if content is not None and not isinstance(content, str):
            raise ValueError(
                f"tokenizer_config.json: {name} is {token!r}, needs a string or an object with "
                "its content"
            )
        return None if content is None else self._backend.token_to_id(content)


def _soften(error: BaseException) -> None:
    """Raises RuntimeError for the library's panics: they derive from BaseException, but a text
    that it cannot do is no reason to end anything else."""
    if not isinstance(error, Exception | KeyboardInterrupt | SystemExit):
        raise RuntimeError(f"the tokenizer failed: {error}") from error


def _fast(path: pathlib.Path) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library raises nothing narrower, and panics
        raise ValueError(f"{path} is no tokenizer: {error}") from error


def _slow(folder: pathlib.Path) -> tokenizers.Tokenizer:
    from transformers import AutoTokenizer  # converts a sentencepiece or tiktoken file

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # of a missing file or package, or what it makes of a broken one
        raise FileNotFoundError(
            f"{folder} holds no tokenizer ({error}); name one with --tokenizer-path, "
            "or serve token ids with --skip-tokenizer-init"
        ) from error
    if not any((folder / name).exists() for name in tokenizer.vocab_files_names.values()):
        # transformers makes an empty one from config.json alone
        raise FileNotFoundError(
            f"{folder} holds no tokenizer; name one with --tokenizer-path, "
            "or serve token ids with --skip-tokenizer-init"
        )
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise FileNotFoundError(f"{folder}: {type(tokenizer).__name__} has no fast form")
    return backend


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object")
    return content
