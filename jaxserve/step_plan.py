"""The scheduler's decision for one step, as one self-contained record.

Whoever holds the same weights and executes the same records gets the same tokens: several hosts,
a replay, the flight recorder. All integers, packed as the device wants them.
"""

import msgspec
import numpy as np

from jaxserve.request import Request

LAST_TOKEN = -1  # in place of a token id: the row's last sampled token, which the device knows
KEEP = -1  # in a row patch: leave the device's value
NUM_SAMPLING = 8  # int32s of sampling parameters per row
PATCH_HEADER = 3 + NUM_SAMPLING  # before the page table: row, seq_len, last_token, sampling


class StepPlan(msgspec.Struct, frozen=True):
    """What the runner executes: change rows, run the model on packed tokens, sample some rows."""

    step: int
    num_tokens: int  # both padded to a bucket
    num_rows: int
    sampler: str  # "greedy" or "plain"
    forward: bytes  # i32[rows + query lengths + tokens]
    sample_rows: bytes  # i32[num_rows], the trash row for rows that do not sample
    patch: bytes  # i32[P, PATCH_HEADER + M], empty when no row changes

    def forward_array(self) -> np.ndarray:
        return np.frombuffer(self.forward, np.int32).copy()

    def sample_rows_array(self) -> np.ndarray:
        return np.frombuffer(self.sample_rows, np.int32).copy()

    def patch_array(self, pages_per_row: int) -> np.ndarray | None:
        if not self.patch:
            return None
        return np.frombuffer(self.patch, np.int32).reshape(-1, PATCH_HEADER + pages_per_row).copy()


def pack_sampling(request: Request) -> np.ndarray:
    """i32[NUM_SAMPLING]: temperature and top_p as float bits, top_k, the seed's two halves."""
    sampling, seed = request.sampling, request.seed % 2**64
    packed = np.zeros(NUM_SAMPLING, np.int32)
    floats = packed.view(np.float32)
    floats[0] = 0.0 if sampling.is_greedy else sampling.temperature
    floats[1] = sampling.top_p
    packed[2] = sampling.top_k
    packed[3:5] = np.array([seed & 0xFFFFFFFF, seed >> 32], np.uint32).view(np.int32)
    return packed


def pack_patch_row(row: int, seq_len: int, sampling: np.ndarray, pages: list[int], width: int):
    """One line of `StepPlan.patch`: a row taken over by a request that owns `pages`."""
    line = np.zeros(width, np.int32)
    line[:3] = row, seq_len, KEEP
    line[3:PATCH_HEADER] = sampling
    line[PATCH_HEADER : PATCH_HEADER + len(pages)] = pages
    return line
