"""The models that answer with vectors, one case for each way to one."""

import dataclasses
import json
from pathlib import Path

from tests.golden.cases import LLAMA, MISTRAL, QWEN2, QWEN3, v4
from tests.golden.random_checkpoint import Shapes, linear_shapes, tensor_shapes, write_checkpoint

PROMPT_LENGTHS = (6, 41, 90)  # within a page of 16, within a chunk, beyond one
NUM_SHARED = 36  # tokens that the last two prompts begin with: two pages of 16, and some


@dataclasses.dataclass(frozen=True)
class Case:
    """One checkpoint. `modes` are those of sentence-transformers' Pooling, none for no files."""

    name: str
    config: dict
    seed: int
    is_bare: bool = False  # tensors without `model.` before their names
    mode: str | None = None
    is_normalized: bool = True  # by sentence-transformers' Normalize

    @property
    def architecture(self) -> str:
        return self.config["architectures"][0]

    @property
    def is_scored(self) -> bool:
        return self.architecture.endswith(("ForSequenceClassification", "ForRewardModel"))

    def write(self, folder: Path) -> str:
        """The checkpoint and the files beside it; returns its digest."""
        digest = write_checkpoint(self.config, folder, self.seed, shapes=self.shapes())
        if self.mode is not None:
            write_modules(folder, self.mode, self.is_normalized)
        return digest

    def shapes(self) -> Shapes:
        shapes, hidden = tensor_shapes(self.config), self.config["hidden_size"]
        num_labels = len(self.config.get("id2label", "x"))
        if self.is_bare or not self.architecture.endswith("ForCausalLM"):
            shapes.pop("lm_head.weight", None)
        if self.architecture.endswith("ForSequenceClassification"):
            shapes |= linear_shapes("score", num_labels, hidden, False)
        if self.architecture.endswith("ForRewardModel"):
            shapes |= linear_shapes("score.0", hidden, hidden, True)
            shapes |= linear_shapes("score.2", num_labels, hidden, True)
        if not self.is_bare:
            return shapes
        return {name.removeprefix("model."): shape for name, shape in shapes.items()}


def write_modules(folder: Path, mode: str, is_normalized: bool = True) -> None:
    """What sentence-transformers leaves beside a model."""
    kinds = ["Transformer", "Pooling", *(["Normalize"] if is_normalized else [])]
    modules = [
        {
            "idx": i,
            "name": str(i),
            "path": f"{i}_{kind}" if i else "",
            "type": f"sentence_transformers.models.{kind}",
        }
        for i, kind in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(modules, indent=2))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    names = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "lasttoken")
    pooling = {f"pooling_mode_{name}": name.startswith(mode) for name in names}
    pooling["pooling_mode_mean_sqrt_len_tokens"] = False
    text = json.dumps({"word_embedding_dimension": 64, **pooling, "include_prompt": True}, indent=2)
    (folder / "1_Pooling" / "config.json").write_text(text)


def labelled(base: dict, architecture: str, count: int) -> dict:
    labels = {str(i): f"LABEL_{i}" for i in range(count)}
    return v4(base, architectures=[architecture], id2label=labels)


CASES = [
    # As gte-Qwen2 is: a causal model's file, its head in it, and sentence-transformers' files.
    Case("qwen2_last", v4(QWEN2, is_matryoshka=True), seed=701, mode="last"),
    Case("qwen3_bare", v4(QWEN3), seed=702, is_bare=True, mode="last"),
    Case("mistral_model", v4(MISTRAL, architectures=["MistralModel"]), seed=703, is_bare=True),
    Case("qwen2_mean", v4(QWEN2), seed=704, mode="mean"),
    Case("qwen2_cls", v4(QWEN2), seed=705, mode="cls"),
    Case("qwen2_max", v4(QWEN2), seed=706, mode="max", is_normalized=False),
    Case("llama_classification", labelled(LLAMA, "LlamaForSequenceClassification", 3), seed=707),
    Case("qwen2_classification", labelled(QWEN2, "Qwen2ForSequenceClassification", 1), seed=708),
    Case("qwen2_reward", v4(QWEN2, architectures=["Qwen2ForRewardModel"]), seed=709),
]
