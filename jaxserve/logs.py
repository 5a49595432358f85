"""Log lines as SGLang writes them: `[2026-01-31 23:59:59] message`, on stderr."""

import logging
import sys


def set_up(level: str) -> None:
    """For the processes that are ours alone; a program that embeds jaxserve keeps its own."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("[%(asctime)s] %(message)s", "%Y-%m-%d %H:%M:%S"))
    logger = logging.getLogger("jaxserve")
    logger.handlers[:] = [handler]
    logger.setLevel(level.upper())
    logger.propagate = False
