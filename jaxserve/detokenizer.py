"""Token ids to text, a few at a time, so that a stream shows no half character."""

from collections.abc import Sequence

from jaxserve.tokenizer import Tokenizer

CONTEXT = 5  # prompt tokens before the output: some decoders drop a first token's leading space
LONGEST_CHARACTER = 8  # tokens; a longer run without text (special tokens, padding) has none
BYTES = 4  # of a character, at most
LONGEST_RUN = 64  # tokens that are decoded again and again
HALF = "\ufffd"  # what an incomplete character decodes to


class Detokenizer:
    """The text of one request's output.

    `text` grows by whole characters; `finish` adds what was held back. Where the ids are valid
    text, the end result equals decoding all of them at once.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt_ids: Sequence[int], *, skip_special_tokens: bool = True
    ):
        self._tokenizer, self._skip = tokenizer, skip_special_tokens
        context = list(prompt_ids[-CONTEXT:])
        if self._decode(context).endswith(HALF):
            context = []  # the output would complete a character that is not its own
        self._ids = context
        self._done = len(context)  # ids whose text is in `text`
        self._start = 0  # ids from here to `_done` give the context of the next ones
        self.text = ""

    def push(self, ids: Sequence[int]) -> str:
        """Adds ids; returns the text so far, without an incomplete character at its end."""
        self._ids.extend(ids)
        new = self._undecoded()
        is_long = len(self._ids) - self._done > LONGEST_CHARACTER
        if not new.endswith(HALF) and (new or is_long):
            self._take(new)
        elif is_long:
            self._take_most()
        return self.text

    def finish(self) -> str:
        """The whole text, an incomplete character at its end shown as U+FFFD."""
        self._take(self._undecoded())
        return self.text

    def _undecoded(self) -> str:
        before = self._decode(self._ids[self._start : self._done])
        return self._decode(self._ids[self._start :])[len(before) :]

    def _take(self, new: str) -> None:
        self.text += new
        self._start, self._done = self._done, len(self._ids)

    def _take_most(self) -> None:
        """Of a run of ids that end no character: what the next ones cannot change, else each push
        would decode the run again."""
        ends = [len(self._ids) - i for i in range(LONGEST_CHARACTER)]
        texts = [self._decode(self._ids[self._start : end]) for end in ends]
        pairs, whole = list(zip(ends, texts, strict=True)), texts[0]
        # Where a character ends here, the ids after it are the beginning of another. Where none
        # does, they are no text, and no next id makes them one.
        whole_ends = [pair for pair in pairs[1:BYTES] if not pair[1].endswith(HALF)]
        stable = [pair for pair in pairs[BYTES - 1 :] if whole.startswith(pair[1])]
        if not whole_ends + stable and len(self._ids) - self._done > LONGEST_RUN:
            stable = [pairs[BYTES - 1]]  # in this vocabulary a token may end in half a character
        for end, text in (whole_ends + stable)[:1]:
            self.text += text[len(self._decode(self._ids[self._start : self._done])) :]
            self._start, self._done = self._done, end

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self._skip)


def cut_at_stop(text: str, stop: str, *, keep: bool) -> str:
    """`text` up to the first `stop`, which stays where `keep` says so."""
    at = text.find(stop)
    return text if at < 0 else text[: at + len(stop)] if keep else text[:at]


def hold_back(text: str, stops: Sequence[str]) -> str:
    """`text` without a tail that may turn out to be the beginning of a stop string."""
    longest = max((len(stop) for stop in stops), default=0) - 1
    firsts = {stop[0] for stop in stops}
    for start in range(max(len(text) - longest, 0), len(text)):
        if text[start] in firsts:
            tail = text[start:]
            if any(stop.startswith(tail) for stop in stops):
                return text[:start]
    return text
