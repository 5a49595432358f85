"""The padded sizes that have a compiled program. A pure function of the configuration, so that the
compilation cache hits at the next start."""

import dataclasses
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Buckets:
    """Sizes in increasing order. A decode step is padded in rows, any other in tokens and rows."""

    decode_rows: tuple[int, ...]
    extend_rows: tuple[int, ...]
    extend_tokens: tuple[int, ...]
    patch_lines: tuple[int, ...]
    copies: tuple[int, ...]
    decode_steps: tuple[int, ...]  # in one dispatch
    scores: int  # prompt tokens that one program scores

    @classmethod
    def make(
        cls, max_rows: int, max_prefill_tokens: int, growth: int, num_decode_steps: int = 1
    ) -> "Buckets":
        """Sizes grow by the factor `growth` up to `max_rows` rows, and as many tokens as one
        prefill chunk and a decode token of every row. Where they grow fast, few programs are
        wanted above all, and extend steps are always padded to all rows."""
        few = tuple(sorted({min(4, max_rows), max_rows}))
        return cls(
            decode_rows=_geometric(1, max_rows, growth),
            extend_rows=few if growth <= 2 else (max_rows,),
            extend_tokens=_geometric(16, max_prefill_tokens + max_rows, growth),
            patch_lines=few,
            copies=few,
            # The scheduler plans no other number: where anybody has a prompt left, the step is an
            # extend step.
            decode_steps=(num_decode_steps,),
            # All their logits are there at once.
            scores=256 if growth <= 2 else 64,
        )

    def extend_shapes(self) -> list[tuple[int, int]]:
        """Every (tokens, rows) of an extend step. As many tokens as rows would mean decoding."""
        return [
            (tokens, rows)
            for tokens in self.extend_tokens
            for rows in self.extend_rows
            if tokens != rows
        ]

    def fit(self, num_tokens: int, num_rows: int) -> tuple[int, int]:
        """The smallest shape for an extend step of that many tokens and rows."""
        rows = smallest(self.extend_rows, num_rows)
        return next(t for t in self.extend_tokens if t >= num_tokens and t != rows), rows


def smallest(sizes: Sequence[int], count: int) -> int:
    return next(size for size in sizes if size >= count)


def _geometric(first: int, last: int, growth: int) -> tuple[int, ...]:
    sizes = []
    while first < last:
        sizes.append(first)
        first *= growth
    return (*sizes, last)
