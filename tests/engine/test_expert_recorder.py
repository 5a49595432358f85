"""What is recorded of experts, its files, and `jaxserve experts plot`; without a model."""

import types

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from jaxserve import engine_builder
from jaxserve.config import EngineConfig
from jaxserve.errors import RequestError
from jaxserve.expert_files import read_counts
from jaxserve.expert_load import balance
from jaxserve.expert_recorder import ExpertRecorder
from jaxserve.experts import main
from jaxserve.live_request import Chunk, Schedule
from jaxserve.messages import ExpertInfo
from tests.server.serving import DEMO_MODEL

INFO = ExpertInfo(num_layers=3, sparse_layers=[0, 2], num_experts=5, top_k=2)
PADDING = [[-1, -1], [-1, -1]]
# By place of the step: layer 0 and layer 2 of two tokens, then padding.
FIRST = np.array([[[[0, 1], [4, 2]], [[1, 3], [4, 0]], PADDING]], np.int16)
# Two decode steps of one dispatch; the row ends with the first.
SECOND = np.array([[[[2, 1], [4, 3]], PADDING], [PADDING, PADDING]], np.int16)
COUNTS = [
    [[1, 2, 0, 1, 0], [0, 0, 0, 0, 0], [1, 0, 1, 0, 2]],
    [[0, 1, 1, 0, 0], [0, 0, 0, 0, 0], [0, 0, 0, 1, 1]],
]


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


def schedule(tokens: list[int], start: int, num_steps: int = 1, known=(7, 8, 9)) -> Schedule:
    live = types.SimpleNamespace(tokens=list(known))
    return Schedule([Chunk(live, 0, tokens, 1, start)], num_steps, [], [], [], 0)


def record(mode: str | None, most_passes: int | None = None) -> ExpertRecorder:
    recorder = ExpertRecorder(INFO, mode, most_passes, "../recorded")
    recorder.start()
    recorder.take(schedule([7, 8], 0), FIRST)
    recorder.take(schedule([], 2, num_steps=2), SECOND)
    return recorder


def test_without_a_mode_all_counts_go_to_a_csv_in_the_working_directory(tmp_path):
    recorder = record(None)
    path = recorder.dump()()
    assert path.parent == tmp_path / "here"
    assert path.name.startswith("expert_distribution_rank0_timestamp")
    text = path.read_text()
    print(text)
    assert text.splitlines() == [
        "layer_id,expert_id,count",
        *("0,0,1", "0,1,3", "0,2,1", "0,3,1"),
        *("2,0,1", "2,2,1", "2,3,1", "2,4,3"),
    ]
    assert not recorder.is_on, "a dump ends it"
    assert recorder.dump()().read_text() == "layer_id,expert_id,count\n", "and begins anew"


def test_stat_keeps_the_counts_of_each_pass(tmp_path):
    recorder = record("stat")
    path = recorder.dump()()
    assert path.parent.samefile(tmp_path / "recorded") and path.suffix == ".safetensors"
    assert load_file(path)["logical_count"].tolist() == COUNTS
    with safe_open(path, "numpy") as file:
        rate = float(file.metadata()["average_utilization_rate_over_window"])
    # Mean over max: 4/5/2 in both layers of the first pass, 2/5/1 in those of the second.
    assert rate == pytest.approx(0.4)
    assert recorder.is_on, "a dump does not end it"
    assert load_file(recorder.dump()())["logical_count"].shape == (0, 3, 5)


def test_a_record_is_for_nobody_else_to_read():
    assert record("per_token").dump()().stat().st_mode & 0o777 == 0o600


def test_a_record_that_cannot_be_written_is_told_in_words(tmp_path, caplog):
    (tmp_path / "recorded").touch()
    with pytest.raises(RequestError, match="the record of experts is lost: .*cannot be written"):
        record("per_token").dump()()
    assert "cannot be written" in caplog.text


def test_per_pass_keeps_the_latest_passes():
    tensors = load_file(record("per_pass", most_passes=1).dump()())
    assert tensors["forward_pass_id"].tolist() == [1]
    assert tensors["global_physical_count"].tolist() == COUNTS[1:]


def test_per_token_keeps_what_each_token_took():
    tensors = load_file(record("per_token").dump()())
    assert tensors["num_tokens"].tolist() == [2, 1], "padding is no pass"
    assert tensors["is_decode"].tolist() == [0, 1]
    assert tensors["input_ids"].tolist() == [7, 8, 9]
    assert tensors["positions"].tolist() == [0, 1, 2]
    assert tensors["topk_ids_of_layer"].tolist() == [
        [[0, 1], [1, 3], [2, 1]],
        [[-1, -1]] * 3,
        [[4, 2], [4, 0], [4, 3]],
    ]


def test_a_token_that_is_nobodys_any_more_has_no_id():
    recorder = ExpertRecorder(INFO, "per_token", None, "../recorded")
    recorder.start()
    recorder.take(schedule([], 3), SECOND[:1])
    assert load_file(recorder.dump()())["input_ids"].tolist() == [-1]


def test_starting_again_begins_anew(caplog):
    recorder = record("per_pass")
    recorder.start()
    assert "already" in caplog.text
    assert load_file(recorder.dump()())["forward_pass_id"].tolist() == []


@pytest.mark.parametrize("mode", [None, "stat", "per_pass", "per_token"])
def test_every_file_can_be_plotted(mode, tmp_path, capsys):
    path = record(mode).dump()()
    assert read_counts(path).tolist() == np.sum(COUNTS, axis=0).tolist()
    assert main(["plot", str(path), "--output", str(tmp_path / "heat.png")]) == 0
    told = capsys.readouterr().out
    print(told)
    assert "    0        6           4/5        1 (50.0%)      2.50" in told
    assert (tmp_path / "heat.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("mode", [None, "stat", "per_pass", "per_token"])
def test_one_expert_that_does_all_is_the_worst_load(mode):
    """Experts that nobody takes count too."""
    recorder = ExpertRecorder(INFO, mode, None, "../recorded")
    recorder.start()
    alone = np.zeros_like(FIRST[:, :1])
    recorder.take(schedule([7], 0), alone)
    counts = read_counts(recorder.dump()())
    assert balance(counts)[[0, 2]].tolist() == [5.0, 5.0]


def test_balance_is_the_maximum_over_the_mean():
    assert balance(np.array([[3, 3], [6, 0], [0, 0]]))[:2].tolist() == [1.0, 2.0]


@pytest.mark.parametrize(
    "name,content,words",
    [
        ("a.csv", "layer,expert\n", "does not begin with layer_id,expert_id,count"),
        ("a.csv", "layer_id,expert_id,count\n1,2\n", "not three integers"),
        ("a.csv", "layer_id,expert_id,count\n1,2,3,4,5,6\n", "not three integers"),
        ("a.csv", "layer_id,expert_id,count\n1,99999999,2\n", "beyond 0 to 4095"),
        ("a.csv", "layer_id,expert_id,count\n", "nothing was recorded"),
        ("a.pt", "PK", "neither a CSV nor safetensors"),
    ],
)
def test_what_is_no_record_is_told(name, content, words, capsys):
    with open(name, "w") as file:
        file.write(content)
    assert main(["plot", name]) == 1
    assert words in capsys.readouterr().err


def test_a_mode_of_a_model_without_experts_is_refused_before_anything_is_loaded(monkeypatch):
    monkeypatch.setattr(engine_builder, "build_runner", None)
    config = EngineConfig(
        model_path=DEMO_MODEL, device="cpu", expert_distribution_recorder_mode="stat"
    )
    words = "--expert-distribution-recorder-mode stat: Qwen2ForCausalLM has no experts"
    with pytest.raises(ValueError, match=words):
        engine_builder.build_engine(config)
