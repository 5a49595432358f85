"""The vectors of one case: the file format, both ways."""

import dataclasses
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).parent


@dataclasses.dataclass(frozen=True)
class Golden:
    checkpoint: str  # digest of the weights it was made with
    prompts: tuple[np.ndarray, ...]  # i32[T]
    vectors: np.ndarray  # f32[P, W]


def write_golden(name: str, golden: Golden) -> None:
    prompts = {f"prompt_{i}": prompt for i, prompt in enumerate(golden.prompts)}
    np.savez_compressed(
        FOLDER / f"{name}.npz",
        checkpoint=np.array(golden.checkpoint),
        vectors=golden.vectors,
        **prompts,
    )


def read_golden(name: str) -> Golden:
    with np.load(FOLDER / f"{name}.npz") as arrays:
        vectors = arrays["vectors"]
        prompts = tuple(arrays[f"prompt_{i}"] for i in range(len(vectors)))
        return Golden(str(arrays["checkpoint"]), prompts, vectors)
