"""Text to token ids: long texts, and tokenizers that are not what they should be."""

import json
import resource
import shutil
import time

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from jaxserve.background import Task
from jaxserve.tokenizer import PIECE, Tokenizer
from jaxserve.tokenizer_identity import TokenizerIdentity
from tests.server.serving import DEMO_MODEL, wait_for

CORPUS = ["The capital of France is Paris.", "one two three", "漢字かな交じり文", "ééé ààà", "    "]
UNITS = {
    "words": "What is the capital of France? ",
    "one letter": "a",
    "spaces": " ",
    "lines": "\n\n \t",
    "Chinese": "漢字",
    "full width": "Ａ１",
    "accents": "e\u0301\u0302",
    "emoji": "👩\u200d👩\u200d👧",
    "unknown": "\U000f1234",
    "special": "<|im_end|>",
}


def byte_level() -> tokenizers.Tokenizer:
    """As Llama 3 and Qwen have it, and the bundled model."""
    return tokenizers.Tokenizer.from_file(f"{DEMO_MODEL}/tokenizer.json")


def metaspace() -> tokenizers.Tokenizer:
    """As Llama 2 and Mistral have it: a space is a letter, an unknown letter its bytes."""
    made = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    hexadecimal = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<unk>", *hexadecimal], show_progress=False
    )
    made.train_from_iterator(CORPUS, trainer)
    return made


def folding() -> tokenizers.Tokenizer:
    """As T5 has it: forms are unified, runs of spaces become one, unknown runs one token."""
    made = tokenizers.Tokenizer(models.Unigram())
    made.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Replace(tokenizers.Regex(" {2,}"), " ")]
    )
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=100, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False
    )
    made.train_from_iterator(CORPUS, trainer)
    return made


def stripping() -> tokenizers.Tokenizer:
    """As BERT has it: accents and spaces are dropped, a long word is one unknown token."""
    made = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=100, special_tokens=["[UNK]"], show_progress=False
    )
    made.train_from_iterator(CORPUS, trainer)
    return made


@pytest.fixture(scope="module", params=[byte_level, metaspace, folding, stripping])
def tokenizer(request, tmp_path_factory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    request.param().save(str(folder / "tokenizer.json"))
    return Tokenizer(folder)


@pytest.fixture
def folder(tmp_path):
    """With the bundled tokenizer, to be damaged."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(f"{DEMO_MODEL}/{name}", tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "content,words",
    [
        ("{", "is not JSON"),
        ("", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        ("[]", "holds no JSON object"),
        ("null", "holds no JSON object"),
        ({"eos_token": 5}, "eos_token is 5, needs a string or an object with its content"),
        ({"eos_token": ["</s>"]}, r"eos_token is \['</s>'\], needs a string"),
        ({"eos_token": {"content": 5}}, "eos_token is {'content': 5}, needs a string"),
    ],
    ids=str,
)
def test_broken_tokenizer_config_names_the_file_and_the_key(folder, content, words):
    path = folder / "tokenizer_config.json"
    content = json.dumps(content) if isinstance(content, dict) else content
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=f"tokenizer_config.json.*{words}"):
        Tokenizer(folder)


def test_broken_tokenizer_names_the_file(folder):
    (folder / "tokenizer.json").write_text('{"model": 5}')
    with pytest.raises(ValueError, match="tokenizer.json is no tokenizer"):
        Tokenizer(folder)


def test_panic_is_an_ordinary_error(folder):
    """`pyo3_runtime.PanicException` is none."""

    class Panic(BaseException):
        pass

    class Backend:
        def encode(self, text, add_special_tokens=True):
            raise Panic("index out of bounds")

        def decode(self, ids, skip_special_tokens):
            raise Panic("index out of bounds")

    tokenizer = Tokenizer(folder)
    tokenizer._backend = Backend()
    for call in (
        lambda: tokenizer.encode("a"),
        lambda: tokenizer.beginning("a" * 2 * PIECE, 1),
        lambda: tokenizer.decode([1]),
    ):
        with pytest.raises(RuntimeError, match="the tokenizer failed: index out of bounds"):
            call()


def test_panic_of_a_task_is_an_ordinary_error():
    class Panic(BaseException):
        pass

    def work(task):
        raise Panic("index out of bounds")

    task = Task("panics", work)
    wait_for(lambda: task.is_done, 5)
    with pytest.raises(RuntimeError, match="Panic: index out of bounds"):
        task.result()


def test_panic_of_a_file_names_it(folder):
    content = json.loads((folder / "tokenizer.json").read_text())
    content["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="tokenizer.json is no tokenizer: .*charsmap"):
        Tokenizer(folder)


def is_same(ours: dict, theirs: dict, tmp_path) -> bool:
    folders = tmp_path / "ours", tmp_path / "theirs"
    for folder, content in zip(folders, (ours, theirs), strict=True):
        folder.mkdir(exist_ok=True)
        (folder / "tokenizer.json").write_text(json.dumps(content))
    return not TokenizerIdentity(folders[0]).differences(folders[1], lambda path: path.read_text())


def places(value, most=5):
    """Of everything in a JSON value: what holds it, and the key; of a vocabulary a few entries."""
    if not isinstance(value, dict | list):
        return
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    for key in keys[:most] if len(keys) > 50 else keys:
        yield value, key
        yield from places(value[key], most)


@pytest.mark.parametrize("make", [byte_level, metaspace, folding, stripping])
def test_what_is_left_out_differs_where_the_library_takes_it_otherwise(make, tmp_path):
    content = json.loads(make().to_str())
    outcomes = []
    for holder, key in places(content):
        if isinstance(holder, list) or key == "type":  # which the library may guess
            continue
        kept = dict(holder)
        del holder[key]
        text = json.dumps(content)
        holder.clear()
        holder.update(kept)
        try:
            loaded = tokenizers.Tokenizer.from_str(text)
        except Exception:
            continue  # it cannot be left out
        outcomes.append(json.loads(loaded.to_str()) == content)
        assert is_same(content, json.loads(text), tmp_path) == outcomes[-1], key
    print(f"{outcomes.count(True)} keys mean nothing where left out, {outcomes.count(False)} do")
    assert True in outcomes and False in outcomes


@pytest.mark.parametrize("make", [byte_level, metaspace, folding, stripping])
def test_every_value_of_a_tokenizer_counts(make, tmp_path):
    text = make().to_str()
    ours, content, num_changed = json.loads(text), json.loads(text), 0
    for holder, key in places(content):
        if holder is content and key in ("version", "truncation", "padding"):
            continue
        value = holder[key]
        if isinstance(value, dict | list):
            continue
        holder[key] = not value if isinstance(value, bool) else f"{value}x"
        assert not is_same(ours, content, tmp_path), key
        holder[key] = value
        num_changed += 1
    print(f"{num_changed} values")
    assert is_same(ours, content, tmp_path)


@pytest.mark.parametrize("eos", [None, "<|im_end|>", {"content": "<|im_end|>"}, {}, "no such"])
def test_eos_token(folder, eos):
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}))
    assert Tokenizer(folder).eos_token_id == (2 if "im_end" in str(eos) else None)


@pytest.mark.parametrize("unit", UNITS)
def test_beginning_of_a_long_text_has_its_first_tokens(tokenizer, unit):
    text = UNITS[unit] * (3 * PIECE // len(UNITS[unit]))
    ids = tokenizer.encode(text)
    num_cut = 0
    for num_tokens in (0, 100, len(ids) // 2, len(ids), 10**6):
        beginning = tokenizer.beginning(text, num_tokens)
        assert text.startswith(beginning)
        if len(beginning) < len(text):
            num_cut += 1
            assert len(ids) > num_tokens, "it was cut though it fits"
            assert tokenizer.encode(beginning)[:num_tokens] == ids[:num_tokens]
    print(f"{len(text)} characters, {len(ids)} tokens, cut for {num_cut} of 5 lengths")
    assert num_cut >= 2 or len(ids) < 1000, "it would be tokenized whole"


def test_short_text_is_not_looked_at(tokenizer):
    text = "a" * PIECE
    assert tokenizer.beginning(text, 0) is text


def test_beginning_takes_little_time_and_memory():
    tokenizer, text = Tokenizer(DEMO_MODEL), "漢字" * (1 << 19)

    def peak() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KB

    before, began = peak(), time.perf_counter()
    beginning = tokenizer.beginning(text, 4096)
    seconds, grown = time.perf_counter() - began, peak() - before
    print(f"{len(beginning)} of {len(text)} characters in {seconds:.3f} s, {grown} KB more")
    assert len(beginning) == PIECE
    assert seconds < 1 and grown < 100_000, "the whole text takes 4 s and 650 MB"
