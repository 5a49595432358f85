"""A model's name to the folder that holds it. The only outbound connection, and only at start."""

import json
import pathlib
from typing import Any, Literal

# What is to be read of a repository; nothing else is downloaded, weights least of all.
Part = Literal["config", "weights", "tokenizer"]
SMALL_FILES = ("*.json", "*.model", "*.tiktoken", "*.jinja", "*.txt")
WEIGHTS, INDEX = "*.safetensors", "model.safetensors.index.json"
TOKENIZERS = ("tokenizer.json", "*.model", "*.tiktoken", "vocab.*")  # one of them is enough
FIRST_FILES = ("config.json", "tokenizer_config.json", "tokenizer.json")  # one is always there


def resolve(
    name: str,
    parts: set[Part],
    *,
    revision: str | None = None,
    download_dir: str | None = None,
) -> str:
    """A folder as it is; else a repository of the Hugging Face hub, from its cache if all that is
    needed is there. What an interrupted download has left is completed.

    Raises:
      FileNotFoundError: no such folder, and no such repository could be had; says what to do.
    """
    if pathlib.Path(name).is_dir():
        return name
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise FileNotFoundError(f"{name} is no folder")
    where = {"revision": revision, "cache_dir": download_dir}
    cached = _find_cached(name, where)
    missing = _missing(cached, parts) if cached else ""
    if cached and not missing:
        return str(cached)
    folder = _download(name, parts, where, missing)
    # Without a hub, its library gives what is cached. A missing tokenizer is told of by whoever
    # looks for it.
    if missing := _missing(folder, parts - {"tokenizer"}):
        raise FileNotFoundError(_unreachable(name, missing))
    return str(folder)


def find_cached(name: str, download_dir: str | None = None) -> pathlib.Path | None:
    """The folder of a repository that is in the hub's cache; asks nobody."""
    return _find_cached(name, {"revision": None, "cache_dir": download_dir})


def _find_cached(name: str, where: dict[str, Any]) -> pathlib.Path | None:
    import huggingface_hub

    for file in FIRST_FILES:
        try:
            path = huggingface_hub.try_to_load_from_cache(name, file, **where)
        except (huggingface_hub.errors.HFValidationError, OSError):
            return None
        if isinstance(path, str):
            return pathlib.Path(path).parent
    return None


def _missing(folder: pathlib.Path, parts: set[Part]) -> str:
    """What of the parts a folder lacks, in words; "" for nothing."""
    if "config" in parts and not (folder / "config.json").exists():
        return "config.json"
    if "weights" in parts and (lacking := _missing_weights(folder)):
        return lacking
    has_tokenizer = any(any(folder.glob(pattern)) for pattern in TOKENIZERS)
    return "tokenizer" if "tokenizer" in parts and not has_tokenizer else ""


def _missing_weights(folder: pathlib.Path) -> str:
    index = folder / INDEX
    if not index.exists():
        return "" if any(path.exists() for path in folder.glob(WEIGHTS)) else WEIGHTS
    try:
        names = set(json.loads(index.read_bytes())["weight_map"].values())
        lacking = sorted(name for name in names if not (folder / name).exists())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return ""  # the loader says what is wrong with it
    return f"{lacking[0]} ({len(lacking)} of {len(names)} shards)" if lacking else ""


def _download(name: str, parts: set[Part], where: dict[str, Any], missing: str) -> pathlib.Path:
    import huggingface_hub
    from huggingface_hub import errors

    patterns = [*SMALL_FILES, *([WEIGHTS] if "weights" in parts else [])]
    try:
        return pathlib.Path(
            huggingface_hub.snapshot_download(name, allow_patterns=patterns, **where)
        )
    except (errors.HfHubHTTPError, errors.HFValidationError) as error:
        raise FileNotFoundError(f"{name} (repository not found): {_first_line(error)}") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, OSError) as error:
        raise FileNotFoundError(_unreachable(name, missing)) from error


def _unreachable(name: str, missing: str) -> str:
    from huggingface_hub import constants

    cached = f"is in the hub's cache without its {missing}" if missing else "is not cached"
    offline = " (HF_HUB_OFFLINE is set)" if constants.HF_HUB_OFFLINE else ""
    return (
        f"{name} is no folder, {cached}, and the hub cannot be reached or has it not{offline}; "
        "download it where there is a network and give its folder to --model-path"
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
