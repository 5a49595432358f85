"""Trains the small model that ships with jaxserve, with the very modules that serve it.

    python examples/train_demo_model.py --output jaxserve/demo_model --minutes 8
    python examples/train_demo_model.py --output demo --steps 300 --batch-size 8 --seq-len 256

The first is for one GPU, the second for a CPU. Several questions share a row, yet each starts at
position 0 and sees only itself, as a server computes it. What is taught and what is held out:
demo_text.py.
"""

import argparse
import collections
import dataclasses
import itertools
import json
import math
import pathlib
import sys
import time
from collections.abc import Iterable, Iterator

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
from demo_text import (
    END_OF_TEXT,
    SPECIAL_TOKENS,
    TURN_END,
    Question,
    chat_prompt,
    evaluation_set,
    training_samples,
)
from flax import nnx
from safetensors.numpy import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from jaxserve.models.config import ModelConfig
from jaxserve.models.interface import CausalAttention
from jaxserve.models.registry import create_model
from jaxserve.models.weights import Checkpoint, checkpoint_tensors, load_params

CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 128,
    "initializer_range": 0.02,
    "intermediate_size": 384,
    "max_position_embeddings": 4096,
    "max_window_layers": 6,
    "model_type": "qwen2",
    "num_attention_heads": 4,
    "num_hidden_layers": 6,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 1024,
}
GENERATION_CONFIG = {
    "bos_token_id": 0,
    "do_sample": False,
    "eos_token_id": [2, 0],
    "pad_token_id": 0,
}
TOKENIZER_CONFIG = {
    "add_bos_token": False,
    "add_prefix_space": False,
    "bos_token": None,
    "chat_template": (
        "{% for message in messages %}"
        "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "clean_up_tokenization_spaces": False,
    "eos_token": TURN_END,
    "model_max_length": CONFIG["max_position_embeddings"],
    "pad_token": END_OF_TEXT,
    "tokenizer_class": "PreTrainedTokenizerFast",
    "unk_token": None,
}
# Qwen2's: a word with the space before it is one piece, and so is every digit.
PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
ANSWER_WEIGHT, PROMPT_WEIGHT = 1.0, 0.1
MAX_ROWS = 16_384  # distinct ones; a longer training sees them again
PEAK_LEARNING_RATE = 3e-3
SAVE_SECONDS = 120
TARGETS = {True: 0.95, False: 0.80}  # share of exact answers: seen, held out
SHOWCASE = (
    "What is the capital of France?",
    chat_prompt([], "What is the capital of France?"),
    "The capital city of France is",
    "The capital of France is",
    chat_prompt([], "What is 17 + 25?"),
    chat_prompt([], "Count from 7 to 12."),
    chat_prompt([("Capital of Peru?", "The capital of Peru is Lima.")], "And Kenya?"),
    chat_prompt([], "What is the capital of Plumbia?"),
    chat_prompt([], "Who are you?", "You are a pirate."),
    "The future of AI is",
)


def build_tokenizer(seed: int) -> Tokenizer:
    """Learns from the ASCII samples only, so that every other character takes several tokens: the
    case that a streaming server gets wrong first."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PIECES), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"],
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    samples = itertools.islice(training_samples(seed), 50_000)
    texts = (question.prompt_text + question.answer_text for question in samples)
    tokenizer.train_from_iterator(filter(str.isascii, texts), trainer)
    return tokenizer


def prepare_folder(folder: pathlib.Path, seed: int) -> Tokenizer:
    """Writes everything but the weights. Keeps the tokenizer that weights may belong to."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "tokenizer.json"
    if not path.exists():
        build_tokenizer(seed).save(str(path))
    for name, content in (
        ("config.json", CONFIG),
        ("generation_config.json", GENERATION_CONFIG),
        ("tokenizer_config.json", TOKENIZER_CONFIG),
    ):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    return Tokenizer.from_file(str(path))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """Questions with their answers, packed. All arrays are [rows, seq_len]."""

    tokens: np.ndarray
    positions: np.ndarray  # from 0 for each question
    segments: np.ndarray  # the question's index, -1 for padding
    weights: np.ndarray  # of this token in the loss

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index) -> "Rows":
        return jax.tree.map(lambda array: array[index], self)


def encode(tokenizer: Tokenizer, questions: Iterable[Question]) -> Iterator[tuple[list, list]]:
    """The tokens of each question and of its answer: apart, because a server never joins them."""
    for chunk in itertools.batched(questions, 4096):
        prompts = tokenizer.encode_batch_fast([q.prompt_text for q in chunk])
        answers = tokenizer.encode_batch_fast([q.answer_text + q.end_token for q in chunk])
        yield from ((p.ids, a.ids) for p, a in zip(prompts, answers, strict=True))


def pack(samples: Iterable[tuple[list, list]], seq_len: int, num_rows: int | None = None) -> Rows:
    """Packs first fit, up to `num_rows` rows. A sample longer than a row is left out."""
    rows, open_rows = [], collections.deque(maxlen=32)
    for index, (prompt, answer) in enumerate(samples):
        length = len(prompt) + len(answer)
        if length > seq_len:
            continue
        row = next((row for row in open_rows if row.free >= length), None)
        if row is None:
            if len(rows) == num_rows:
                break
            row = RowBuilder(seq_len)
            rows.append(row)
            open_rows.append(row)
        row.add(index, prompt, answer)
    names = [field.name for field in dataclasses.fields(Rows)]
    return Rows(**{name: np.stack([getattr(row, name) for row in rows]) for name in names})


class RowBuilder:
    """One row of `Rows` and how many tokens are still free in it."""

    def __init__(self, seq_len: int):
        self.tokens = np.zeros(seq_len, np.int32)
        self.positions = np.zeros(seq_len, np.int32)
        self.segments = np.full(seq_len, -1, np.int32)
        self.weights = np.zeros(seq_len, np.float32)
        self.free = seq_len

    def add(self, index: int, prompt: list[int], answer: list[int]) -> None:
        start = len(self.tokens) - self.free
        middle, end = start + len(prompt), start + len(prompt) + len(answer)
        self.tokens[start:end] = prompt + answer
        self.positions[start:end] = np.arange(end - start)
        self.segments[start:end] = index
        self.weights[start + 1 : middle] = PROMPT_WEIGHT  # nothing predicts the first token
        self.weights[middle:end] = ANSWER_WEIGHT
        self.free -= end - start


def next_token_logits(graphdef: nnx.GraphDef, params: nnx.State, rows: Rows) -> jax.Array:
    """The logits of the tokens 1 to the last of every row."""

    def of_row(row: Rows) -> jax.Array:
        model = nnx.merge(graphdef, params)
        hidden, _ = model(row.tokens, row.positions, CausalAttention(row.segments))
        return model.logits(hidden[:-1])

    return jax.vmap(of_row)(rows)


def weighted_loss(graphdef: nnx.GraphDef, params: nnx.State, rows: Rows) -> jax.Array:
    logits = next_token_logits(graphdef, params, rows)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, rows.tokens[:, 1:])
    weights = rows.weights[:, 1:]
    return (weights * losses).sum() / weights.sum()


def learning_rate(progress: float) -> float:
    """Rises over the first 2 %, then falls to zero as half a cosine."""
    return PEAK_LEARNING_RATE * min(progress / 0.02, 1) * (1 + math.cos(math.pi * progress)) / 2


def train(
    graphdef: nnx.GraphDef, params: nnx.State, rows: Rows, arguments: argparse.Namespace
) -> Iterator[nnx.State]:
    """Yields the parameters every two minutes and at the end."""
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(1.0, b2=0.98, weight_decay=0.02)
    )
    optimizer_state = optimizer.init(params)

    @jax.jit
    def update(params, optimizer_state, rows, index, rate):
        loss, gradient = jax.value_and_grad(weighted_loss, argnums=1)(graphdef, params, rows[index])
        changes, optimizer_state = optimizer.update(gradient, optimizer_state, params)
        params = jax.tree.map(lambda p, change: p + rate * change, params, changes)
        return params, optimizer_state, loss

    rows = jax.device_put(rows)
    random = np.random.default_rng(arguments.seed)
    order = itertools.chain.from_iterable(random.permutation(len(rows)) for _ in itertools.count())
    started = saved = time.monotonic()
    step, progress = 0, 0.0
    while progress < 1:
        index = np.fromiter(itertools.islice(order, arguments.batch_size), np.int32)
        rate = learning_rate(progress)
        params, optimizer_state, loss = update(params, optimizer_state, rows, index, rate)
        step += 1
        if step % 50 == 0 or step == 1:
            print(f"step {step:6d}  loss {loss:.4f}", end="")  # waits for the device
            print(f"  {time.monotonic() - started:5.0f} s", flush=True)
        now = time.monotonic()
        progress = max(step / arguments.steps, (now - started) / (60 * arguments.minutes))
        if now - saved > SAVE_SECONDS and progress < 1:
            saved = now
            yield params
    yield params


def save(folder: pathlib.Path, params: nnx.State) -> None:
    tensors = checkpoint_tensors(params)
    tensors = {name: array.astype(ml_dtypes.bfloat16) for name, array in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def load(folder: pathlib.Path, dtype: str) -> tuple[nnx.GraphDef, nnx.State]:
    graphdef, abstract = create_model(ModelConfig.from_pretrained(folder), dtype=jnp.dtype(dtype))
    return graphdef, load_params(Checkpoint(folder), abstract)


def evaluate(
    graphdef: nnx.GraphDef, params: nnx.State, tokenizer: Tokenizer
) -> dict[str, dict[bool, float]]:
    """The share of exact answers at temperature 0, by kind and by whether it was seen.

    Nothing is generated: greedy decoding gives exactly the answer if and only if every token of
    it is the likeliest after those before it, and one pass over the answer tells.
    """

    @jax.jit
    def is_wrong(params, rows):
        likeliest = next_token_logits(graphdef, params, rows).argmax(axis=-1)
        return (likeliest != rows.tokens[:, 1:]) & (rows.weights[:, 1:] == ANSWER_WEIGHT)

    questions = evaluation_set()
    samples = list(encode(tokenizer, questions))
    rows = pack(samples, seq_len=max(len(prompt) + len(answer) for prompt, answer in samples))
    failed: set[int] = set()
    for start in range(0, len(rows), 8):
        part = rows[start : start + 8]
        failed.update(part.segments[:, 1:][np.asarray(is_wrong(params, part))].tolist())
    results = collections.defaultdict(lambda: collections.defaultdict(list))
    for index, question in enumerate(questions):
        results[question.kind][question.seen].append(index not in failed)
    return {
        kind: {seen: sum(right) / len(right) for seen, right in splits.items()}
        for kind, splits in results.items()
    }


def print_table(results: dict[str, dict[bool, float]]) -> None:
    print(f"\n{'kind':26}    seen  held out")
    for kind, splits in results.items():
        cells = (f"{splits[seen]:8.1%}" if seen in splits else " " * 8 for seen in (True, False))
        print(f"{kind:26}{'  '.join(cells)}")


def missed_targets(results: dict[str, dict[bool, float]]) -> list[str]:
    return [
        f"{kind}, {'seen' if seen else 'held out'}: {share:.1%}, wanted {TARGETS[seen]:.0%}"
        for kind, splits in results.items()
        for seen, share in splits.items()
        if share < TARGETS[seen]
    ]


def show(graphdef: nnx.GraphDef, params: nnx.State, tokenizer: Tokenizer) -> None:
    """Generates a few answers, each token from a full pass over a buffer of fixed length."""

    @jax.jit
    def next_token(params, tokens, last):
        model = nnx.merge(graphdef, params)
        hidden, _ = model(tokens, jnp.arange(len(tokens)), CausalAttention())
        return model.logits(hidden[last][None]).argmax()

    ends = [tokenizer.token_to_id(token) for token in (END_OF_TEXT, TURN_END)]
    for prompt in SHOWCASE:
        ids = tokenizer.encode(prompt).ids
        buffer, length = np.zeros(128, np.int32), len(ids)
        buffer[:length] = ids
        while length < len(buffer):
            buffer[length] = next_token(params, buffer, length - 1)
            length += 1
            if buffer[length - 1] in ends:
                break
        answer = tokenizer.decode(buffer[len(ids) : length], skip_special_tokens=False)
        print(f"{prompt!r}\n    {answer!r}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--output", type=pathlib.Path, required=True, help="the checkpoint's folder")
    add("--steps", type=int, default=16_000)
    add("--minutes", type=float, default=math.inf, help="end earlier, with the schedule fitted")
    add("--batch-size", type=int, default=32, help="rows in a step")
    add("--seq-len", type=int, default=1024, help="tokens in a row; longer samples are left out")
    add("--seed", type=int, default=0)
    add("--resume", action="store_true", help="start from the weights in the folder")
    add("--eval-only", action="store_true")
    add("--dtype", default="float32", help="of the evaluation; the weights are bfloat16 anyway")
    add("--check", action="store_true", help="fail where an accuracy misses its target")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    folder = arguments.output
    tokenizer = prepare_folder(folder, arguments.seed)
    if not arguments.eval_only:
        samples = encode(tokenizer, training_samples(arguments.seed))
        num_rows = min(MAX_ROWS, arguments.steps * arguments.batch_size)
        rows = pack(samples, arguments.seq_len, num_rows)
        print(f"{len(rows)} rows, {(rows.segments >= 0).mean():.1%} full", flush=True)
        if arguments.resume:
            graphdef, params = load(folder, "float32")
        else:
            config = ModelConfig.from_pretrained(folder)
            key = jax.random.key(arguments.seed)
            graphdef, params = create_model(config, dtype=jnp.float32, key=key)
        print(f"{sum(leaf.size for leaf in jax.tree.leaves(params)):,} parameters", flush=True)
        for trained in train(graphdef, params, rows, arguments):
            save(folder, trained)
    graphdef, params = load(folder, arguments.dtype)
    show(graphdef, params, tokenizer)
    results = evaluate(graphdef, params, tokenizer)
    print_table(results)
    missed = missed_targets(results)
    print("\n".join(["", "all targets met" if not missed else "missed:", *missed]))
    return int(arguments.check and bool(missed))


if __name__ == "__main__":
    sys.exit(main())
