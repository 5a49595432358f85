"""Between a checkpoint's tensors and a model's parameters, both ways, without per-model tables.

A parameter knows which tensors it holds and where (`layers.Parts`); from that follows one list of
views: (checkpoint name, parameter, index). Loading reads each tensor straight into its place.
"""

import concurrent.futures
import dataclasses
import functools
import math
import pathlib
import threading
from collections.abc import Callable, Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxserve.models.checkpoint import Checkpoint

Index = tuple[slice, ...]
BUFFERS = ("rotary_emb.inv_freq", "embeddings.position_ids")  # that old checkpoints hold
POOLER = ("pooler.dense.weight", "pooler.dense.bias")
READERS = 4  # threads: pread leaves the GIL, and one thread does not saturate a fast disk


@dataclasses.dataclass(frozen=True)
class View:
    """One checkpoint tensor and its place in a parameter."""

    name: str
    path: tuple[str | int, ...]  # of the parameter in the tree
    index: tuple[slice, ...]
    shape: tuple[int, ...]  # of the tensor in the checkpoint
    part_shape: tuple[int, ...]  # of `parameter[index]`: the same numbers in the same order


def views(params: nnx.State) -> list[View]:
    """Every checkpoint tensor that the parameters hold, in the tree's order."""
    found = []
    for path, leaf in nnx.to_flat_state(params):
        metadata = leaf.get_metadata()
        for part, index in metadata["parts"]:
            module = (*path[:-2], part) if part else path[:-1]
            part_shape = tuple(
                len(range(*cut.indices(size))) for cut, size in zip(index, leaf.shape, strict=False)
            ) + tuple(leaf.shape[len(index) :])
            shape = part_shape
            if metadata["kind"] == "matrix":
                shape = (int(np.prod(part_shape[:-1])), part_shape[-1])
            elif metadata["kind"] == "bias":
                shape = (int(np.prod(part_shape)),)
            name = ".".join(map(str, (*module, path[-1])))
            found.append(View(name, tuple(path), index, shape, part_shape))
    return found


def checkpoint_tensors(params: nnx.State) -> dict[str, np.ndarray]:
    """The parameters under the checkpoint's names and in its shapes, on the host."""
    leaves = dict(nnx.to_flat_state(params))
    host = {path: np.asarray(leaf[...]) for path, leaf in leaves.items()}
    return {
        view.name: np.ascontiguousarray(host[view.path][view.index]).reshape(view.shape)
        for view in views(params)
    }


def check(checkpoint: Checkpoint, abstract: nnx.State, *, is_partial: bool = False) -> None:
    """Compares names, shapes and dtypes from the headers alone; `is_partial` may lack tensors.

    Raises:
      ValueError: names every difference (of each sort, the first eight).
    """
    wanted = {view.name: view for view in views(abstract)}
    problems = []

    def report(what: str, names: list[str]) -> None:
        if names:
            more = f" and {len(names) - 8} more" if len(names) > 8 else ""
            problems.append(f"{what}: {', '.join(names[:8])}{more}")

    missing = [name for name in wanted if name not in checkpoint]
    report("missing", [] if is_partial else missing)
    report("not in the model", [n for n in checkpoint.names() if is_extra(n, wanted)])
    present = [view for view in wanted.values() if view.name in checkpoint]
    report(
        "wrong shape",
        [
            f"{view.name} (checkpoint {list(shape)}, model {list(view.shape)})"
            for view in present
            if (shape := checkpoint.tensor(view.name).shape) != view.shape
        ],
    )
    report(
        "not floating point",
        [
            f"{view.name} ({dtype})"
            for view in present
            if not jnp.issubdtype(dtype := checkpoint.tensor(view.name).dtype, jnp.floating)
        ],
    )
    if problems:
        raise ValueError(f"{checkpoint.folder} does not fit the model: {'; '.join(problems)}")


def is_extra(name: str, wanted: Mapping[str, View]) -> bool:
    """Whether a tensor is neither wanted nor of those that the model can do without."""
    if name in wanted or name.endswith(BUFFERS):
        return False
    if name.endswith(POOLER) and any("embeddings.word_embeddings" in one for one in wanted):
        return False  # an encoder without a head has no use for it
    return not (name == "lm_head.weight" and "model.embed_tokens.weight" in wanted)


class ParamReader:
    """Reads parameters, block by block, out of a checkpoint that has passed `check`."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        abstract: nnx.State,
        on_tensor: Callable[[View, np.ndarray], None] = lambda view, values: None,
        on_bytes: Callable[[pathlib.Path, int], None] = lambda path, count: None,
    ):
        """Args:
          abstract: from `create_model`; its leaves are numbered as `jax.tree.leaves` orders them.
          on_tensor: called with each part of a tensor that has been read, in its place.
          on_bytes: called with a file and a number of bytes as they arrive.

        Both may be called from several threads, if `read` is.
        """
        self._checkpoint, self._on_tensor, self._on_bytes = checkpoint, on_tensor, on_bytes
        self._leaves = [(tuple(path), leaf) for path, leaf in nnx.to_flat_state(abstract)]
        self._parts: dict[tuple, list[View]] = {}
        for view in views(abstract):
            self._parts.setdefault(view.path, []).append(view)

    def read(self, number: int, index: Index, base: np.ndarray | None = None) -> np.ndarray:
        """The block `index` of a leaf, assembled from the tensors that meet it, in the leaf's
        dtype. What the checkpoint lacks stays as in `base`, which is the block until now.

        Raises ValueError, OSError: a file cannot be read to its end.
        """
        path, leaf = self._leaves[number]
        bounds = [cut.indices(size)[:2] for cut, size in zip(index, leaf.shape, strict=True)]
        shape = [stop - start for start, stop in bounds]
        out = np.empty(shape, leaf.dtype) if base is None else np.array(base)
        for view in self._parts[path]:
            if base is not None and view.name not in self._checkpoint:
                continue
            starts = [cut.indices(n)[0] for cut, n in zip(view.index, leaf.shape, strict=False)]
            starts += [0] * (len(bounds) - len(starts))
            box, place = [], []
            for start, size, (low, high) in zip(starts, view.part_shape, bounds, strict=True):
                first, last = max(low, start), min(high, start + size)
                box.append((first - start, last - start))
                place.append(slice(first - low, last - low))
            if all(last > first for first, last in box):
                part = out[tuple(place)]
                _read_box(self._checkpoint, view, box, part, self._on_bytes)
                self._on_tensor(view, part)
        return out

    def is_complete(self, number: int) -> bool:
        """Whether the checkpoint has all of a leaf."""
        path, _ = self._leaves[number]
        return all(view.name in self._checkpoint for view in self._parts[path])

    def leaves_with(self, names: Iterable[str]) -> list[int]:
        """The numbers of the leaves that hold any of these tensors."""
        names = set(names)
        return [
            number
            for number, (path, _) in enumerate(self._leaves)
            if any(view.name in names for view in self._parts[path])
        ]


def load_params(
    checkpoint: Checkpoint,
    abstract: nnx.State,
    shardings: nnx.State | None = None,
    on_bytes: Callable[[pathlib.Path, int], None] | None = None,
) -> nnx.State:
    """Reads every parameter of `abstract` (from `create_model`), cast to its dtype.

    Args:
      shardings: a tree like `abstract`; the default device unless given. Each process reads what
        its own devices hold.
      on_bytes: called with a file and a number of bytes as they arrive, from several threads.

    Raises:
      ValueError: the checkpoint does not fit; nothing was read.
    """
    check(checkpoint, abstract)
    leaves = nnx.to_flat_state(abstract)
    where = dict(nnx.to_flat_state(shardings)) if shardings is not None else {}
    default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    reader = ParamReader(checkpoint, abstract, on_bytes=on_bytes or (lambda path, count: None))

    def load(number: int):
        path, leaf = leaves[number]
        sharding = where[path].get_value() if path in where else default
        read = functools.partial(reader.read, number)
        array = jax.make_array_from_callback(leaf.shape, sharding, read)
        # A copy in flight holds as much pinned memory, which takes longer to pin than to copy: the
        # next leaf is to find this one's.
        return leaf.replace(jax.block_until_ready(array))

    with concurrent.futures.ThreadPoolExecutor(READERS) as pool:
        arrays = list(pool.map(load, range(len(leaves))))
    return nnx.from_flat_state(
        {tuple(path): array for (path, _), array in zip(leaves, arrays, strict=True)}
    )


def _read_box(checkpoint, view: View, box: list[tuple[int, int]], out: np.ndarray, report) -> None:
    """Reads `box` of a tensor seen as `part_shape` into `out`, a block of the host's array."""
    file = checkpoint.file_of(view.name)
    file.read_box(view.name, view.part_shape, box, out)
    share = math.prod(stop - start for start, stop in box)
    report(file.path, share * checkpoint.tensor(view.name).dtype.itemsize)


class ShardProgress:
    """Counts the bytes of each file; calls `on_file(done, total, gigabytes)` when one is read."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        abstract: nnx.State,
        on_file: Callable[[int, int, float], None],
    ):
        self._left: dict[pathlib.Path, int] = {}
        for view in views(abstract):
            if view.name not in checkpoint:
                continue  # `check` will say so
            path = checkpoint.file_of(view.name).path
            self._left[path] = self._left.get(path, 0) + checkpoint.tensor(view.name).nbytes
        self._lock, self._on_file = threading.Lock(), on_file
        self._total, self._gigabytes = len(self._left), 0.0

    def __call__(self, path: pathlib.Path, count: int) -> None:
        with self._lock:
            if path not in self._left:
                return  # what several devices hold is read several times
            self._left[path] -= count
            self._gigabytes += count / 1e9
            if self._left[path] <= 0:
                del self._left[path]
                self._on_file(self._total - len(self._left), self._total, self._gigabytes)
