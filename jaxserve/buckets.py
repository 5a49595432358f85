"""The padded sizes that have a compiled program. A pure function of the configuration, so that the
compilation cache hits at the next start."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Buckets:
    """Sizes in increasing order. A decode step is padded in rows, any other in tokens and rows."""

    decode_rows: tuple[int, ...]
    extend_rows: tuple[int, ...]
    extend_tokens: tuple[int, ...]
    patch_rows: tuple[int, ...]

    @classmethod
    def make(cls, max_rows: int, max_prefill_tokens: int, growth: int) -> "Buckets":
        """Sizes grow by the factor `growth` up to `max_rows` rows, and as many tokens as one
        prefill chunk and a decode token of every row. Where they grow fast, few programs are
        wanted above all, and extend steps are always padded to all rows."""
        few = min(4, max_rows) if growth <= 2 else max_rows
        return cls(
            decode_rows=_geometric(1, max_rows, growth),
            extend_rows=tuple(sorted({few, max_rows})),
            extend_tokens=_geometric(16, max_prefill_tokens + max_rows, growth),
            patch_rows=tuple(sorted({min(4, max_rows), max_rows})),
        )

    def forward_shapes(self) -> list[tuple[int, int]]:
        """Every (tokens, rows) that a step may be padded to."""
        decode = [(rows, rows) for rows in self.decode_rows]
        extend = [
            (tokens, rows)
            for tokens in self.extend_tokens
            for rows in self.extend_rows
            if tokens != rows  # would be the decode program
        ]
        return decode + extend

    def sample_rows(self) -> list[int]:
        return sorted({*self.decode_rows, *self.extend_rows})

    def fit(self, num_tokens: int, num_rows: int) -> tuple[int, int]:
        """The smallest shape for a step of that many tokens and rows."""
        if num_tokens == num_rows:
            rows = next(b for b in self.decode_rows if b >= num_rows)
            return rows, rows
        rows = next(b for b in self.extend_rows if b >= num_rows)
        tokens = next(t for t in self.extend_tokens if t >= num_tokens and t != rows)
        return tokens, rows


def _geometric(first: int, last: int, growth: int) -> tuple[int, ...]:
    sizes = []
    while first < last:
        sizes.append(first)
        first *= growth
    return (*sizes, last)
