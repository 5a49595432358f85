"""A model's name to the folder that holds it. The only outbound connection, and only at start."""

import pathlib

FILES = ["*.json", "*.safetensors", "*.model", "*.tiktoken", "*.jinja", "*.txt"]


def resolve(name: str, *, revision: str | None = None, download_dir: str | None = None) -> str:
    """A folder as it is; else a repository of the Hugging Face hub, from its cache if it is there.

    Raises:
      FileNotFoundError: no such folder, and no such repository could be had; says what to do.
    """
    if pathlib.Path(name).is_dir():
        return name
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise FileNotFoundError(f"{name} is no folder")
    import huggingface_hub
    from huggingface_hub import errors

    where = {"revision": revision, "cache_dir": download_dir, "allow_patterns": FILES}
    try:
        return huggingface_hub.snapshot_download(name, local_files_only=True, **where)
    except (errors.LocalEntryNotFoundError, errors.HFValidationError, OSError):
        pass
    try:
        return huggingface_hub.snapshot_download(name, **where)
    except (errors.HfHubHTTPError, errors.HFValidationError) as error:
        raise FileNotFoundError(f"{name} (repository not found): {_first_line(error)}") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, OSError) as error:
        offline = " (HF_HUB_OFFLINE is set)" if huggingface_hub.constants.HF_HUB_OFFLINE else ""
        raise FileNotFoundError(
            f"{name} is no folder, is not in the hub's cache, and the hub cannot be reached"
            f"{offline}; download it where there is a network and give its folder to --model-path"
        ) from error


def find_cached(name: str, download_dir: str | None = None) -> pathlib.Path | None:
    """The folder of a repository that is in the hub's cache; asks nobody."""
    import huggingface_hub
    from huggingface_hub import errors

    try:
        folder = huggingface_hub.snapshot_download(
            name, local_files_only=True, cache_dir=download_dir, allow_patterns=FILES
        )
    except (errors.LocalEntryNotFoundError, errors.HFValidationError, OSError):
        return None
    return pathlib.Path(folder)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
