"""From a model's name to parameters on the device, with the log lines of a start."""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import logging
import pathlib
import sys
import time
from typing import Any

import jax
import tqdm
from flax import nnx

from jaxserve import hub
from jaxserve.config import EngineConfig
from jaxserve.memory_plan import format_bytes
from jaxserve.models.config import ModelConfig
from jaxserve.models.fuse import Fuser
from jaxserve.models.load_format import open_checkpoint
from jaxserve.models.pooling import PoolingConfig
from jaxserve.models.registry import head_of, is_pooled, random_params
from jaxserve.models.weights import ShardProgress, load_params

logger = logging.getLogger(__name__)

BARE_NAMES = ("embed_tokens.weight", "embeddings.word_embeddings.weight")
DIGEST_THREADS = 8  # hashing leaves the GIL
SHARD_BAR = (
    "{desc}: {percentage:3.0f}% Completed | {n_fmt}/{total_fmt} "
    "[{elapsed}<{remaining}, {rate_fmt}{postfix}]\n"
)


@dataclasses.dataclass(frozen=True)
class ModelFiles:
    """A model's folder and what its config.json says; nothing is loaded yet."""

    folder: str
    config: ModelConfig
    model_type: str
    overrides: dict[str, Any]  # laid over config.json

    @classmethod
    def find(cls, config: EngineConfig) -> "ModelFiles":
        """Raises FileNotFoundError or ValueError where there is no such model, or none we serve."""
        folder = hub.resolve(
            config.model_path,
            needed_parts(config),
            revision=config.revision,
            download_dir=config.download_dir,
        )
        try:
            overrides = json.loads(config.json_model_override_args)
        except ValueError as error:
            raise ValueError(f"--json-model-override-args is not JSON: {error}") from error
        if not isinstance(overrides, dict):
            raise ValueError("--json-model-override-args must be a JSON object")
        model = ModelConfig.from_pretrained(folder, config.context_length, overrides)
        if config.dtype != "auto":
            model = dataclasses.replace(model, dtype=config.dtype)
        with open(f"{folder}/config.json") as file:
            raw = json.load(file) | overrides
        if config.is_embedding or is_pooled(model.architecture):
            pooling = _find_pooling(folder, raw, model, config.load_format)
            if config.deterministic and model.encoder is not None:
                raise ValueError(f"--deterministic: {model.architecture} has no such attention")
            if config.deterministic and pooling.mode == "mean":
                raise ValueError("--deterministic: a mean depends on the chunks of a text")
            model = dataclasses.replace(model, pooling=pooling)
        return cls(folder, model, raw.get("model_type", ""), overrides)

    def load(self, abstract: nnx.State, load_format: str, seed: int) -> nnx.State:
        """Reads the checkpoint, or draws random weights where `load_format` is "dummy".

        Args:
          abstract: from `create_model`.

        Raises:
          FileNotFoundError, ValueError: the checkpoint is not there or does not fit.
        """
        logger.info("Load weight begin.")
        start = time.perf_counter()
        if load_format == "dummy":
            params = random_params(abstract, jax.random.key(seed))
        else:
            params = self._read(load_format, abstract)
        jax.block_until_ready(params)
        logger.info(
            "Load weight end. type=%s, dtype=%s, mem usage=%s, %.1f s.",
            self.config.architecture,
            self.config.dtype,
            format_bytes(num_bytes(params)),
            time.perf_counter() - start,
        )
        return params

    def digest(self, load_format: str) -> str:
        """Of config.json and the files that hold the weights, whatever their folder."""
        paths = [pathlib.Path(self.folder, "config.json")]
        if load_format != "dummy":
            checkpoint = open_checkpoint(self.folder, load_format)
            paths += checkpoint.descriptors()
            checkpoint.close()
        with concurrent.futures.ThreadPoolExecutor(DIGEST_THREADS) as pool:
            digests = pool.map(_sha256, paths)
        names = [path.relative_to(self.folder) for path in paths]
        lines = [f"{name} {digest}\n" for name, digest in zip(names, digests, strict=True)]
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def take(self, abstract: nnx.State, params: Any) -> nnx.State:
        """Weights that the program around us has, from any tree with the checkpoint's names.

        Raises:
          ValueError: it does not fit the model; names every difference.
        """
        fused = Fuser(abstract).fuse(params)
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        return jax.device_put(fused, device)

    def _read(self, load_format: str, abstract: nnx.State) -> nnx.State:
        checkpoint = open_checkpoint(self.folder, load_format, abstract)
        is_folder = checkpoint.files[0].path.is_dir()
        bar = tqdm.tqdm(
            total=len(checkpoint.files),
            desc=f"Loading {'orbax checkpoint' if is_folder else 'safetensors checkpoint shards'}",
            bar_format=SHARD_BAR,
            mininterval=0,
            file=sys.stderr,
            disable=not logger.isEnabledFor(logging.INFO),
        )
        start = time.perf_counter()

        def on_file(done: int, total: int, gigabytes: float) -> None:
            seconds = max(time.perf_counter() - start, 1e-9)
            bar.set_postfix_str(f"{gigabytes / seconds:.2f} GB/s", refresh=False)
            bar.update()

        try:
            progress = ShardProgress(checkpoint, abstract, on_file)
            return load_params(checkpoint, abstract, on_bytes=progress)
        finally:
            bar.close()
            checkpoint.close()


def _find_pooling(
    folder: str, raw: dict[str, Any], model: ModelConfig, load_format: str
) -> PoolingConfig:
    head = head_of(model.architecture)
    is_bare = head is None and is_pooled(model.architecture)
    # `AutoModel` writes bare names whatever the architecture is called: the file decides.
    if head is None and load_format != "dummy":
        with contextlib.suppress(FileNotFoundError):  # the caller has the weights
            checkpoint = open_checkpoint(folder, load_format)
            is_bare = any(name in checkpoint for name in BARE_NAMES)
            checkpoint.close()
    return PoolingConfig.of(
        folder,
        raw,
        hidden_size=model.hidden_size,
        head=head,
        is_bare=is_bare,
        is_whole=model.encoder is not None,
    )


def needed_parts(config: EngineConfig) -> set[hub.Part]:
    """What a start reads of `model_path`."""
    parts: set[hub.Part] = {"config"}
    if config.load_format not in ("dummy", "orbax"):  # the hub has no orbax checkpoints
        parts.add("weights")
    if not config.skip_tokenizer_init and not config.tokenizer_path:
        parts.add("tokenizer")
    return parts


def _sha256(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def num_bytes(params: nnx.State) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
