"""Compiled programs are kept between starts, unless the program around us keeps them itself."""

import logging
import os
import pathlib

import jax

logger = logging.getLogger(__name__)
DEFAULT = "~/.cache/jaxserve"


def enable(folder: str | None) -> None:
    """Turns JAX's persistent cache on, in `folder` (mode 0700); "none" leaves it as it is."""
    if folder == "none" or jax.config.jax_compilation_cache_dir:
        return
    path = pathlib.Path(folder or DEFAULT).expanduser()
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        logger.warning("no compilation cache: %s", error)
        return
    if not os.access(path, os.W_OK):
        logger.warning("no compilation cache: %s is not writable", path)
        return
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
