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
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from jaxserve.memory_plan import format_bytes
from jaxserve.models.weights import READERS, Index
from jaxserve.runner import Runner

Specs = Mapping[int, jax.ShapeDtypeStruct]  # of leaves by their numbers
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

    def check(self, runner: Runner) -> None:
        """Raises ValueError where they cannot take their places; nothing is lost yet."""
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


def reserve_pinned(leaves: Sequence[jax.Array], free: int) -> bool:
    """Takes the memory that `host` loads into, and leaves it to JAX, which keeps it: pinning it
    takes seconds, in which the device's driver does nothing else. False where `free` lacks."""
    if sum(map(shard_bytes, leaves)) > free:
        return False
    held = [jax.device_put(np.zeros(leaf.shape, leaf.dtype), _pinned(leaf)) for leaf in leaves]
    jax.block_until_ready(held)
    return True


class Aside:
    """Leaves where the runner's own are."""

    def __init__(self, leaves: Mapping[int, jax.Array]):
        self._leaves = leaves

    def check(self, runner: Runner) -> None:
        runner.check_leaves(self._leaves)

    def commit(self, runner: Runner) -> None:
        runner.swap(self._leaves)


class _InHost:
    """Leaves in the host's memory."""

    def __init__(self, leaves: Mapping[int, jax.Array]):
        self._leaves = leaves

    def check(self, runner: Runner) -> None:
        pass

    def commit(self, runner: Runner) -> None:
        def copy(number: int, spec: jax.ShapeDtypeStruct) -> jax.Array:
            return jax.device_put(self._leaves[number], spec.sharding)

        _overwrite(runner, self._leaves, copy)


class _InFiles:
    def __init__(self, source: Source):
        self._source = source

    def check(self, runner: Runner) -> None:
        self._source.check_unchanged()

    def commit(self, runner: Runner) -> None:
        def read(number: int, spec: jax.ShapeDtypeStruct) -> jax.Array:
            return _place(self._source, number, spec, spec.sharding)

        _overwrite(runner, self._source.leaves, read)
        try:
            self._source.check_unchanged()
        except ValueError as error:
            raise WeightsLost(str(error)) from error


def _load_aside(source: Source, specs: Specs) -> Loaded:
    return Aside(
        _place_all("aside", source, specs, {n: spec.sharding for n, spec in specs.items()})
    )


def _load_to_host(source: Source, specs: Specs) -> Loaded:
    pinned = {number: _pinned(spec) for number, spec in specs.items()}
    return _InHost(_place_all("host", source, specs, pinned))


def _pinned(spec: jax.Array | jax.ShapeDtypeStruct) -> jax.sharding.Sharding:
    """Memory that the device fetches from by itself."""
    return spec.sharding.with_memory_kind("pinned_host")


def _look(source: Source, specs: Specs) -> Loaded:
    def look(number: int) -> None:
        spec = specs[number]
        for index in set(spec.sharding.addressable_devices_indices_map(spec.shape).values()):
            source.read(number, index)

    _in_threads(look, specs)
    return _InFiles(source)


def _place_all(
    way: str, source: Source, specs: Specs, shardings: Mapping[int, jax.sharding.Sharding]
) -> dict[int, jax.Array]:
    def place(number: int) -> jax.Array:
        return _place(source, number, specs[number], shardings[number])

    try:
        return dict(zip(specs, _in_threads(place, specs), strict=True))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise NoRoom(way) from error


def _place(
    source: Source, number: int, spec: jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding
) -> jax.Array:
    array = jax.make_array_from_callback(
        spec.shape, sharding, lambda index: source.read(number, index)
    )
    return jax.block_until_ready(array)  # as `models.weights.load_params` does


def _overwrite(
    runner: Runner,
    numbers: Iterable[int],
    make: Callable[[int, jax.ShapeDtypeStruct], jax.Array],
) -> None:
    try:
        for number in numbers:
            runner.overwrite(number, functools.partial(make, number, runner.weight_specs[number]))
        jax.block_until_ready(runner.weights)
    except Exception as error:
        raise WeightsLost(f"{type(error).__name__}: {error}") from error


def _in_threads(function: Callable[[int], Any], numbers: Iterable[int]) -> list[Any]:
    with concurrent.futures.ThreadPoolExecutor(READERS) as pool:
        return list(pool.map(function, numbers))


def shard_bytes(spec: jax.Array | jax.ShapeDtypeStruct) -> int:
    """Of a leaf, on one device."""
    shape = spec.sharding.shard_shape(spec.shape)
    return math.prod(shape) * spec.dtype.itemsize
