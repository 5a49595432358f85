"""What an encoder's config.json may say, and what of a checkpoint it has no use for."""

import numpy as np
import pytest

from jaxserve.config import EngineConfig
from jaxserve.model_loader import ModelFiles
from jaxserve.models.config import ModelConfig
from jaxserve.models.load_format import open_checkpoint
from jaxserve.models.registry import create_model, head_of, is_encoder, is_pooled
from jaxserve.models.weights import check, views
from tests.golden.pooled.encoders import BERT, ENCODER_CASES, XLM_ROBERTA, encoder_shapes
from tests.golden.random_checkpoint import save

BY_NAME = {case.name: case for case in ENCODER_CASES}


@pytest.mark.parametrize(
    "name, encoder, head",
    [
        ("BertModel", True, None),
        ("XLMRobertaModel", True, None),
        ("RobertaForSequenceClassification", True, "classifier"),
        ("BertForSequenceClassification", True, "classifier"),
        ("LlamaForSequenceClassification", False, "score"),
        ("Qwen2Model", False, None),
    ],
)
def test_architectures(name, encoder, head):
    assert (is_encoder(name), is_pooled(name), head_of(name)) == (encoder, True, head)


def test_positions_and_types():
    bert, roberta = ModelConfig.from_dict(BERT), ModelConfig.from_dict(XLM_ROBERTA)
    assert (bert.context_length, bert.encoder.first_position) == (128, 0)
    assert (roberta.context_length, roberta.encoder.first_position) == (128, 2)
    assert (bert.encoder.num_token_types, roberta.encoder.num_token_types) == (2, 1)
    other = ModelConfig.from_dict(XLM_ROBERTA | {"pad_token_id": 0})
    assert (other.context_length, other.encoder.first_position) == (129, 1)
    assert ModelConfig.from_dict(BERT, 64).context_length == 64
    assert bert.dtype == "float32", "as transformers has it where nothing is said"


@pytest.mark.parametrize(
    "change, context, words",
    [
        ({"hidden_act": "swish"}, None, "hidden_act 'swish' is not served; known: gelu"),
        ({"position_embedding_type": "relative_key"}, None, "only absolute is served"),
        ({"is_decoder": True}, None, "is_decoder"),
        ({"layer_norm_eps": "small"}, None, "layer_norm_eps"),
        ({}, 129, "--context-length 129: the model has learned 128 positions"),
    ],
)
def test_what_is_not_served_is_refused(change, context, words):
    with pytest.raises(ValueError, match=words):
        ModelConfig.from_dict(BERT | change, context)


@pytest.mark.parametrize("name", ["bert_cls", "bert_mean", "xlm_roberta_pairs"])
def test_names_are_those_of_the_checkpoint(name, tmp_path):
    """Those of a bare model, with a prefix, with a classifier; nothing left but a pooler."""
    case = BY_NAME[name]
    case.write(tmp_path)
    files = ModelFiles.find(EngineConfig(model_path=str(tmp_path), dtype="float32"))
    _, abstract = create_model(files.config)
    left = set(case.shapes()) - {view.name for view in views(abstract)}
    assert left == ({"pooler.dense.weight", "pooler.dense.bias"} if case.has_pooler else set())
    check(open_checkpoint(tmp_path), abstract)
    assert files.config.pooling.is_whole
    assert files.config.pooling.mode == ("mean" if case.mode else "cls")


def test_buffers_are_passed_over_and_other_tensors_are_not(tmp_path):
    config = ModelConfig.from_dict(BERT)
    _, abstract = create_model(config)
    shapes = encoder_shapes(BERT) | {"embeddings.position_ids": (1, 128)}
    tensors = {key: np.zeros(shape, np.float32) for key, shape in shapes.items()}
    save(tensors, "float32", tmp_path / "model.safetensors")
    check(open_checkpoint(tmp_path), abstract)
    save(tensors | {"cls.bias": np.zeros(3, np.float32)}, "float32", tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"not in the model: cls\.bias"):
        check(open_checkpoint(tmp_path), abstract)


def test_deterministic_is_refused(tmp_path):
    BY_NAME["bert_cls"].write(tmp_path)
    with pytest.raises(ValueError, match="--deterministic: BertModel"):
        ModelFiles.find(EngineConfig(model_path=str(tmp_path), deterministic=True))
