"""What config.json and sentence-transformers' files say of pooling, and which names are served."""

import dataclasses
import json

import pytest

from jaxserve.models.config import ModelConfig
from jaxserve.models.pooling import PoolingConfig
from jaxserve.models.registry import ARCHITECTURES, create_model, decoder_of, head_of, is_pooled
from jaxserve.models.weights import views
from tests.golden.cases import CASES as DECODERS
from tests.golden.cases import LLAMA, v4
from tests.golden.pooled.cases import CASES, write_modules

HIDDEN = 64


def pooling(folder, raw=None, head=None) -> PoolingConfig:
    return PoolingConfig.of(folder, raw or {}, hidden_size=HIDDEN, head=head)


def test_without_files_it_is_the_last_token_normalized(tmp_path):
    assert pooling(tmp_path) == PoolingConfig(HIDDEN, "last", is_normalized=True)


@pytest.mark.parametrize("mode", ["last", "cls", "mean", "max"])
@pytest.mark.parametrize("is_normalized", [True, False])
def test_files_of_sentence_transformers_decide(tmp_path, mode, is_normalized):
    write_modules(tmp_path, mode, is_normalized)
    found = pooling(tmp_path)
    assert (found.mode, found.is_normalized) == (mode, is_normalized)
    assert found.needs_all_tokens == (mode != "last")


@pytest.mark.parametrize("named", ["lasttoken", "mean", "cls", "max"])
def test_mode_by_name(tmp_path, named):
    write_modules(tmp_path, "mean")
    (tmp_path / "1_Pooling/config.json").write_text(json.dumps({"pooling_mode": named}))
    assert pooling(tmp_path).mode == named.removesuffix("token")


def module(kind: str, path: str = "1_Pooling") -> dict:
    return {"type": f"sentence_transformers.models.{kind}", "path": path}


@pytest.mark.parametrize(
    "modules, words",
    [
        ([module("Transformer"), module("Pooling"), module("Dense")], "Dense"),
        ([module("Pooling"), module("Pooling")], "only one Pooling"),
        ([module("Pooling", "../other")], "outside"),
        ([module("Pooling", "..")], "outside"),
        ([module("Normalize", "/etc")], "outside"),
        (["Pooling"], "'Pooling' is no module"),
        ({}, "no JSON array"),
    ],
)
def test_modules_that_are_not_served_are_refused_in_words(tmp_path, modules, words):
    write_modules(tmp_path, "mean")
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ValueError, match=words):
        pooling(tmp_path)


def test_missing_file_is_told_as_missing(tmp_path):
    write_modules(tmp_path, "mean")
    (tmp_path / "modules.json").write_text(json.dumps([module("Pooling", "elsewhere")]))
    words = "elsewhere/config.json is missing, which modules.json names"
    with pytest.raises(FileNotFoundError, match=words):
        pooling(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        {"pooling_mode_weightedmean_tokens": True},
        {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True},
        {"pooling_mode": "median"},
        {},
    ],
)
def test_other_pooling_is_refused_in_words(tmp_path, content):
    write_modules(tmp_path, "mean")
    (tmp_path / "1_Pooling/config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="not served; known: last, cls, mean, max"):
        pooling(tmp_path)


@pytest.mark.parametrize(
    "raw, head, size",
    [
        ({}, "score", 2),
        ({}, "reward", 1),
        ({"id2label": {"0": "a", "1": "b", "2": "c"}}, "score", 3),
        ({"num_labels": 5}, "reward", 5),
    ],
)
def test_heads_have_a_score_for_each_label(tmp_path, raw, head, size):
    write_modules(tmp_path, "mean")  # which are for embeddings
    found = pooling(tmp_path, raw, head)
    assert (found.size, found.is_normalized, found.mode) == (size, False, "last")


@pytest.mark.parametrize(
    "raw, dimensions",
    [
        ({}, None),
        ({"is_matryoshka": True}, ()),
        ({"is_matryoshka": True, "matryoshka_dimensions": [16, 32]}, (16, 32)),
    ],
)
def test_dimensions_that_a_vector_may_be_cut_to(tmp_path, raw, dimensions):
    assert pooling(tmp_path, raw).dimensions == dimensions


@pytest.mark.parametrize(
    "raw", [{"matryoshka_dimensions": [128]}, {"matryoshka_dimensions": "16"}, {"num_labels": 0}]
)
def test_bad_values_are_named(tmp_path, raw):
    (name,) = raw
    with pytest.raises(ValueError, match=name):
        pooling(tmp_path, raw, "score" if name == "num_labels" else None)


def test_names_of_architectures():
    assert decoder_of("Qwen2ForRewardModel") == "Qwen2ForCausalLM"
    assert decoder_of("LlamaForSequenceClassification") == "LlamaForCausalLM"
    assert decoder_of("MistralModel") == "MistralForCausalLM"
    heads = {case.architecture: head_of(case.architecture) for case in CASES}
    print(heads)
    assert heads["Qwen2ForRewardModel"] == "reward"
    assert heads["LlamaForSequenceClassification"] == "score"
    assert heads["MistralModel"] is heads["Qwen2ForCausalLM"] is None
    assert not any(is_pooled(name) for name in ARCHITECTURES)


@pytest.mark.parametrize("name", ["T5Model", "GPT2ForSequenceClassification", "Model", 3])
def test_unknown_architectures_are_refused(name):
    with pytest.raises(ValueError, match="are not served; known: Llama"):
        ModelConfig.from_dict(v4(LLAMA, architectures=[name]))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_parameters_are_those_of_the_file_but_for_a_head_that_predicts(case):
    head = head_of(case.architecture)
    config = ModelConfig.from_dict(case.config)
    size = len(case.config.get("id2label", "x")) if head else HIDDEN
    pooled = PoolingConfig(size, head=head, is_bare=case.is_bare)
    abstract = create_model(ModelConfig(**vars(config) | {"pooling": pooled}), dtype="float32")[1]
    found = {view.name: view.shape for view in views(abstract)}
    wanted = case.shapes()
    wanted.pop("lm_head.weight", None)
    assert found == wanted


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_decoder_can_score(architecture):
    """Its own parameters, but for the head."""
    raw = next(case.config for case in DECODERS if case.config["architectures"] == [architecture])
    config = ModelConfig.from_dict(raw | {"tie_word_embeddings": False})
    scored = dataclasses.replace(config, pooling=PoolingConfig(2, head="score"))
    before, after = ({v.name for v in views(create_model(c)[1])} for c in (config, scored))
    assert before - after == {"lm_head.weight"} and after - before == {"score.weight"}
