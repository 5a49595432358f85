"""Whether weights can be what somebody trained: finite, and not all zeros. On the host, by bits."""

import numpy as np

ROWS_BYTES = 1 << 20  # looked at together: they fit the processor's cache
# By bytes of a value: as an unsigned integer, and all bits but the sign.
UNSIGNED = {2: (np.dtype(np.uint16), 0x7FFF), 4: (np.dtype(np.uint32), 0x7FFFFFFF)}
INFINITY = {"bfloat16": 0x7F80, "float16": 0x7C00, "float32": 0x7F800000}


def peak(values: np.ndarray) -> int:
    """The largest magnitude, as its bits: of floats without their sign these have the order of the
    numbers, then infinity, then NaN. Leaves the GIL to others."""
    unsigned, mask = UNSIGNED[values.dtype.itemsize]
    bits = values.view(unsigned)
    if bits.ndim == 0:
        bits = bits[None]
    row_bytes = max(bits[:1].nbytes, 1)
    step = max(ROWS_BYTES // row_bytes, 1)
    if row_bytes > ROWS_BYTES and bits.ndim > 1:
        return max((peak(row) for row in values), default=0)
    blocks = (bits[i : i + step] for i in range(0, len(bits), step))
    return max((int((block & mask).max()) for block in blocks if block.size), default=0)


class ValueCheck:
    """Looks at tensors as they are read; several threads may call it."""

    def __init__(self):
        self._peaks: dict[str, int] = {}

    def look(self, name: str, values: np.ndarray) -> None:
        """Raises ValueError where the values are not finite; names the tensor."""
        highest = peak(values)
        if highest >= INFINITY[values.dtype.name]:
            raise ValueError(f"{name} holds NaN or infinity")
        self._peaks[name] = max(highest, self._peaks.get(name, 0))

    @property
    def zeros(self) -> list[str]:
        """The tensors that are all zeros: allowed, but hardly meant (biases often are)."""
        return sorted(
            name for name, highest in self._peaks.items() if not highest and "bias" not in name
        )
