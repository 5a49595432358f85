"""From what is asked for to new weights, read and checked. Runs beside the engine's loop."""

import dataclasses
import logging
import pathlib
import time
import traceback
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np
from flax import nnx

from jaxserve import memory_plan, weight_placement
from jaxserve.background import GivenUp
from jaxserve.errors import RequestError
from jaxserve.models.checkpoint import Checkpoint
from jaxserve.models.safetensors_file import SafetensorsBytes, SafetensorsFile
from jaxserve.models.weights import Index, ParamReader, check, views
from jaxserve.runner import Runner
from jaxserve.served_weights import copy_to_host
from jaxserve.weight_folder import Served, WeightFolder
from jaxserve.weight_request import LOAD_FORMATS, WeightUpdate
from jaxserve.weight_values import ValueCheck
from jaxserve.weights_root import WeightsRoot

logger = logging.getLogger(__name__)
ROLLED_BACK = "Rolling back to original weights."


class UpdateFailed(RequestError):
    """New weights that cannot be had, or cannot be used; the old ones serve on."""


@dataclasses.dataclass(frozen=True)
class LoadedUpdate:
    """New weights, ready to take their places."""

    folder: str | None
    names: frozenset[str]  # the checkpoint tensors that are given
    num_bytes: int
    seconds: float
    is_checksummed: bool
    zeros: list[str]  # tensors that hold nothing else
    _loaded: weight_placement.Loaded
    _checkpoint: Checkpoint | None

    def check(self, runner: Runner) -> None:
        """Raises UpdateFailed where they do not fit, or are not any more what was checked."""
        try:
            self._loaded.check(runner)
        except ValueError as error:
            raise UpdateFailed(f"Failed to update weights: {error}.\n{ROLLED_BACK}") from error

    def commit(self, runner: Runner) -> None:
        """To be called with no step in flight. Raises weight_placement.WeightsLost."""
        self._loaded.commit(runner)

    def close(self) -> None:
        if self._checkpoint is not None:
            self._checkpoint.close()


class WeightLoader:
    def __init__(
        self,
        abstract: nnx.State,
        served: Served,
        root: WeightsRoot,
        way: str,
        device: jax.Device,
        timeout: float,
    ):
        """Args:
        abstract: the model's parameters, from `create_model`.
        way: `--weight-reload`, but for "auto".
        timeout: seconds without a byte read after which whoever waits should give up.
        """
        self.way, self.timeout, self._device = way, timeout, device
        self.tensor_names = frozenset(view.name for view in views(abstract))
        self.abstract, self._served, self._root = abstract, served, root

    def free_device_bytes(self) -> int:
        return memory_plan.free_memory(self._device)

    def device_bytes_in_use(self) -> int | None:
        return memory_plan.memory_in_use(self._device)

    def load(
        self, update: WeightUpdate, runner: Runner, on_bytes: Callable[[int], None]
    ) -> LoadedUpdate:
        """Changes nothing that serves. `on_bytes` is told of progress, and may raise to end it.

        Raises:
          UpdateFailed: in the words of SGLang.
        """
        if update.load_format not in LOAD_FORMATS:
            raise UpdateFailed(
                f"Failed to get model loader: {update.load_format!r} is not read here; "
                f"{', '.join(LOAD_FORMATS)} are."
            )
        path, checkpoint, prefix, end = "", None, "Failed to get weights iterator", ""
        try:
            folder = None
            if update.is_partial:
                checkpoint = self._open_tensors(update)
            else:
                path, root = self._root.find(update.model_path)
                folder = WeightFolder(
                    update.model_path, path, root, update.load_format, self.abstract
                )
                checkpoint = folder.checkpoint
            prefix, end = "Failed to update weights", f"\n{ROLLED_BACK}"
            return self._load(update, checkpoint, folder, runner, on_bytes)
        except Exception as error:
            is_known = isinstance(error, OSError | ValueError)
            words = f"{prefix}: {_say(error, path, update)}.{end}"
            if not is_known and not isinstance(error, GivenUp):
                logger.exception("new weights could not be loaded")
            # Its frames hold what was loaded already, in cycles: the device cannot wait for those
            # to be collected.
            traceback.clear_frames(error.__traceback__)
            if checkpoint is not None:
                checkpoint.close()
        raise UpdateFailed(words, status=400 if is_known else 500)

    def take(self, leaves: Mapping[int, jax.Array]) -> LoadedUpdate:
        """Arrays that are on the device already, all of the model's."""
        return LoadedUpdate(
            folder=None,
            names=self.tensor_names,
            num_bytes=sum(leaf.nbytes for leaf in leaves.values()),
            seconds=0.0,
            is_checksummed=False,
            zeros=[],
            _loaded=weight_placement.Aside(leaves),
            _checkpoint=None,
        )

    def _load(
        self,
        update: WeightUpdate,
        checkpoint: Checkpoint,
        folder: WeightFolder | None,
        runner: Runner,
        on_bytes: Callable[[int], None],
    ) -> LoadedUpdate:
        start = time.perf_counter()
        if folder is not None:
            folder.check(self._served, keep_tokenizer=update.keep_tokenizer)
        check(checkpoint, self.abstract, is_partial=update.is_partial)
        is_checksummed = folder is not None and folder.verify(on_bytes)
        values = ValueCheck()
        source = _CheckpointSource(checkpoint, self.abstract, runner, values, on_bytes)
        # Where tensors of a fused leaf are given but not all, it must be there to be read.
        way = "host" if update.is_partial and self.way == "in-place" else self.way
        on_device = way == "aside"
        free = self.free_device_bytes() if on_device else memory_plan.free_host_memory()
        loaded = weight_placement.load(way, source, runner.weight_specs, free)
        on_bytes(0)  # the last chance to end it
        return LoadedUpdate(
            folder=folder and str(folder.weights),
            names=frozenset(checkpoint.names()),
            num_bytes=sum(checkpoint.tensor(name).nbytes for name in checkpoint.names()),
            seconds=time.perf_counter() - start,
            is_checksummed=is_checksummed,
            zeros=values.zeros,
            _loaded=loaded,
            _checkpoint=checkpoint,
        )

    def _open_tensors(self, update: WeightUpdate) -> Checkpoint:
        files: list[SafetensorsFile | SafetensorsBytes] = []
        try:
            for i, content in enumerate(update.payloads):
                files.append(SafetensorsBytes(f"payload {i}", content))
            for path in update.files:
                files.append(SafetensorsFile(path, self._root.open(path)))
            names = [name for file in files for name in file.tensors]
            if len(set(names)) < len(names):
                raise ValueError("a tensor is given twice")
            if not names:
                raise ValueError("there is no tensor")
            return Checkpoint("the payload", files)
        except BaseException:
            for file in files:
                file.close()
            raise


class _CheckpointSource:
    """As `weight_placement.Source`."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        abstract: nnx.State,
        runner: Runner,
        values: ValueCheck,
        on_bytes: Callable[[int], None],
    ):
        self._reader = ParamReader(
            checkpoint,
            abstract,
            on_tensor=lambda view, part: values.look(view.name, part),
            on_bytes=lambda path, count: on_bytes(count),
        )
        self._checkpoint, self._runner = checkpoint, runner
        self.leaves: Sequence[int] = self._reader.leaves_with(checkpoint.names())

    def read(self, number: int, index: Index) -> np.ndarray:
        base = None
        if not self._reader.is_complete(number):
            base = self._current(number)[index]
        return self._reader.read(number, index, base)

    def check_unchanged(self) -> None:
        self._checkpoint.check_unchanged()

    def _current(self, number: int) -> np.ndarray:
        leaf, spec = self._runner.weights[number], self._runner.weight_specs[number]
        return np.zeros(spec.shape, spec.dtype) if leaf is None else copy_to_host(leaf)


def _say(error: Exception, path: str | pathlib.Path, update: WeightUpdate) -> str:
    """In words, with the folder's name as it was given: what it is a link to is our own affair."""
    words = str(error)
    if isinstance(error, OSError) and error.strerror:
        words = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    elif not isinstance(error, OSError | ValueError):
        words = f"{type(error).__name__}: {error}"
    if path and update.model_path:
        words = words.replace(str(path), update.model_path)
    return words.rstrip(".")
