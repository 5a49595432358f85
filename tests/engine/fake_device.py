"""A device that keeps books of what it has computed.

It executes real step plans as `programs.py` does. In place of keys and values it keeps which
tokens each slot of the cache was written for, by which weights, and its tokens follow from what it
reads: output that differs from a solo run, or a slot that holds anything else, is a bug.
"""

import dataclasses

import numpy as np

from jaxserve.live_request import LiveRequest
from jaxserve.step_plan import (
    KEEP,
    LAST_TOKEN,
    NOT_FINITE,
    OUT_OF_LENGTH,
    PATCH_HEADER,
    RUNNING,
    SAMPLING_START,
    STOPPED,
    StepPlan,
    ints,
)
from jaxserve.step_result import StepResult

EOS = 2
NAMESPACES = ("", "other")


def extend_chain(chain: list[int], token: int, namespace: str, version: int) -> None:
    """One more token, as all that came before it and the weights make it out: keys and values."""
    before = chain[-1] if chain else NAMESPACES.index(namespace)
    chain.append(hash((before, token, version)))


def chain_of(tokens: list[int], namespace: str, version: int) -> list[int]:
    chain: list[int] = []
    for token in tokens:
        extend_chain(chain, token, namespace, version)
    return chain


def next_token(seen: int) -> int | None:
    """What follows a token; None where the scores are not finite."""
    if seen % 53 == 0:
        return None
    return EOS if seen % 11 == 0 else 100 + seen % 3


def score_of(seen: int, token: int) -> float:
    """The "logprob" of a token after what has been seen: a number that float32 holds."""
    return float(hash((seen, token)) % 10_000)


def expert_of(seen: int) -> int:
    """The one expert that a token takes, in the one layer that has any."""
    return seen % 2**15


def float_bits(value: float) -> int:
    return int(np.float32(value).view(np.int32))


@dataclasses.dataclass
class Row:
    """What the device knows of a row; `chain` is what it must find in the row's pages."""

    chain: list[int] = dataclasses.field(default_factory=list)
    namespace: str = ""
    last_token: int = -1
    finish: int = STOPPED
    limit: int = 0
    stop_ids: tuple[int, ...] = ()
    pages: list[int] = dataclasses.field(default_factory=list)


class Device:
    """Executes step plans, each at once: whatever the host learns later, the order is this one."""

    def __init__(self, page_size: int, max_rows: int, pages_per_row: int, num_steps: int):
        self.page_size, self.max_rows, self.num_steps = page_size, max_rows, num_steps
        self.width = PATCH_HEADER + pages_per_row
        self.version = 0  # of the weights
        self.reset()

    def reset(self) -> None:
        self.slots: dict[tuple[int, int], tuple[int, int]] = {}  # page, slot: position, what
        self.rows = [Row() for _ in range(self.max_rows + 1)]
        self.batch = [self.max_rows] * self.max_rows
        self.out = [[(-1, -1, 0)] * (self.max_rows + 1) for _ in range(self.num_steps)]
        self.hidden: dict[int, int] = {}  # by index of a packed token: what has been seen there

    def dispatch(self, plan: StepPlan, running: list[LiveRequest]) -> StepResult:
        if plan.patch:
            self.patch(ints(plan.patch), {live.row: live for live in running})
        self.copy(ints(plan.copies).reshape(-1, 3).tolist())
        self.experts = np.full((plan.num_steps, plan.num_tokens, 1, 1), -1, np.int16)
        if plan.kind == "extend":
            self.extend(plan)
        else:
            rows = self.batch[: plan.num_rows]
            for step in range(plan.num_steps):
                running = [row for row in rows if self.rows[row].finish == RUNNING]
                self.compute({row: [LAST_TOKEN] for row in running})
                for row in running:
                    self.experts[step, rows.index(row)] = expert_of(self.rows[row].chain[-1])
                self.sample(running, step)
        scores = [
            [float_bits(score_of(self.hidden[index], target))]
            for index, target, _ in ints(plan.scores).reshape(-1, 3).tolist()
        ]
        return StepResult(
            [list(rows) for rows in self.out[: plan.num_steps]],
            scores=np.array(scores, np.int32) if scores else None,
            expert_ids=self.experts if plan.wants_experts else None,
        )

    def patch(self, packed: np.ndarray, running: dict[int, LiveRequest]) -> None:
        lines = packed[: -self.max_rows].reshape(-1, self.width)
        self.batch = packed[-self.max_rows :].tolist()
        for line in lines.tolist():
            index, seq_len, last_token, finish, limit = line[:5]
            row = self.rows[index]
            if index == self.max_rows:
                assert finish == STOPPED and not any(line[PATCH_HEADER:])
                continue
            if seq_len != KEEP:  # a request begins here, behind what it found in the cache
                live = running[index]
                assert seq_len < len(live.tokens), "one token at least is left to compute"
                row.namespace = live.request.namespace
                row.chain = chain_of(live.tokens[:seq_len], row.namespace, self.version)
            row.last_token = row.last_token if last_token == KEEP else last_token
            row.finish = row.finish if finish == KEEP else finish
            row.limit, row.stop_ids = limit, tuple(line[5:SAMPLING_START])
            row.pages = line[PATCH_HEADER:]

    def copy(self, copies: list[list[int]]) -> None:
        """All are read before any is written."""
        moved = {
            (target, i): self.slots.get((source, i)) if i < kept else None
            for source, target, kept in copies
            for i in range(self.page_size)
        }
        for slot, content in moved.items():
            self.slots.pop(slot, None)
            if content is not None:
                self.slots[slot] = content

    def extend(self, plan: StepPlan) -> None:
        rows, lengths, samples, tokens = np.split(
            ints(plan.forward), np.arange(1, 4) * plan.num_rows
        )
        work, sampling, start, starts = {}, [], 0, {}
        for row, length, samples_one in np.stack([rows, lengths, samples], axis=1).tolist():
            assert row < self.max_rows or length == 0, "padding computes nothing"
            if row < self.max_rows and self.rows[row].finish == RUNNING:
                assert row not in work
                work[row] = tokens[start : start + length].tolist()
                starts[row] = start
                sampling += [row] * samples_one
            start += length
        self.compute(work)
        self.hidden = {
            starts[row] + i: seen
            for row, tokens in work.items()
            for i, seen in enumerate(self.rows[row].chain[-len(tokens) :])
        }
        for place, seen in self.hidden.items():
            self.experts[0, place] = expert_of(seen)
        self.sample(sampling, 0)

    def compute(self, work: dict[int, list[int]]) -> None:
        """Writes the tokens of all rows, then reads all that each row sees."""
        for index, tokens in work.items():
            row = self.rows[index]
            for token in tokens:
                token = row.last_token if token == LAST_TOKEN else token
                position = len(row.chain)
                extend_chain(row.chain, token, row.namespace, self.version)
                page = row.pages[position // self.page_size]
                assert page > 0, "a page that the device was not told of"
                self.slots[page, position % self.page_size] = position, row.chain[-1]
        for index in work:
            row = self.rows[index]
            for position, expected in enumerate(row.chain):
                page = row.pages[position // self.page_size]
                found = self.slots.get((page, position % self.page_size))
                assert found == (position, expected), "attention reads what is not its own"

    def sample(self, rows: list[int], step: int) -> None:
        for index in rows:
            row = self.rows[index]
            token = next_token(row.chain[-1])
            if token is None:
                row.finish = NOT_FINITE
            elif token in row.stop_ids:
                row.finish = STOPPED
            elif len(row.chain) >= row.limit:
                row.finish = OUT_OF_LENGTH
            row.last_token = -5 if token is None else token
            bits = float_bits(score_of(row.chain[-1], row.last_token))
            self.out[step][index] = row.last_token, row.finish, bits
