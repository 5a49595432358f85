"""How new weights get to where the old ones are: `--weight-reload`.

Each way first loads, in a thread of its own while steps go on, and reads and checks every byte;
`commit` then is called between two steps, and is what they wait for.

  aside     loads onto the device, beside the old weights; commit exchanges references.
  host      loads into the host's memory; commit overwrites leaf by leaf.
  in-place  only looks at every byte; commit reads again, over the old weights. If a file cannot be
            read then, or was rewritten meanwhile, the old weights are gone, and the new ones are
            not there: nothing is generated until a reload succeeds.
"""

import concurrent.futures
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import jax
import numpy as np

from jaxserve.memory_plan import format_bytes
from jaxserve.models.weights import READERS, Index
from jaxserve.runner import Runner

Read = Callable[[int, Index], np.ndarray]  # a leaf's number and a block of it
OTHER_WAYS = {
    "aside": ("on the device, beside the old ones", "host"),
    "host": ("in the host's memory", "in-place, or aside where the device has room"),
}


class NoRoom(ValueError):
    """There is not the memory that a way needs."""

    def __init__(self, way: str, amount: str = ""):
        where, other = OTHER_WAYS[way]
        super().__init__(
            f"--weight-reload {way} needs room for the new weights {where}{amount}: start with "
            f"--weight-reload {other}"
        )


class WeightsLost(RuntimeError):
    """The old weights are overwritten, and the new ones are not complete."""


class Loaded(Protocol):
    """New values of some leaves, all of them read and checked."""

    def check(self) -> None:
        """Raises ValueError where it has become impossible to commit, and nothing is lost yet."""
        ...

    def commit(self, runner: Runner) -> None:
        """To be called with no step in flight. Raises WeightsLost."""
        ...


class Source(Protocol):
    """Where they come from."""

    leaves: Sequence[int]  # the numbers of those that change

    def read(self, number: int, index: Index) -> np.ndarray:
        """A block of a leaf, in its dtype. Raises ValueError, OSError."""
        ...

    def check_unchanged(self) -> None:
        """Raises ValueError where what has been read is not one and the same content."""
        ...


def load(way: str, source: Source, specs: Sequence[jax.ShapeDtypeStruct], free: int) -> Loaded:
    """Reads all of `source` in the way that `--weight-reload` names.

    Args:
      specs: of all leaves of the model.
      free: bytes of the memory that the way loads into.

    Raises:
      NoRoom, ValueError, OSError: nothing has changed.
    """
    changing = {number: specs[number] for number in source.leaves}
    needed = sum(map(shard_bytes, changing.values()))
    if way != "in-place" and needed > free:
        raise NoRoom(way, f", {format_bytes(needed)}, of which {format_bytes(needed - free)} lack")
    load_in = {"aside": _load_aside, "host": _load_to_host, "in-place": _look}[way]
    loaded = load_in(source, changing)
    source.check_unchanged()
    return loaded


class _Aside:
    def __init__(self, leaves: dict[int, jax.Array]):
        self._leaves = leaves

    def check(self) -> None:
        pass

    def commit(self, runner: Runner) -> None:
        runner.swap(self._leaves)


class _InHost:
    def __init__(self, blocks: dict[int, dict[Index, np.ndarray]]):
        self._blocks = blocks

    def check(self) -> None:
        pass

    def commit(self, runner: Runner) -> None:
        _overwrite(runner, self._blocks, lambda number, index: self._blocks[number][index])


class _InFiles:
    def __init__(self, source: Source):
        self._source = source

    def check(self) -> None:
        self._source.check_unchanged()

    def commit(self, runner: Runner) -> None:
        _overwrite(runner, self._source.leaves, self._source.read)
        try:
            self._source.check_unchanged()
        except ValueError as error:
            raise WeightsLost(str(error)) from error


def _load_aside(source: Source, specs: dict[int, jax.ShapeDtypeStruct]) -> Loaded:
    def place(number: int) -> jax.Array:
        return _place(specs[number], functools.partial(source.read, number))

    try:
        leaves = dict(zip(specs, _in_threads(place, specs), strict=True))
        jax.block_until_ready(leaves)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise NoRoom("aside") from error
    return _Aside(leaves)


def _load_to_host(source: Source, specs: dict[int, jax.ShapeDtypeStruct]) -> Loaded:
    def read(number: int) -> dict[Index, np.ndarray]:
        return {index: source.read(number, index) for index in _indices(specs[number])}

    return _InHost(dict(zip(specs, _in_threads(read, specs), strict=True)))


def _look(source: Source, specs: dict[int, jax.ShapeDtypeStruct]) -> Loaded:
    def look(number: int) -> None:
        for index in _indices(specs[number]):
            source.read(number, index)

    _in_threads(look, specs)
    return _InFiles(source)


def _overwrite(runner: Runner, numbers: Iterable[int], read: Read) -> None:
    def overwrite(number: int) -> None:
        spec = runner.weight_specs[number]
        runner.overwrite(number, lambda: _place(spec, functools.partial(read, number)))

    try:
        for number in numbers:
            overwrite(number)
        jax.block_until_ready(runner.weights)
    except Exception as error:
        raise WeightsLost(f"{type(error).__name__}: {error}") from error


def _place(spec: jax.ShapeDtypeStruct, read: Callable[[Index], np.ndarray]) -> jax.Array:
    return jax.make_array_from_callback(spec.shape, spec.sharding, read)


def _indices(spec: jax.ShapeDtypeStruct) -> set[Index]:
    """The blocks of a leaf that this process's devices hold."""
    return set(spec.sharding.addressable_devices_indices_map(spec.shape).values())


def _in_threads(function: Callable, numbers: Iterable[int]) -> list:
    with concurrent.futures.ThreadPoolExecutor(READERS) as pool:
        return list(pool.map(function, numbers))


def shard_bytes(spec: jax.ShapeDtypeStruct) -> int:
    """Of a leaf, on one device."""
    shape = spec.sharding.shard_shape(spec.shape)
    return math.prod(shape) * spec.dtype.itemsize
