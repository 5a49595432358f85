"""Compiled programs are kept between starts, unless the program around us keeps them itself."""

import logging
import os
import pathlib

import jax

logger = logging.getLogger(__name__)
DEFAULT = "~/.cache/jaxserve"


def enable(folder: str | None) -> None:
    """Turns JAX's persistent cache on, in `folder` (mode 0700); "none" turns it off. None leaves a
    cache as it is that the program around us, or JAX_COMPILATION_CACHE_DIR, has set."""
    if folder == "none":
        jax.config.update("jax_compilation_cache_dir", None)
    if folder == "none" or (folder is None and jax.config.jax_compilation_cache_dir):
        return
    path = pathlib.Path(folder or DEFAULT).expanduser()
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        logger.warning("no compilation cache: %s", error)
        return
    status = path.stat()
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        # Programs are run from here: nobody else may write them.
        logger.warning("no compilation cache: others may write to %s", path)
        return
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
