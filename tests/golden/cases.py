"""The models that are compared with Hugging Face transformers, one case for each variant.

A configuration is spelled as transformers 4 wrote it (`rope_theta`, `rope_scaling`, `torch_dtype`)
or as transformers 5 writes it (`rope_parameters`, `dtype`, `layer_types`); published checkpoints
have both. Most of them also name an option that is to be ignored, as published ones do.
"""

import dataclasses

PROMPT_LENGTHS = (6, 41, 183)  # within a page of 16, within a chunk of 64, beyond any window
NUM_GREEDY_TOKENS = 64


@dataclasses.dataclass(frozen=True)
class Case:
    """One checkpoint and its prompts.

    `contrast` changes the option that the case is about (None: as if it were absent). The maker of
    the goldens asserts that this moves the logits: no one passes by ignoring the option.
    """

    name: str
    config: dict
    seed: int
    contrast: dict = dataclasses.field(default_factory=dict)
    prompt_lengths: tuple[int, ...] = PROMPT_LENGTHS
    num_greedy_tokens: int = NUM_GREEDY_TOKENS
    context_length: int | None = None  # what jaxserve is told to serve, if anything
    shards: int = 1
    dtype: str = "float32"
    embedding_std: float = 1.0
    has_experts: bool = False  # the golden holds the router's choices too

    def checkpoint_options(self) -> dict:
        return {name: getattr(self, name) for name in ("shards", "dtype", "embedding_std")}


SIZES = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 512,
    "initializer_range": 0.02,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attention_dropout": 0.0,
    "use_cache": True,
}
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    **SIZES,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "pretraining_tp": 1,
}
MISTRAL = {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    **SIZES,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
QWEN2 = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    **SIZES,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "sliding_window": 32,
    "max_window_layers": 1,
}
QWEN3 = QWEN2 | {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "head_dim": 32,
    "attention_bias": False,
}
MOE = SIZES | {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "tie_word_embeddings": False,
    "num_experts_per_tok": 2,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
}
QWEN_MOE = MOE | {
    "num_experts": 8,
    "moe_intermediate_size": 24,
    "decoder_sparse_step": 1,
    "norm_topk_prob": False,
    "use_sliding_window": False,
    "sliding_window": 32,
    "max_window_layers": 1,
    "rms_norm_eps": 1e-6,
}
QWEN2_MOE = QWEN_MOE | {
    "architectures": ["Qwen2MoeForCausalLM"],
    "model_type": "qwen2_moe",
    "shared_expert_intermediate_size": 40,
}
QWEN3_MOE = QWEN_MOE | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "head_dim": 16,
    "mlp_only_layers": [],
}
MIXTRAL = MOE | {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "num_local_experts": 8,
    "router_jitter_noise": 0.1,
    "rms_norm_eps": 1e-5,
}
OLMOE = MOE | {
    "architectures": ["OlmoeForCausalLM"],
    "model_type": "olmoe",
    "num_experts": 8,
    "norm_topk_prob": False,
    "clip_qkv": None,
}

# Original contexts are short, so that these tiny heads have fast, slow and intermediate dimensions.
LLAMA3_ROPE = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
    "rope_type": "llama3",
}
PLAIN_ROPE = {"rope_type": "linear", "factor": 1.0}  # a contrast: no scaling at all


def v4(base: dict, rope_theta: float = 10000.0, **changes) -> dict:
    """As transformers 4 wrote it."""
    rope = {"rope_theta": rope_theta, "rope_scaling": None}
    return base | rope | {"torch_dtype": "bfloat16", "transformers_version": "4.51.3"} | changes


def v5(base: dict, rope_theta: float = 10000.0, *, rope: dict | None = None, **changes) -> dict:
    """As transformers 5 writes it."""
    rope_parameters = {"rope_theta": rope_theta} | (rope or {"rope_type": "default"})
    written = {"rope_parameters": rope_parameters, "dtype": "bfloat16"}
    return base | written | {"transformers_version": "5.2.0"} | changes


def layer_types(letters: str) -> list[str]:
    names = {"f": "full_attention", "s": "sliding_attention"}
    return [names[letter] for letter in letters]


def moe_case(name: str, config: dict, **options) -> Case:
    """Two shorter prompts: a small golden."""
    return Case(
        name, config, prompt_lengths=(11, 73), num_greedy_tokens=32, has_experts=True, **options
    )


LLAMA_CASES = [
    Case(
        "llama_mha",
        v4(LLAMA, num_key_value_heads=4),
        seed=101,
        contrast={"rope_theta": 500000.0},
        dtype="float16",
    ),
    Case(
        # Nothing that has a default: as many KV heads as heads, 1e-6, 10000, untied.
        "llama_defaults",
        {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": 256,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 512,
        },
        seed=102,
        contrast={"rms_norm_eps": 1e-5},
        embedding_std=1e-3,
    ),
    Case(
        "llama_eps",
        v4(LLAMA),
        seed=103,
        contrast={"rms_norm_eps": 1e-6},
        embedding_std=3e-3,
    ),
    Case(
        "llama3",
        v4(LLAMA, 500000.0, rope_scaling=LLAMA3_ROPE, vocab_size=512, eos_token_id=[2, 3]),
        seed=104,
        contrast={"rope_scaling": None},
        shards=3,
        dtype="bfloat16",
    ),
    Case(
        "llama3_tied",
        v5(LLAMA, 500000.0, rope=LLAMA3_ROPE, head_dim=64, tie_word_embeddings=True),
        seed=105,
        contrast={"rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"}},
        embedding_std=0.3,
    ),
    Case(
        "llama_linear_rope",
        v4(LLAMA, rope_scaling={"type": "linear", "factor": 4.0}),
        seed=106,
        contrast={"rope_scaling": None},
    ),
    Case(
        "llama_linear_rope_v5",
        v5(LLAMA, rope={"rope_type": "linear", "factor": 2.5}),
        seed=107,
        contrast={"rope_parameters": {"rope_theta": 10000.0, **PLAIN_ROPE}},
    ),
    Case(
        # Within max_position_embeddings a dynamic rope does not scale.
        "llama_dynamic_rope",
        v4(LLAMA, rope_scaling={"type": "dynamic", "factor": 4.0}),
        seed=108,
        contrast={"rope_scaling": {"type": "linear", "factor": 4.0}},
    ),
    Case(
        # A dynamic rope has no original context but max_position_embeddings.
        "llama_dynamic_rope_original",
        v4(
            LLAMA,
            rope_scaling={
                "rope_type": "dynamic",
                "factor": 4.0,
                "original_max_position_embeddings": 128,
            },
        ),
        seed=118,
        contrast={"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    ),
    Case(
        # Beyond max_position_embeddings transformers recomputes the base for the length of each
        # forward; jaxserve computes it once, for the context length that it serves. One forward of
        # that length compares.
        "dynamic_long",
        v4(LLAMA, rope_scaling={"type": "dynamic", "factor": 2.0}, max_position_embeddings=64),
        seed=109,
        contrast={"rope_scaling": None},
        prompt_lengths=(192,),
        num_greedy_tokens=0,
        context_length=192,
    ),
    Case(
        "llama_yarn",
        v4(
            LLAMA,
            rope_scaling={
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 128,
            },
        ),
        seed=110,
        contrast={"rope_scaling": None},
    ),
    Case(
        "llama_yarn_explicit",
        v5(
            LLAMA,
            rope={
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 128,
                "attention_factor": 1.4,
                "beta_fast": 6.0,
                "beta_slow": 2.0,
            },
            head_dim=32,
        ),
        seed=111,
        contrast={
            "rope_parameters": {
                "rope_theta": 10000.0,
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 128,
                "attention_factor": 1.4,
            }
        },
    ),
    Case(
        "llama_yarn_mscale",
        v5(
            LLAMA,
            rope={
                "rope_type": "yarn",
                "factor": 8.0,
                "original_max_position_embeddings": 64,
                "mscale": 1.0,
                "mscale_all_dim": 0.3,
                "truncate": False,
            },
        ),
        seed=115,
        contrast={
            "rope_parameters": {
                "rope_theta": 10000.0,
                "rope_type": "yarn",
                "factor": 8.0,
                "original_max_position_embeddings": 64,
                "mscale": 1.0,
                "mscale_all_dim": 0.3,
            }
        },
    ),
    Case(
        # A factor of null is max_position_embeddings / original_max_position_embeddings.
        "llama_yarn_factor_null",
        v4(
            LLAMA,
            rope_scaling={
                "rope_type": "yarn",
                "factor": None,
                "original_max_position_embeddings": 128,
            },
        ),
        seed=116,
        contrast={
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 2.0,
                "original_max_position_embeddings": 128,
            }
        },
    ),
    Case(
        # rope_scaling goes before rope_parameters, an original context beside it before its own.
        "llama_rope_both_spellings",
        v5(
            LLAMA,
            rope_scaling={
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 512,
            },
            original_max_position_embeddings=128,
        ),
        seed=117,
        contrast={"original_max_position_embeddings": 512},
    ),
    Case(
        "llama_biases",
        v4(LLAMA, attention_bias=True, mlp_bias=True),
        seed=112,
        shards=2,
    ),
    Case(
        # Six heads share two KV heads of 80, and 6 x 80 is not the hidden size.
        "llama_head_dim_80",
        v5(
            LLAMA,
            head_dim=80,
            hidden_size=48,
            num_attention_heads=6,
            num_hidden_layers=3,
            vocab_size=300,
        ),
        seed=113,
    ),
    Case("llama_tied", v4(LLAMA, tie_word_embeddings=True), seed=114, embedding_std=0.3),
]

MISTRAL_CASES = [
    Case(
        "mistral_window",
        v4(MISTRAL, sliding_window=24, head_dim=None, num_hidden_layers=3),
        seed=201,
        contrast={"sliding_window": 23},
        shards=2,
        dtype="bfloat16",
    ),
    Case(
        # One KV head for all.
        "mistral_no_window",
        v4(MISTRAL, 1e6, sliding_window=None, head_dim=96, num_key_value_heads=1),
        seed=202,
        contrast={"sliding_window": 160},
    ),
    Case(
        "mistral_window_v5",
        v5(MISTRAL, 1e6, sliding_window=9, head_dim=32, rms_norm_eps=1e-6),
        seed=203,
        contrast={"sliding_window": 10},
    ),
]

QWEN2_CASES = [
    Case(
        "qwen2",
        v4(QWEN2, 1e6, vocab_size=512),
        seed=301,
        contrast={"use_sliding_window": True},
        dtype="bfloat16",
    ),
    Case(
        "qwen2_tied",
        v5(
            QWEN2,
            1e6,
            tie_word_embeddings=True,
            sliding_window=None,
            layer_types=layer_types("ff"),
            num_attention_heads=6,
            hidden_size=48,
        ),
        seed=312,
        embedding_std=0.3,
    ),
    Case(
        # The first layer sees everything, the other two a window.
        "qwen2_window",
        v4(QWEN2, 1e6, use_sliding_window=True, num_hidden_layers=3),
        seed=303,
        contrast={"max_window_layers": 2},
    ),
    Case(
        # layer_types decides, not max_window_layers.
        "qwen2_layer_types",
        v5(
            QWEN2,
            use_sliding_window=True,
            num_hidden_layers=3,
            sliding_window=20,
            layer_types=layer_types("sfs"),
        ),
        seed=304,
        contrast={"layer_types": None},
    ),
    Case(
        # The factor is what it says, even where max_position_embeddings suggests another.
        "qwen2_yarn",
        v4(
            QWEN2,
            1e6,
            rope_scaling={
                "type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 256,
            },
            max_position_embeddings=320,
        ),
        seed=305,
        contrast={
            "rope_scaling": {
                "type": "yarn",
                "factor": 1.25,
                "original_max_position_embeddings": 256,
            }
        },
    ),
    Case(
        # Without an original context, max_position_embeddings is the original one.
        "qwen2_yarn_no_original",
        v4(QWEN2, rope_scaling={"type": "yarn", "factor": 4.0}),
        seed=306,
        contrast={
            "rope_scaling": {
                "type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 128,
            }
        },
    ),
]

QWEN3_CASES = [
    Case(
        "qwen3",
        v4(QWEN3, 1e6, tie_word_embeddings=True, num_hidden_layers=3),
        seed=401,
        contrast={"use_sliding_window": True},
        shards=2,
        dtype="bfloat16",
        embedding_std=0.3,
    ),
    Case(
        "qwen3_untied",
        v5(
            QWEN3,
            1e6,
            head_dim=64,
            sliding_window=None,
            layer_types=layer_types("ff"),
            num_key_value_heads=4,
            rms_norm_eps=1e-5,
        ),
        seed=402,
    ),
    Case(
        "qwen3_bias",
        v4(QWEN3, 1e6, attention_bias=True, head_dim=80, num_key_value_heads=1),
        seed=403,
    ),
    Case(
        "qwen3_default_head_dim",
        v4({key: value for key, value in QWEN3.items() if key != "head_dim"}, hidden_size=32),
        seed=404,
    ),
    Case(
        "qwen3_yarn",
        v5(
            QWEN3,
            1e6,
            rope={
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 64,
                "attention_factor": 1.0,
            },
            layer_types=layer_types("ff"),
        ),
        seed=425,
        contrast={
            "rope_parameters": {
                "rope_theta": 1e6,
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    Case(
        "qwen3_dynamic_rope",
        v5(QWEN3, 1e6, rope={"rope_type": "dynamic", "factor": 4.0}),
        seed=406,
        contrast={"rope_parameters": {"rope_theta": 1e6, "rope_type": "linear", "factor": 4.0}},
    ),
    Case(
        "qwen3_window",
        v4(QWEN3, 1e6, use_sliding_window=True, max_window_layers=2, num_hidden_layers=3),
        seed=407,
        contrast={"use_sliding_window": False},
    ),
]

MOE_CASES = [
    moe_case(
        "qwen2_moe",
        v4(QWEN2_MOE, 1e6),
        seed=501,
        contrast={"norm_topk_prob": True},
        dtype="bfloat16",
        shards=2,
    ),
    # Layers 1 and 3 by the step, but 3 has none; windows in the first layers that are even.
    moe_case(
        "qwen2_moe_sparse_step",
        v5(
            QWEN2_MOE,
            decoder_sparse_step=2,
            mlp_only_layers=[3],
            num_hidden_layers=4,
            num_experts_per_tok=4,
            norm_topk_prob=True,
            use_sliding_window=True,
            max_window_layers=2,
        ),
        seed=502,
        contrast={"max_window_layers": 0},
    ),
    moe_case(
        "qwen2_moe_no_bias",
        v5(QWEN2_MOE, 1e6, qkv_bias=False, norm_topk_prob=True, num_experts_per_tok=1),
        seed=503,
        contrast={"norm_topk_prob": False},
    ),
    moe_case(
        "qwen3_moe",
        v4(QWEN3_MOE, 1e6, norm_topk_prob=True, num_experts_per_tok=4, mlp_only_layers=[0]),
        seed=511,
        contrast={"norm_topk_prob": False},
        shards=3,
        dtype="bfloat16",
    ),
    # As transformers 5 writes it; a window in all layers.
    moe_case(
        "qwen3_moe_window",
        v5(
            {key: value for key, value in QWEN3_MOE.items() if key != "num_experts"},
            num_local_experts=6,
            use_sliding_window=True,
            sliding_window=20,
            attention_bias=True,
        ),
        seed=512,
        contrast={"sliding_window": 21},
    ),
    moe_case(
        "mixtral",
        v4(MIXTRAL, 1e6, sliding_window=None),
        seed=521,
        contrast={"sliding_window": 40},
        dtype="bfloat16",
    ),
    moe_case(
        "mixtral_window",
        v5(MIXTRAL, 1e6, sliding_window=24, head_dim=16, num_experts_per_tok=3),
        seed=522,
        contrast={"sliding_window": 23},
        shards=2,
    ),
    moe_case(
        "olmoe",
        v4(OLMOE, num_experts_per_tok=4, num_key_value_heads=4, rms_norm_eps=1e-5),
        seed=533,
        contrast={"norm_topk_prob": True},
        dtype="bfloat16",
    ),
    # Grouped heads, each group norm over all of them, and clipped.
    moe_case(
        "olmoe_clip",
        v5(OLMOE, clip_qkv=0.7, norm_topk_prob=True, attention_bias=True),
        seed=532,
        contrast={"clip_qkv": None},
    ),
]

CASES = LLAMA_CASES + MISTRAL_CASES + QWEN2_CASES + QWEN3_CASES + MOE_CASES
