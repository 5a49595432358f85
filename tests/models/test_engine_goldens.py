"""The whole engine against transformers: paged, chunked and batched, its greedy tokens are theirs.

test_goldens.py compares the logits of every variant; here each kind of attention goes through the
scheduler, the page table and the sampler.
"""

import pytest

from jaxserve import Engine
from tests.golden.cases import CASES
from tests.golden.golden import CLOSE, Prompt, read_golden
from tests.golden.random_checkpoint import write_checkpoint
from tests.server.serving import programs_folder

# Case, page size, chunk size. The longest prompt has 183 tokens. A chunk of 12 and four decoding
# rows fill the smallest bucket: the least to compile. One of 64 takes three buckets.
SETTINGS = [
    ("llama_mha", 4, 12),
    ("llama3", 16, 17),
    ("llama_head_dim_80", 128, 12),
    ("mistral_window", 1, 12),
    ("qwen2", 16, 64),
    ("qwen3", 4, 12),
]


def num_compared(prompt: Prompt, answer: dict) -> int:
    """How many tokens were compared: where two are as good, what follows is another text."""
    tokens = answer["output_ids"]
    assert len(tokens) == len(prompt.greedy_tokens)
    for step, (token, expected) in enumerate(zip(tokens, prompt.greedy_tokens, strict=True)):
        if token != expected:
            gap = prompt.gaps[step]
            assert gap <= CLOSE, f"token {step} is {token}, not {expected} by {gap:.4f}"
            return step
    return len(tokens)


@pytest.mark.parametrize("name,page_size,chunk_size", SETTINGS)
def test_greedy_tokens_are_those_of_transformers(
    name, page_size, chunk_size, tmp_path, caplog, pytestconfig
):
    case = next(case for case in CASES if case.name == name)
    write_checkpoint(case.config, tmp_path, case.seed, **case.checkpoint_options())
    prompts = read_golden(name).prompts
    caplog.set_level("INFO", logger="jaxserve")
    with Engine(
        model_path=str(tmp_path),
        skip_tokenizer_init=True,
        device="cpu",
        dtype="float32",
        page_size=page_size,
        chunked_prefill_size=chunk_size,
        max_running_requests=4,
        compilation_cache_dir=programs_folder(pytestconfig),
    ) as engine:
        caplog.clear()
        answers = engine.generate(
            input_ids=[prompt.tokens.tolist() for prompt in prompts],
            sampling_params={"temperature": 0.0, "max_new_tokens": 64, "ignore_eos": True},
        )
        assert engine.flush_cache(), "every row and page is free again"
    chunks = sum("Prefill batch" in record.message for record in caplog.records)
    compared = [num_compared(*pair) for pair in zip(prompts, answers, strict=True)]
    lengths = [len(prompt.tokens) for prompt in prompts]
    print(f"{lengths} tokens in {chunks} chunks, pages of {page_size}: compared {compared}")
    assert chunks > sum(lengths) // chunk_size > 1
    assert sum(compared) > 3 * 64 // 2
