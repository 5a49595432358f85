"""Makes the vectors with Hugging Face transformers: ../README.md says how.

Pooling is sentence-transformers', written out; the head of a reward model, which transformers knows
as remote code only, is built here.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.torch import load_file

from tests.golden.pooled.cases import CASES, NUM_SHARED, PROMPT_LENGTHS, Case
from tests.golden.pooled.encoders import ENCODER_CASES, LENGTHS, EncoderCase
from tests.golden.pooled.golden import Golden, write_golden
from tests.golden.random_checkpoint import random_tokens

OPTIONS = {"attn_implementation": "eager", "output_loading_info": True, "dtype": torch.float32}


def main(names: list[str]) -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    print(f"torch {torch.__version__}, transformers {transformers.__version__}")
    for case in CASES:
        if names and case.name not in names:
            continue
        prompts = make_prompts(case)
        with tempfile.TemporaryDirectory() as folder:
            digest = case.write(Path(folder))
            vectors = np.stack([vector_of(case, folder, prompt) for prompt in prompts])
        write(case, digest, prompts, vectors)
    for case in ENCODER_CASES:
        if names and case.name not in names:
            continue
        with tempfile.TemporaryDirectory() as folder:
            digest = case.write(Path(folder))
            prompts = typed_pairs(case, folder) if case.pairs else encoder_prompts(case)
            vectors = np.stack([encoded(case, folder, prompt) for prompt in prompts])
        write(case, digest, prompts, vectors)


def write(case: Case, digest: str, prompts: list[np.ndarray], vectors: np.ndarray) -> None:
    write_golden(case.name, Golden(digest, tuple(prompts), vectors))
    spread = vectors.std(axis=0).max() / abs(vectors).max()
    print(f"{case.name:24} {vectors.shape} differ by {spread:.2f} of the largest number")
    assert spread > 0.05, "the prompts are told apart"


def make_prompts(case: Case) -> list[np.ndarray]:
    vocab = case.config["vocab_size"]
    prompts = [
        random_tokens(f"{case.seed}/prompt {i}", length, vocab)
        for i, length in enumerate(PROMPT_LENGTHS)
    ]
    prompts[2][:NUM_SHARED] = prompts[1][:NUM_SHARED]
    return prompts


@torch.inference_mode()
def vector_of(case: Case, folder: str, prompt: np.ndarray) -> np.ndarray:
    ids = torch.from_numpy(prompt.astype(np.int64))[None]
    if case.architecture.endswith("ForSequenceClassification"):
        auto = transformers.AutoModelForSequenceClassification
        model, loading = auto.from_pretrained(folder, **OPTIONS)
        check(case, loading)
        return model.eval()(input_ids=ids, use_cache=False).logits[0].numpy()
    model, loading = transformers.AutoModel.from_pretrained(folder, **OPTIONS)
    check(case, loading)
    hidden = model.eval()(input_ids=ids, use_cache=False).last_hidden_state[0]
    if case.architecture.endswith("ForRewardModel"):
        return reward(load_file(f"{folder}/model.safetensors"), hidden[-1]).numpy()
    vector = pool(hidden, case.mode or "last")
    if case.is_normalized:
        vector = torch.nn.functional.normalize(vector, dim=-1)
    return vector.numpy()


def encoder_prompts(case: EncoderCase) -> list[np.ndarray]:
    """Without special tokens: padding would have no position in RoBERTa."""
    vocab = case.config["vocab_size"] - 5
    return [
        5 + random_tokens(f"{case.seed}/prompt {i}", length, vocab)
        for i, length in enumerate(LENGTHS)
    ]


def typed_pairs(case: EncoderCase, folder: str) -> list[np.ndarray]:
    """As jaxserve has them: a token of the second type is its id plus the vocabulary's size."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    made = []
    for first, second in case.pairs:
        encoded = tokenizer(first, second)
        ids = np.array(encoded["input_ids"], np.int32)
        types = np.array(encoded.get("token_type_ids", 0 * ids), np.int32)
        if case.is_bert:
            assert 0 < types.sum() < len(types), "a pair has both types"
        made.append(ids + types * case.config["vocab_size"])
    return made


@torch.inference_mode()
def encoded(case: EncoderCase, folder: str, prompt: np.ndarray) -> np.ndarray:
    types, ids = np.divmod(prompt.astype(np.int64), case.config["vocab_size"])
    auto = transformers.AutoModel
    if case.is_scored:
        auto = transformers.AutoModelForSequenceClassification
    model, loading = auto.from_pretrained(folder, **OPTIONS)
    missing = {name for name in loading.pop("missing_keys") if "pooler.dense" not in name}
    if missing or any(loading.values()):
        raise ValueError(f"{case.name}: the checkpoint does not fit: {missing} {loading}")
    inputs = {"input_ids": torch.from_numpy(ids)[None]}
    inputs |= {"token_type_ids": torch.from_numpy(types)[None]}
    inputs |= {"attention_mask": torch.ones(1, len(ids), dtype=torch.int64)}
    output = model.eval()(**inputs)
    if case.is_scored:
        return output.logits[0].numpy()
    return torch.nn.functional.normalize(
        pool(output.last_hidden_state[0], case.mode or "cls"), dim=-1
    ).numpy()


def check(case: Case, loading: dict) -> None:
    """Nothing is missing, and nothing left but a head that this class has not."""
    left = {name for name in loading.pop("unexpected_keys") if not name.startswith("score.")}
    problems = {kind: found for kind, found in loading.items() if found}
    if problems or left - {"lm_head.weight"}:
        raise ValueError(f"{case.name}: the checkpoint does not fit: {problems} {left}")


def reward(tensors: dict[str, torch.Tensor], hidden: torch.Tensor) -> torch.Tensor:
    first, last = (torch.nn.Linear(*tensors[f"score.{i}.weight"].shape[::-1]) for i in (0, 2))
    for layer, i in ((first, 0), (last, 2)):
        layer.load_state_dict({key: tensors[f"score.{i}.{key}"] for key in ("weight", "bias")})
    return torch.nn.Sequential(first, torch.nn.ReLU(), last)(hidden)


def pool(hidden: torch.Tensor, mode: str) -> torch.Tensor:
    """Of one text, [T, D] to [D]."""
    by_mode = {
        "last": lambda: hidden[-1],
        "cls": lambda: hidden[0],
        "mean": lambda: hidden.sum(0) / len(hidden),
        "max": lambda: hidden.max(0).values,
    }
    return by_mode[mode]()


if __name__ == "__main__":
    main(sys.argv[1:])
