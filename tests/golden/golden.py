"""What transformers answered for one case: the file format, both ways."""

import dataclasses
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).parent
# A token whose logit exceeds the second best by less may differ from one implementation to another.
CLOSE = 1e-3


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt, logits after some of its tokens, and the greedy tokens that follow it."""

    tokens: np.ndarray  # i32[T]
    positions: np.ndarray  # i32[P], the last one is T - 1
    logits: np.ndarray  # f32[P, V], scores of the token after each position
    greedy_tokens: np.ndarray  # i32[G]
    gaps: np.ndarray  # f32[G], by how much each greedy token's logit exceeds the second best
    # u8[S, T, k], ascending: what each token of the prompt takes in each layer that has experts.
    expert_ids: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Golden:
    checkpoint: str  # digest of the weights it was made with
    prompts: tuple[Prompt, ...]


def golden_path(name: str) -> Path:
    return FOLDER / f"{name}.npz"


def write_golden(name: str, golden: Golden) -> None:
    arrays = {"checkpoint": np.array(golden.checkpoint)}
    for index, prompt in enumerate(golden.prompts):
        fields = {name: x for name, x in vars(prompt).items() if x is not None}
        arrays |= {f"{index}_{name}": array for name, array in fields.items()}
    np.savez_compressed(golden_path(name), **arrays)


def read_golden(name: str) -> Golden:
    with np.load(golden_path(name)) as arrays:
        checkpoint = str(arrays["checkpoint"])
        prompts: dict[str, dict] = {}
        for key in arrays.files:
            index, _, field = key.partition("_")
            if field:
                prompts.setdefault(index, {})[field] = arrays[key]
        return Golden(checkpoint, tuple(Prompt(**fields) for fields in prompts.values()))
