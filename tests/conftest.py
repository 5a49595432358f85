"""What all tests share: shape annotations that are checked, the CPU, compiled programs kept."""

import os
import pathlib
import typing

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # read when jax is imported

import hypothesis
import jax
import jaxtyping
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
# No shapes to check (or an abstract protocol's), and beartype cannot do `typing.Self` in a method.
NO_SHAPES = {
    "jaxserve.models.checkpoint",
    "jaxserve.models.config",
    "jaxserve.models.file_identity",
    "jaxserve.models.fused_tensors",
    "jaxserve.models.fuse",
    "jaxserve.models.load_format",
    "jaxserve.models.orbax_arrays",
    "jaxserve.models.orbax_folder",
    "jaxserve.models.orbax_writer",
    "jaxserve.models.sharding",
    "jaxserve.models.interface",
    "jaxserve.models.pooling",
    "jaxserve.models.registry",
    "jaxserve.models.safetensors_file",
    "jaxserve.models.safetensors_writer",
    "jaxserve.models.weights",
}


def modules(package: str, folder: pathlib.Path) -> set[str]:
    """The modules of a folder; not the packages, whose names would stand for all within."""
    paths = [path for path in folder.rglob("*.py") if path.stem != "__init__"]
    return {".".join((package, *path.relative_to(folder).with_suffix("").parts)) for path in paths}


MODELS = modules("jaxserve.models", ROOT / "models")
JITTED = {f"jaxserve.{name}" for name in ("programs", "sampling", "state", "step")}
CHECKED = modules("pallas_kernels", ROOT / "pallas_kernels") | (MODELS - NO_SHAPES) | JITTED
jaxtyping.install_import_hook(sorted(CHECKED), "beartype.beartype")

from jaxserve.models import interface  # noqa: E402

for protocol in (interface.Attend, interface.CausalLM, interface.Embedder):
    typing.runtime_checkable(protocol)  # the check of an argument asks `isinstance`

# The same examples in every run; `--hypothesis-profile=default` draws new ones.
hypothesis.settings.register_profile("jaxserve", derandomize=True, deadline=None)
hypothesis.settings.load_profile("jaxserve")


def pytest_configure(config: pytest.Config) -> None:
    jax.config.update("jax_enable_x64", False)
    jax.config.update("jax_num_cpu_devices", 2)  # for meshes; what asks for none uses the first
    if config.pluginmanager.has_plugin("cacheprovider"):
        folder = config.cache.mkdir("jaxserve-programs")  # as tests.server.serving has it
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
