"""Text as it grows: no half characters, no half stop strings, and the end of it where a stop is."""

import functools
import json
import threading
import time

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, trainers

from jaxserve.detokenizer import CONTEXT, HALF, Detokenizer, cut_at_stop, hold_back
from jaxserve.request import FinishReason, Request
from jaxserve.sampling_params import SamplingParams
from jaxserve.stop_checker import StopChecker
from jaxserve.tokenizer import Tokenizer

CORPUS = ["the quick brown fox said hello, hello! 123", "naïve café 你好世界 🦊🦊 👩‍👩‍👧"] * 4


def byte_level() -> tokenizers.Tokenizer:
    """As GPT-2, Llama 3 and Qwen: a token is any piece of UTF-8, also half a character."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def byte_fallback() -> tokenizers.Tokenizer:
    """As Llama 2: words begin with ▁, unknown characters are bytes, a leading space is dropped."""
    words = ["▁", "▁the", "▁fox", "the", "fox", "e", "h", "t", "o", "x", "!", "é"]
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    vocabulary = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *bytes_, *words])}
    backend = tokenizers.Tokenizer(
        models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return backend


def save(backend: tokenizers.Tokenizer, folder, **config) -> Tokenizer:
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return Tokenizer(folder)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    return save(byte_level(), tmp_path_factory.mktemp("byte_level"), eos_token="</s>")


@pytest.fixture(scope="module")
def fallback(tmp_path_factory) -> Tokenizer:
    return save(byte_fallback(), tmp_path_factory.mktemp("byte_fallback"))


def expected_text(tokenizer: Tokenizer, prompt: list[int], ids: list[int]) -> str:
    """All ids decoded at once, after the prompt's last ones."""
    context = prompt[-CONTEXT:]
    if tokenizer.decode(context).endswith(HALF):
        context = []
    return tokenizer.decode(context + ids)[len(tokenizer.decode(context)) :]


def check_stream(tokenizer: Tokenizer, prompt: list[int], ids: list[int], sizes: list[int]) -> None:
    detokenizer = Detokenizer(tokenizer, prompt)
    final, shown, left = expected_text(tokenizer, prompt, ids), "", list(ids)
    for size in sizes + [1] * len(ids):
        chunk, left = left[:size], left[size:]
        before, shown = shown, detokenizer.push(chunk)
        assert shown.startswith(before), "what was shown stays"
        assert final.startswith(shown), f"{shown!r} is no beginning of {final!r}"
    assert detokenizer.finish() == final == detokenizer.text
    assert shown == final or final.endswith(HALF), "only a half was held back"


IDS = st.lists(st.integers(0, 329), max_size=24)
SIZES = st.lists(st.integers(0, 4), max_size=8)
TEXT = st.text(st.sampled_from("the fox é你好🦊👩‍👧!\n"), max_size=16)
many = functools.partial(settings, max_examples=300)


@many()
@given(prompt=IDS, ids=IDS, sizes=SIZES)
def test_any_ids_grow_into_the_text_of_all(tokenizer, prompt, ids, sizes):
    check_stream(tokenizer, prompt, ids, sizes)


@many()
@given(prompt=TEXT, text=TEXT, sizes=SIZES)
def test_text_arrives_whole_whatever_the_chunks(tokenizer, prompt, text, sizes):
    ids = tokenizer.encode(text)
    check_stream(tokenizer, tokenizer.encode(prompt), ids, sizes)
    assert HALF not in expected_text(tokenizer, tokenizer.encode(prompt), ids)


@many()
@given(prompt=TEXT, text=TEXT, sizes=SIZES)
def test_text_arrives_whole_with_byte_fallback(fallback, prompt, text, sizes):
    check_stream(fallback, fallback.encode(prompt), fallback.encode(text), sizes)


def test_character_is_shown_when_it_is_whole(tokenizer):
    ids = tokenizer.encode("𝄞")
    assert len(ids) == 4, "it is not in the corpus"
    detokenizer = Detokenizer(tokenizer, [])
    assert [detokenizer.push([i]) for i in ids] == ["", "", "", "𝄞"]


RUNS = {
    "no character": lambda of: [of("é")[1]],
    "beginnings": lambda of: [of("🦊")[0]],
    "beginnings that go on": lambda of: of("🦊")[:2],
    "three of four bytes": lambda of: of("🦊")[:3],
}


@pytest.mark.parametrize("name", RUNS)
def test_run_without_characters_is_decoded_in_pieces(tokenizer, fallback, name, monkeypatch):
    for one in (tokenizer, fallback):
        sizes = []

        def decode(ids, skip_special_tokens=True, decode=one.decode, sizes=sizes):
            sizes.append(len(ids))
            return decode(ids, skip_special_tokens=skip_special_tokens)

        monkeypatch.setattr(one, "decode", decode)
        ids = (RUNS[name](lambda text, one=one: bytes_of(one, text)) * 600)[:600]
        ids += bytes_of(one, "🦊")
        growing = Detokenizer(one, [])
        for token in ids:
            growing.push([token])
        print(f"{name}: {sum(sizes) / len(ids):.0f} ids decoded for each, {max(sizes)} at once")
        assert sum(sizes) < 60 * len(ids) and max(sizes) < 100
        if one is tokenizer:  # with byte fallback, a run is all text or none
            assert growing.finish() == one.decode(ids)
        monkeypatch.undo()


def bytes_of(tokenizer, text: str) -> list[int]:
    """A token for each byte."""
    vocabulary = tokenizer._backend.get_vocab()
    if "<0x00>" in vocabulary:
        return [vocabulary[f"<0x{byte:02X}>"] for byte in text.encode()]
    return [vocabulary[BYTES[byte]] for byte in text.encode()]


def byte_letters() -> list[str]:
    """What byte-level tokenizers write for each byte."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in kept else chr(next(others)) for byte in range(256)]


BYTES = byte_letters()


@pytest.mark.timeout(20)
def test_hold_back_looks_where_a_stop_may_begin():
    stops = ["x" * 255 + chr(ord("A") + i) for i in range(32)]
    text = "the quick brown fo" * 400
    began = time.process_time()
    for end in range(1000, 2000):
        assert hold_back(text[:end], stops) == text[:end]
    seconds = time.process_time() - began
    print(f"{seconds:.3f} s for 1000 events")
    assert seconds < 0.5


def test_half_character_at_the_end_is_shown_by_finish_alone(tokenizer):
    detokenizer = Detokenizer(tokenizer, [])
    assert detokenizer.push(tokenizer.encode("a𝄞")[:-1]) == ""
    assert detokenizer.finish() == "a" + HALF


def test_broken_character_is_shown_when_the_next_one_comes(tokenizer):
    half, letter = tokenizer.encode("𝄞")[:2], tokenizer.encode("a")
    detokenizer = Detokenizer(tokenizer, [])
    assert [detokenizer.push(ids) for ids in (half, letter)] == ["", HALF + "a"]


def test_prompt_is_context_but_not_output(tokenizer, fallback):
    assert Detokenizer(tokenizer, tokenizer.encode("the fox")).push(tokenizer.encode("é")) == "é"
    fox = fallback.encode(" fox")
    assert Detokenizer(fallback, fallback.encode("the")).push(fox) == " fox"
    assert Detokenizer(fallback, []).push(fox) == "fox", "the decoder drops a first space"


def test_prompt_that_ends_in_half_a_character_does_not_lend_it(tokenizer):
    start, end = tokenizer.encode("𝄞")[:2], tokenizer.encode("𝄞")[2:]
    detokenizer = Detokenizer(tokenizer, start)
    detokenizer.push(end)
    assert "𝄞" not in detokenizer.finish()


def test_special_tokens_are_skipped_or_shown(tokenizer):
    ids = [*tokenizer.encode("a"), tokenizer.eos_token_id]
    assert Detokenizer(tokenizer, []).push(ids) == "a"
    assert Detokenizer(tokenizer, [], skip_special_tokens=False).push(ids) == "a</s>"


def test_nothing_is_no_text(tokenizer):
    detokenizer = Detokenizer(tokenizer, [5, 6])
    assert detokenizer.push([]) == "" and detokenizer.finish() == ""


STOPS = st.lists(st.text("ab", min_size=1, max_size=4), max_size=3)


@many()
@given(st.text("abc", max_size=8), STOPS)
def test_hold_back_hides_what_can_become_a_stop_string_and_no_more(text, stops):
    shown = hold_back(text, stops)
    assert text.startswith(shown)
    hidden = text[len(shown) :]
    assert not hidden or any(stop.startswith(hidden) for stop in stops)
    for length in range(1, len(text) + 1):
        tail = text[-length:]
        if any(stop.startswith(tail) and stop != tail for stop in stops):
            assert len(hidden) >= length, f"{tail!r} can become one of {stops}"


@many()
@given(st.text("abc", max_size=12), STOPS)
def test_nothing_of_a_stop_string_is_shown_before_it_is_found(text, stops):
    for end in range(len(text) + 1):
        found = [(text.find(stop), stop) for stop in stops if stop in text[:end]]
        if found:
            cut = cut_at_stop(text[:end], min(found)[1], keep=False)
            assert all(cut.startswith(hold_back(text[:i], stops)) for i in range(end))
            return


@pytest.mark.parametrize(
    "text,stop,kept,trimmed",
    [
        ("one END two END", "END", "one END", "one "),
        ("END", "END", "END", ""),
        ("no stop", "END", "no stop", "no stop"),
        ("aaab", "aab", "aaab", "a"),
    ],
)
def test_text_is_cut_at_the_first_stop(text, stop, kept, trimmed):
    assert cut_at_stop(text, stop, keep=True) == kept
    assert cut_at_stop(text, stop, keep=False) == trimmed


EOS = frozenset({1})


def reasons(tokenizer, text, *, max_new_tokens=100, prompt="", ids=None, **sampling) -> list:
    """The checker's answers to each token of `text`, up to the first that ends it."""
    request = Request(
        rid="r",
        prompt_ids=tokenizer.encode(prompt) if tokenizer else [],
        sampling=SamplingParams.parse(sampling),
        max_new_tokens=max_new_tokens,
        seed=0,
    )
    checker, answers = StopChecker(request, EOS, tokenizer), []
    for token in tokenizer.encode(text) if ids is None else ids:
        answers.append(checker.push(token))
        if answers[-1] is not None:
            break
    return answers


def test_length_ends_the_output():
    assert reasons(None, "", ids=[5] * 4, max_new_tokens=3) == [
        None,
        None,
        FinishReason("length", length=3),
    ]


def test_eos_and_stop_token_ids_end_the_output():
    assert reasons(None, "", ids=[5, 1]) == [None, FinishReason("stop", matched=1)]
    assert reasons(None, "", ids=[5, 7], stop_token_ids=[7, 8])[-1].matched == 7
    assert reasons(None, "", ids=[5, 1], stop_token_ids=[7, 8])[-1].matched == 1


def test_ignore_eos_ignores_stop_token_ids_too():
    ids = [1, 7, 5]
    assert reasons(None, "", ids=ids, stop_token_ids=[7], ignore_eos=True) == [None] * 3


def test_ignore_eos_does_not_ignore_stop_strings(tokenizer):
    answers = reasons(tokenizer, "a STOP b", stop="STOP", ignore_eos=True)
    assert answers[-1] == FinishReason("stop", matched="STOP")


def test_stop_string_may_span_tokens_and_begin_inside_one(tokenizer):
    assert len(tokenizer.encode("zqzq")) == 4, "no merges"
    answers = reasons(tokenizer, "hello zqzq", stop=["lo zqz"])
    assert answers[-1] == FinishReason("stop", matched="lo zqz")
    assert len(answers) == len(tokenizer.encode("hello zqz"))


def test_stop_string_of_several_bytes_is_found_with_its_last(tokenizer):
    assert len(reasons(tokenizer, "a𝄞b", stop="𝄞")) == len(tokenizer.encode("a𝄞"))


def test_stop_string_that_begins_first_wins(tokenizer):
    ids = [*tokenizer.encode("z"), *tokenizer.encode(" hello")]
    assert len(tokenizer.encode(" hello")) == 1, "all of them come with one token"
    answers = reasons(tokenizer, "", ids=ids, stop=["o", "lo", "hello", "ll"])
    assert answers == [None, FinishReason("stop", matched="hello")]


def test_stop_string_in_the_prompt_does_not_count(tokenizer):
    assert reasons(tokenizer, "OP a", prompt="ST STOP ST", stop="STOP")[-1] is None


def test_prompt_is_context_of_stop_strings(fallback):
    """Without it the decoder would drop the space."""
    answers = reasons(fallback, " fox", prompt="the", stop=" fo")
    assert answers[-1] == FinishReason("stop", matched=" fo")


def test_stop_string_goes_before_stop_token_and_length(tokenizer):
    (token,) = tokenizer.encode("!")
    both = {"stop": "!", "stop_token_ids": [token], "ids": [token], "max_new_tokens": 1}
    assert reasons(tokenizer, "", **both) == [FinishReason("stop", matched="!")]
    del both["stop"]
    assert reasons(tokenizer, "", **both) == [FinishReason("stop", matched=token)]
    del both["stop_token_ids"]
    assert reasons(tokenizer, "", **both) == [FinishReason("length", length=1)]


def test_special_token_is_no_text_for_a_stop_string_unless_it_is_shown(tokenizer):
    ids = [*tokenizer.encode("a"), 0]
    assert reasons(tokenizer, "", ids=ids, stop="<s>")[-1] is None
    shown = reasons(tokenizer, "", ids=ids, stop="<s>", skip_special_tokens=False)
    assert shown[-1] == FinishReason("stop", matched="<s>")


@many()
@given(st.text("ab!", max_size=12), st.lists(st.text("ab!", min_size=1, max_size=3), min_size=1))
def test_stop_string_is_found_as_soon_as_it_is_there(tokenizer, text, stops):
    stops = stops[:4]
    answers = reasons(tokenizer, text, stop=stops) or [None]
    seen = tokenizer.decode(tokenizer.encode(text)[: len(answers)])
    found = [(seen.find(stop), stop) for stop in stops if stop in seen]
    assert answers[-1] == (FinishReason("stop", matched=min(found)[1]) if found else None)
    assert not any(answers[:-1])


def test_tokenizer_reads_back_what_it_encodes(tokenizer):
    text = "the quick café 你好 𝄞"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_ids_beyond_the_vocabulary_have_no_text(tokenizer):
    size = tokenizer.vocab_size
    assert tokenizer.decode([*tokenizer.encode("a"), size, size + 1000]) == "a"


@pytest.mark.parametrize(
    "config,eos",
    [
        ({"eos_token": "</s>"}, 1),
        ({"eos_token": {"content": "</s>", "special": True}}, 1),
        ({"eos_token": "<none>"}, None),
        ({"eos_token": None}, None),
        ({}, None),
    ],
)
def test_eos_token_in_every_spelling(tmp_path, config, eos):
    assert save(byte_level(), tmp_path, **config).eos_token_id == eos


def test_tokenizer_config_may_be_missing(tmp_path):
    save(byte_level(), tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    assert Tokenizer(tmp_path).eos_token_id is None


def test_truncation_and_padding_of_the_file_are_switched_off(tmp_path):
    backend = byte_level()
    backend.enable_truncation(2)
    backend.enable_padding(length=50)
    assert len(save(backend, tmp_path).encode("zqzq")) == 4


def test_threads_may_share_a_tokenizer(tokenizer):
    text, wrong = CORPUS[1], []

    def work():
        for _ in range(50):
            if tokenizer.decode(tokenizer.encode(text)) != text:
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_folder_without_a_tokenizer_says_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match="--tokenizer-path.*--skip-tokenizer-init"):
        Tokenizer(tmp_path)
