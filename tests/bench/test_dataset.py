"""Which requests the options of a benchmark make."""

import collections
import hashlib
import json

import pytest

from jaxserve.bench.dataset import Sample, make_samples
from jaxserve.bench.options import DatasetOptions

VOCAB = 500


def samples(**options) -> list[Sample]:
    return make_samples(DatasetOptions(**options), VOCAB)


def digest(made: list[Sample]) -> str:
    plain = json.dumps([[sample.prompt, sample.output_len] for sample in made])
    return hashlib.sha256(plain.encode()).hexdigest()[:16]


def test_random_lengths_are_exact_by_default():
    made = samples(num_prompts=5, input_len=7, output_len=9)
    assert [(len(sample.prompt), sample.output_len) for sample in made] == [(7, 9)] * 5
    assert len({tuple(sample.prompt) for sample in made}) == 5
    assert len(samples()) == 64


def test_random_ids_cover_the_vocabulary_and_stay_in_it():
    ids = {token for sample in samples(input_len=100) for token in sample.prompt}
    assert ids == set(range(VOCAB))
    own = make_samples(DatasetOptions(vocab_size=3, input_len=50), VOCAB)
    assert {token for sample in own for token in sample.prompt} == {0, 1, 2}


def test_range_ratio_is_the_least_share():
    made = samples(num_prompts=400, input_len=20, output_len=10, range_ratio=0.5)
    assert {len(sample.prompt) for sample in made} == set(range(10, 21))
    assert {sample.output_len for sample in made} == set(range(5, 11))
    least = samples(num_prompts=100, input_len=2, output_len=2, range_ratio=0.0)
    assert {len(sample.prompt) for sample in least} == {1, 2}


@pytest.mark.parametrize(
    "options,expected",
    [
        ({"dataset": "random"}, "62291d9dd30aaa47"),
        ({"dataset": "random", "range_ratio": 0.3}, "0cdf3e51450619b5"),
        ({"dataset": "shared-prefix"}, "988572e7b26a21a7"),
    ],
    ids=str,
)
def test_same_options_make_the_same_requests_everywhere(options, expected):
    """Figures of different days are of the same requests; only another seed makes others."""
    assert digest(samples(**options)) == expected
    assert digest(samples(**options, seed=1)) != expected


def test_shared_prefix_has_groups():
    made = samples(
        dataset="shared-prefix", num_prompts=10, num_groups=3, system_prompt_len=20, input_len=5
    )
    groups = collections.Counter(tuple(sample.prompt[:20]) for sample in made)
    assert sorted(groups.values()) == [3, 3, 4]
    assert {len(sample.prompt) for sample in made} == {25}
    assert len({tuple(sample.prompt[20:]) for sample in made}) == 10
    order = [list(groups).index(tuple(sample.prompt[:20])) for sample in made]
    print(order)
    assert order != [index % 3 for index in range(10)], "in a random order"


def test_vocabulary_that_nobody_knows():
    with pytest.raises(ValueError, match="--vocab-size"):
        make_samples(DatasetOptions(), None)
    assert make_samples(DatasetOptions(vocab_size=9), None)


@pytest.fixture
def read(tmp_path):
    def read(content: str | bytes, **options) -> list[Sample]:
        path = tmp_path / "prompts.jsonl"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return samples(dataset="file", dataset_path=str(path), **options)

    return read


def test_file_of_prompts(read):
    content = '{"prompt": "Grüße"}\n\n{"prompt": [5, 0], "output_len": 3, "more": 1}\r\n'
    assert read(content, output_len=8) == [Sample("Grüße", 8), Sample([5, 0], 3)]
    assert read(content, num_prompts=1) == [Sample("Grüße", 64)]


def test_file_of_conversations(read):
    talk = [
        {
            "id": "1",
            "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}],
        },
        {"conversations": []},
        {"conversations": [{"from": "gpt", "value": "b"}]},
        {"conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "c"}]},
        {"messages": [{"role": "user", "content": "d"}], "output_len": 2},
    ]
    expected = [Sample("a", 64), Sample("c", 64), Sample("d", 2)]
    assert read(json.dumps(talk, indent=2)) == expected, "one JSON array"
    assert read("\n".join(map(json.dumps, talk))) == expected, "a record a line"


BAD = {
    "{": "line 2: not JSON",
    "[" * 100_000: "line 2: not JSON",
    "[1]": "line 2: must be an object, got [1]",
    "7": "line 2: must be an object, got 7",
    '{"text": "a"}': 'line 2: has neither "prompt" nor "conversations"',
    '{"prompt": ""}': 'line 2: "prompt" must be a text or a list of token ids, got ""',
    '{"prompt": []}': 'line 2: "prompt" must be',
    '{"prompt": [1, "2"]}': 'line 2: "prompt" must be a text or a list of token ids, got [1, "2"]',
    '{"prompt": [1, true]}': 'line 2: "prompt" must be',
    '{"prompt": [-1]}': 'line 2: "prompt" must be',
    '{"prompt": null}': 'line 2: "prompt" must be',
    '{"prompt": "a", "output_len": 0}': 'line 2: "output_len" must be a positive integer, got 0',
    '{"prompt": "a", "output_len": "9"}': 'line 2: "output_len" must be',
    '{"prompt": "a", "output_len": true}': 'line 2: "output_len" must be',
    '{"prompt": "a", "output_len": null}': 'line 2: "output_len" must be',
    '{"conversations": "hello"}': 'line 2: "conversations" must be a list of objects',
    '{"conversations": ["hello"]}': 'line 2: "conversations" must be a list of objects',
    '{"conversations": [{"from": "human", "value": 7}]}': 'line 2: a turn of "conversations" must',
}


@pytest.mark.parametrize("line", BAD, ids=lambda line: line[:40])
def test_bad_line_is_told_with_its_place(read, tmp_path, line):
    with pytest.raises(ValueError) as error:
        read('{"prompt": "good"}\n' + line)
    print(error.value)
    assert str(error.value).startswith(f"{tmp_path}/prompts.jsonl, {BAD[line]}")
    assert len(str(error.value)) < 400


def test_bad_record_of_an_array_is_told_by_its_number(read):
    with pytest.raises(ValueError, match="record 2: must be an object"):
        read('[{"prompt": "a"}, 3]')


def test_files_without_prompts(read, tmp_path):
    for content in ("", "\n\n", "[]", '{"conversations": []}'):
        with pytest.raises(ValueError, match="no prompt in it"):
            read(content)
    with pytest.raises(ValueError, match="not UTF-8"):
        read(b'{"prompt": "\xff"}')
    with pytest.raises(FileNotFoundError):
        samples(dataset="file", dataset_path=str(tmp_path / "nowhere"))
