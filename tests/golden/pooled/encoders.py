"""Encoders: their checkpoints, and small tokenizers with the templates of published ones."""

import dataclasses
import json
import string
from pathlib import Path

from tests.golden.pooled.cases import Case
from tests.golden.random_checkpoint import Shapes, linear_shapes

LENGTHS = (6, 41, 128)  # the last one is all that there are positions for
PAIRS = (
    ("what is the capital of france", "paris is the capital and the largest city of france"),
    ("how many days", "a week has seven"),
    ("sum", "one and two is seven," + 5 * " one and two is seven,"),
)
WORDS = ("what", "is", "the", "capital", "of", "paris", "city", "day", "a", "week", "seven", "sum")
BERT_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
ROBERTA_SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")

BERT = {
    "architectures": ["BertModel"],
    "model_type": "bert",
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "max_position_embeddings": 128,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "initializer_range": 0.02,
    "pad_token_id": 0,
    "position_embedding_type": "absolute",
    "transformers_version": "4.51.3",
}
XLM_ROBERTA = BERT | {
    "architectures": ["XLMRobertaModel"],
    "model_type": "xlm-roberta",
    "max_position_embeddings": 130,
    "type_vocab_size": 1,
    "layer_norm_eps": 1e-5,
    "bos_token_id": 0,
    "pad_token_id": 1,
    "eos_token_id": 2,
}


@dataclasses.dataclass(frozen=True)
class EncoderCase(Case):
    has_pooler: bool = False
    pairs: tuple[tuple[str, str], ...] = ()  # in place of random tokens

    @property
    def is_bert(self) -> bool:
        return self.config["model_type"] == "bert"

    def write(self, folder: Path) -> str:
        digest = super().write(folder)
        write_tokenizer(folder, self.is_bert)
        return digest

    def shapes(self) -> Shapes:
        name = "" if self.is_bare else "bert." if self.is_bert else "roberta."
        hidden, num_labels = self.config["hidden_size"], len(self.config.get("id2label", "x"))
        shapes = {name + key: shape for key, shape in encoder_shapes(self.config).items()}
        if self.has_pooler:
            shapes |= linear_shapes(f"{name}pooler.dense", hidden, hidden, True)
        if self.is_scored and self.is_bert:
            shapes |= linear_shapes("classifier", num_labels, hidden, True)
        elif self.is_scored:
            shapes |= linear_shapes("classifier.dense", hidden, hidden, True)
            shapes |= linear_shapes("classifier.out_proj", num_labels, hidden, True)
        return shapes


def encoder_shapes(c: dict) -> Shapes:
    hidden, inner = c["hidden_size"], c["intermediate_size"]
    shapes = {
        "embeddings.word_embeddings.weight": (c["vocab_size"], hidden),
        "embeddings.position_embeddings.weight": (c["max_position_embeddings"], hidden),
        "embeddings.token_type_embeddings.weight": (c["type_vocab_size"], hidden),
        **norm_shapes("embeddings.LayerNorm", hidden),
    }
    for i in range(c["num_hidden_layers"]):
        layer = f"encoder.layer.{i}"
        for name in ("query", "key", "value"):
            shapes |= linear_shapes(f"{layer}.attention.self.{name}", hidden, hidden, True)
        shapes |= linear_shapes(f"{layer}.attention.output.dense", hidden, hidden, True)
        shapes |= norm_shapes(f"{layer}.attention.output.LayerNorm", hidden)
        shapes |= linear_shapes(f"{layer}.intermediate.dense", inner, hidden, True)
        shapes |= linear_shapes(f"{layer}.output.dense", hidden, inner, True)
        shapes |= norm_shapes(f"{layer}.output.LayerNorm", hidden)
    return shapes


def norm_shapes(name: str, size: int) -> Shapes:
    return {f"{name}.weight": (size,), f"{name}.bias": (size,)}


def write_tokenizer(folder: Path, is_bert: bool) -> None:
    """Words, and single letters for what is no word."""
    special = BERT_SPECIAL if is_bert else ROBERTA_SPECIAL
    signs = [*string.ascii_lowercase, *string.digits, *string.punctuation]
    if is_bert:
        pieces = [*special, *WORDS, *signs, *(f"##{sign}" for sign in signs)]
        content = _word_pieces(pieces)
        settings = dict(zip(("pad", "unk", "cls", "sep", "mask"), special, strict=True))
    else:
        words = [("▁", -3.0), *((f"▁{word}", -2.0) for word in WORDS), *((x, -4.0) for x in signs)]
        content = _unigram([*((name, 0.0) for name in special), *words])
        settings = dict(zip(("bos", "pad", "eos", "unk"), special, strict=True))
        settings |= {"cls": "<s>", "sep": "</s>"}
    content |= {"version": "1.0", "truncation": None, "padding": None}
    content["added_tokens"] = [_added(i, name) for i, name in enumerate(special)]
    (folder / "tokenizer.json").write_text(json.dumps(content, indent=1))
    names = {f"{key}_token": value for key, value in settings.items()}
    kind = "BertTokenizer" if is_bert else "XLMRobertaTokenizer"
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind, **names}))


def _word_pieces(pieces: list[str]) -> dict:
    return {
        "normalizer": {
            "type": "BertNormalizer",
            "clean_text": True,
            "handle_chinese_chars": True,
            "strip_accents": None,
            "lowercase": True,
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": _template(
            {"[CLS]": 2, "[SEP]": 3}, ["[CLS]", "A", "[SEP]"], ["B:1", "[SEP]:1"]
        ),
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": {
            "type": "WordPiece",
            "unk_token": "[UNK]",
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
            "vocab": {piece: i for i, piece in enumerate(pieces)},
        },
    }


def _unigram(pieces: list[tuple[str, float]]) -> dict:
    space = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    return {
        "normalizer": None,
        "pre_tokenizer": space,
        "post_processor": _template(
            {"<s>": 0, "</s>": 2}, ["<s>", "A", "</s>"], ["</s>", "B", "</s>"]
        ),
        "decoder": space,
        "model": {"type": "Unigram", "unk_id": 3, "vocab": pieces, "byte_fallback": False},
    }


def _template(special: dict[str, int], single: list[str], second: list[str]) -> dict:
    def piece(spelled: str) -> dict:
        name, _, kind = spelled.partition(":")
        what = "Sequence" if name in ("A", "B") else "SpecialToken"
        return {what: {"id": name, "type_id": int(kind or 0)}}

    return {
        "type": "TemplateProcessing",
        "single": [piece(one) for one in single],
        "pair": [piece(one) for one in (*single, *second)],
        "special_tokens": {
            name: {"id": name, "ids": [i], "tokens": [name]} for name, i in special.items()
        },
    }


def _added(number: int, content: str) -> dict:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": number, "content": content, **flags, "special": True}


def scored(base: dict, architecture: str, count: int) -> dict:
    labels = {str(i): f"LABEL_{i}" for i in range(count)}
    return base | {"architectures": [architecture], "id2label": labels}


BERT_SCORED, XLM_SCORED = "BertForSequenceClassification", "XLMRobertaForSequenceClassification"
ENCODER_CASES = [
    EncoderCase("bert_cls", BERT, seed=721, is_bare=True, has_pooler=True),
    EncoderCase("bert_mean", BERT | {"hidden_act": "gelu_new"}, seed=722, mode="mean"),
    EncoderCase("xlm_roberta_mean", XLM_ROBERTA, seed=723, is_bare=True, mode="mean"),
    EncoderCase("bert_classes", scored(BERT, BERT_SCORED, 3), seed=724, has_pooler=True),
    EncoderCase("bert_pairs", scored(BERT, BERT_SCORED, 1), 725, has_pooler=True, pairs=PAIRS),
    EncoderCase("xlm_roberta_pairs", scored(XLM_ROBERTA, XLM_SCORED, 1), 728, pairs=PAIRS),
]
