"""Trees of a checkpoint's tensors as trainers have them, and who saves them how."""

import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint
from flax import nnx
from orbax.checkpoint import v1

Tensors = Mapping[str, np.ndarray]


def nested(tensors: Tensors) -> dict[str, Any]:
    """`{"model": {"layers": {"0": ...}}}`, of arrays on a device."""
    tree: dict[str, Any] = {}
    for name, tensor in tensors.items():
        *above, last = name.split(".")
        place = tree
        for key in above:
            place = place.setdefault(key, {})
        place[last] = jnp.asarray(tensor)
    return tree


def state(tensors: Tensors) -> nnx.State:
    paths = {tuple(name.split(".")): nnx.Param(jnp.asarray(t)) for name, t in tensors.items()}
    return nnx.from_flat_state(paths)


def save_with(checkpointer: Callable[[], Any]) -> Callable[[pathlib.Path, Any], None]:
    def save(folder: pathlib.Path, tree: Any) -> None:
        with checkpointer() as saver:
            saver.save(folder, tree)

    return save


def save_step(folder: pathlib.Path, tree: Any) -> None:
    """As a training loop does; the folder is that of the manager."""
    with orbax.checkpoint.CheckpointManager(folder) as manager:
        manager.save(7, args=orbax.checkpoint.args.StandardSave(tree))
        manager.wait_until_finished()


def save_items(folder: pathlib.Path, tree: Any) -> None:
    """A step of several items."""
    args = orbax.checkpoint.args
    items = {"params": args.StandardSave(tree), "opt_state": args.StandardSave({"mu": jnp.ones(3)})}
    with orbax.checkpoint.CheckpointManager(folder) as manager:
        manager.save(7, args=args.Composite(**items))
        manager.wait_until_finished()


def _files() -> Any:
    return orbax.checkpoint.PyTreeCheckpointer(use_ocdbt=False)


# By a name: who saves, what is saved, and which folder below the saved one is then named.
SAVED = {
    "v1, flat": (v1.save, dict, ""),
    "v1, nested": (v1.save, nested, ""),
    "v1, one item of it": (v1.save, nested, "state"),
    "standard": (save_with(orbax.checkpoint.StandardCheckpointer), nested, ""),
    "nnx state": (save_with(orbax.checkpoint.StandardCheckpointer), state, ""),
    "train state": (
        save_with(orbax.checkpoint.PyTreeCheckpointer),
        lambda tensors: {"params": nested(tensors), "step": 3, "opt_state": {"mu": jnp.ones(3)}},
        "",
    ),
    "a file for each chunk": (save_with(_files), nested, ""),
    "manager": (save_step, nested, ""),
    "manager's step": (save_step, nested, "7"),
    "manager's item": (save_step, nested, "7/default"),
    "manager's items": (save_items, nested, "7"),
}
