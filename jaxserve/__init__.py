"""jaxserve: a language model server in JAX.

Names load on first use, so that importing `jaxserve.models` does not load the engine, and
`jaxserve.server` never loads jax.
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxserve.config import EngineConfig as EngineConfig
    from jaxserve.engine import Engine as Engine
    from jaxserve.request import SamplingParams as SamplingParams
    from jaxserve.step import SamplingBatch as SamplingBatch
    from jaxserve.step import StepOutput as StepOutput
    from jaxserve.step import make_step as make_step

__version__ = "0.1.0"

_EXPORTS = {
    "Engine": "jaxserve.engine",
    "EngineConfig": "jaxserve.config",
    "SamplingBatch": "jaxserve.step",
    "SamplingParams": "jaxserve.request",
    "StepOutput": "jaxserve.step",
    "make_step": "jaxserve.step",
}

# A wheel carries models/, server/ and tpu/ inside this folder; a checkout has them beside it.
_here = Path(__file__).resolve().parent
if not (_here / "models").is_dir():
    __path__.append(str(_here.parent))


def __getattr__(name: str):
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_EXPORTS])
