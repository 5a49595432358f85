"""Makes the goldens with Hugging Face transformers: README.md says how.

Everything that a test may rely on is asserted here: every weight of the checkpoint is used, the
rope parameters arrived, the option that a case is about moves the logits, and a greedy token is the
same whether all is recomputed for it or a KV cache is used.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers

from tests.golden.cases import CASES, Case
from tests.golden.golden import CLOSE, FOLDER, Golden, Prompt, write_golden
from tests.golden.random_checkpoint import random_tokens, write_checkpoint

# Beside the ends of a prompt: where pages of 16 and chunks of 64 meet.
INTERESTING_POSITIONS = (2, 15, 16, 63, 64, 128)
# The tests allow 1e-4 of the largest logit; an option that moves less would go untested.
LEAST_CONTRAST = 2e-3
# A choice of experts by less may differ from one implementation to another.
CLOSE_SCORES = 1e-5


def main(names: list[str]) -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    cases = [case for case in CASES if not names or case.name in names]
    print(f"torch {torch.__version__}, transformers {transformers.__version__}")
    print(f"{'case':28} largest  contrast  close  distinct tokens")
    for case in cases:
        model, digest = load(case, case.config)
        check_rope_parameters(case, model)
        prompts = tuple(run(model, prompt, case) for prompt in make_prompts(case))
        contrast = measure_contrast(case, prompts[-1])
        write_golden(case.name, Golden(digest, prompts))
        report(case, prompts, contrast)
    total = sum(path.stat().st_size for path in FOLDER.glob("*.npz"))
    print(f"{len(cases)} goldens made; all take {total / 1e6:.2f} MB")


def load(case: Case, config: dict) -> tuple[transformers.PreTrainedModel, str]:
    """The model in float32, and the digest of its checkpoint."""
    options = {"attn_implementation": "eager", "output_loading_info": True}
    with tempfile.TemporaryDirectory() as folder:
        digest = write_checkpoint(config, Path(folder), case.seed, **case.checkpoint_options())
        model, loading = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, **options
        )
    if problems := {kind: found for kind, found in loading.items() if found}:
        raise ValueError(f"{case.name}: the checkpoint does not fit the model: {problems}")
    return model.eval(), digest


def check_rope_parameters(case: Case, model: transformers.PreTrainedModel) -> None:
    """Whichever way they were spelled, transformers must have understood all of them."""
    config = case.config
    wanted = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    wanted.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    wanted["rope_type"] = wanted.pop("type", None) or wanted.get("rope_type", "default")
    if "original_max_position_embeddings" in config:
        wanted["original_max_position_embeddings"] = config["original_max_position_embeddings"]
    understood = model.config.rope_parameters
    if not wanted.items() <= understood.items():
        raise ValueError(f"{case.name}: {wanted} became {understood}")
    assert model.model.rotary_emb.rope_type == wanted["rope_type"]


def make_prompts(case: Case) -> list[np.ndarray]:
    return [
        random_tokens(f"{case.seed}/prompt {index}", length, case.config["vocab_size"])
        for index, length in enumerate(case.prompt_lengths)
    ]


def run(model: transformers.PreTrainedModel, tokens: np.ndarray, case: Case) -> Prompt:
    chosen = {p for p in INTERESTING_POSITIONS if p < len(tokens)} | {0, len(tokens) - 1}
    positions = np.array(sorted(chosen), np.int32)
    logits = all_logits(model, tokens)[positions]
    greedy, gaps = greedy_tokens(model, tokens, case.num_greedy_tokens)
    cached = greedy_tokens_with_cache(model, tokens, case.num_greedy_tokens)
    comparable = np.cumprod((cached == greedy) | (gaps > CLOSE)).astype(bool)
    np.testing.assert_array_equal(cached[comparable], greedy[comparable])
    experts = chosen_experts(model, tokens, case) if case.has_experts else None
    return Prompt(tokens, positions, logits, greedy, gaps, experts)


def chosen_experts(
    model: transformers.PreTrainedModel, tokens: np.ndarray, case: Case
) -> np.ndarray:
    """What every router chooses; raises ValueError where a choice is too close to compare."""
    chosen = []

    def note(_router, _inputs, outputs):
        logits, _, expert_ids = outputs
        scores, _ = logits.softmax(-1).sort(descending=True)
        count = expert_ids.shape[1]
        gap = float((scores[:, count - 1] - scores[:, count]).min())
        if gap < CLOSE_SCORES:
            raise ValueError(f"{case.name}: two experts are as good, by {gap}: take another seed")
        chosen.append(np.sort(expert_ids.numpy(), axis=-1).astype(np.uint8))

    routers = [module for module in model.modules() if type(module).__name__.endswith("Router")]
    hooks = [router.register_forward_hook(note) for router in routers]
    all_logits(model, tokens)
    for hook in hooks:
        hook.remove()
    return np.stack(chosen)


@torch.inference_mode()
def all_logits(model: transformers.PreTrainedModel, tokens: np.ndarray) -> np.ndarray:
    """Logits at every position, by one forward without a KV cache."""
    ids = torch.from_numpy(tokens.astype(np.int64))[None]
    return model(input_ids=ids, use_cache=False).logits[0].numpy()


def greedy_tokens(
    model: transformers.PreTrainedModel, prompt: np.ndarray, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """Greedy tokens, all recomputed for each, and by how much each exceeds the second best."""
    tokens, gaps = prompt, []
    for _ in range(count):
        last = all_logits(model, tokens)[-1]
        second, best = np.sort(last)[-2:]
        gaps.append(best - second)
        tokens = np.append(tokens, np.int32(last.argmax()))
    return tokens[len(prompt) :], np.array(gaps, np.float32)


@torch.inference_mode()
def greedy_tokens_with_cache(
    model: transformers.PreTrainedModel, prompt: np.ndarray, count: int
) -> np.ndarray:
    ids = torch.from_numpy(prompt.astype(np.int64))[None]
    cache, tokens = None, []
    for _ in range(count):
        output = model(input_ids=ids, past_key_values=cache, use_cache=True)
        cache, ids = output.past_key_values, output.logits[:, -1].argmax(-1, keepdim=True)
        tokens.append(ids.item())
    return np.array(tokens, np.int32)


def measure_contrast(case: Case, prompt: Prompt) -> float:
    """How far the logits move, relative to the largest, without the option the case is about."""
    if not case.contrast:
        return float("nan")
    model, _ = load(case, case.config | case.contrast)
    difference = all_logits(model, prompt.tokens)[prompt.positions] - prompt.logits
    contrast = float(abs(difference).max() / abs(prompt.logits).max())
    if contrast < LEAST_CONTRAST:
        raise ValueError(f"{case.name}: {case.contrast} moves the logits by only {contrast}")
    return contrast


def report(case: Case, prompts: tuple[Prompt, ...], contrast: float) -> None:
    largest = max(abs(prompt.logits).max() for prompt in prompts)
    close = sum(int((prompt.gaps <= CLOSE).sum()) for prompt in prompts)
    distinct = [len(set(prompt.greedy_tokens.tolist())) for prompt in prompts]
    print(f"{case.name:28} {largest:7.2f} {contrast:9.2g} {close:6}  {distinct}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
