"""What an engine executed, as a file: `--record-plans` writes it, `jaxserve replay` reads it.

A line that names the format, then records, each a length and that many bytes of msgpack: a header,
then the step plans, what was read of each, and resets, in the order in which the runner had them.
"""

import os
import pathlib
import struct
from collections.abc import Iterator, Sequence
from typing import BinaryIO

import msgspec

from jaxserve.buckets import Buckets
from jaxserve.config import EngineConfig
from jaxserve.step_plan import RUNNING, StepPlan
from jaxserve.step_result import Draws

MAGIC = b"jaxserve plan log\n"
VERSION = 1  # of the records and of what a plan packs: raise it when an old log would mislead
LENGTH = struct.Struct("<I")


class Header(msgspec.Struct, frozen=True, tag="header"):
    """What a replay must have the same."""

    version: int
    jaxserve: str  # versions
    jax: str
    device: str
    config: EngineConfig
    model_folder: str
    model_digest: str
    shape: dict[str, int | str]  # the fields of `StateShape`
    buckets: Buckets


class PlannedStep(msgspec.Struct, frozen=True, tag="plan"):
    plan: StepPlan


class Drawn(msgspec.Struct, frozen=True, tag="drawn"):
    """What the scheduler took in of a step: of its rows, not of those that had left meanwhile."""

    step: int
    rows: list[int]
    draws: list[list[list[int]]]  # by decode step and row: token, what became of the row

    @classmethod
    def of(cls, step: int, rows: list[int], result: Sequence[Draws]) -> "Drawn":
        """Of `StepResult.drawn`."""
        return cls(step, rows, [[list(drawn[row][:2]) for row in rows] for drawn in result])

    def tokens(self) -> Iterator[tuple[int, int, list[int]]]:
        """Decode step, row, and what was drawn. What a dispatch holds of a row beyond its end was
        not drawn."""
        ended: set[int] = set()
        for number, drawn in enumerate(self.draws):
            for row, (token, finish) in zip(self.rows, drawn, strict=True):
                if row not in ended:
                    yield number, row, [token, finish]
                if finish != RUNNING:
                    ended.add(row)


class Reset(msgspec.Struct, frozen=True, tag="reset"):
    """A step failed; the state was made anew, and what was in flight is lost."""


class WeightsChanged(msgspec.Struct, frozen=True, tag="weights"):
    """Other weights serve from the next step on."""

    folder: str | None  # None: they were sent, and no folder has them


Record = PlannedStep | Drawn | Reset | WeightsChanged

_encode = msgspec.msgpack.Encoder().encode
_decode_record = msgspec.msgpack.Decoder(Record).decode
_decode_header = msgspec.msgpack.Decoder(Header).decode


class _AnyHeader(msgspec.Struct, tag="header"):
    """Of whatever version."""

    version: int
    jaxserve: str


def encode(record: Header | Record) -> bytes:
    packed = _encode(record)
    return LENGTH.pack(len(packed)) + packed


def is_plan_log(path: pathlib.Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


class PlanLog:
    """A log to read; its header is read at once."""

    def __init__(self, file: BinaryIO):
        """Raises ValueError where it is no log that this version reads."""
        self._file, self.name = file, file.name
        self._size = os.fstat(file.fileno()).st_size
        self.truncated_at: int | None = None  # the byte where a last, unfinished record begins
        self.header = self._read_header()

    def __iter__(self) -> Iterator[Record]:
        """Raises ValueError at a record that is damaged; ends before one that is unfinished."""
        while True:
            begin = self._file.tell()
            packed = self._read_frame()
            if packed is None:
                self.truncated_at = begin if begin < self._size else None
                return
            try:
                yield _decode_record(packed)
            except msgspec.MsgspecError as error:
                raise ValueError(f"{self.name} is damaged at byte {begin}: {error}") from error

    def _read_header(self) -> Header:
        if self._file.read(len(MAGIC)) != MAGIC:
            raise ValueError(f"{self.name} is no plan log")
        packed = self._read_frame()
        if packed is None:
            raise ValueError(f"{self.name} ends before its header")
        try:
            found = msgspec.msgpack.decode(packed, type=_AnyHeader)
            if found.version != VERSION:
                raise ValueError(
                    f"{self.name} has version {found.version}, written by jaxserve "
                    f"{found.jaxserve}; this one reads version {VERSION}"
                )
            return _decode_header(packed)
        except msgspec.MsgspecError as error:
            raise ValueError(f"{self.name} has no sound header: {error}") from error

    def _read_frame(self) -> bytes | None:
        """None where the file ends before the record does."""
        prefix = self._file.read(LENGTH.size)
        if len(prefix) < LENGTH.size:
            return None
        (length,) = LENGTH.unpack(prefix)
        if length > self._size - self._file.tell():
            return None
        return self._file.read(length)
