"""The scheduler's decision for one step, as one self-contained record.

Whoever holds the same weights and executes the same records gets the same tokens: several hosts,
a replay, the flight recorder. All integers, packed as the device wants them.
"""

from typing import Literal

import msgspec
import numpy as np

from jaxserve.request import Request

LAST_TOKEN = -1  # in place of a token id: the row's last sampled token, which the device knows
KEEP = -1  # in a row patch: leave the device's value
NUM_STOP_IDS = 8  # per row that the device looks for; the host looks for all
NUM_SAMPLING = 8  # int32s of sampling parameters per row
SAMPLING_START = 5 + NUM_STOP_IDS  # after row, seq_len, last_token, finish, limit, stop ids
PATCH_HEADER = SAMPLING_START + NUM_SAMPLING  # the page table follows

# What the device notes of a row; above RUNNING the row takes part in no further step.
RUNNING, STOPPED, OUT_OF_LENGTH, NOT_FINITE = 0, 1, 2, 3

Sampler = Literal["greedy", "plain"]


class StepPlan(msgspec.Struct, frozen=True):
    """What the runner executes, in this order: change rows, copy pages, run the model, sample.

    "extend" runs the packed tokens of `forward`; "decode" gives every row of the patched batch its
    next `num_steps` tokens.
    """

    step: int
    kind: Literal["extend", "decode"]
    num_tokens: int  # both padded to a bucket
    num_rows: int
    num_steps: int
    sampler: Sampler
    forward: bytes = b""  # i32[rows, query lengths, does it sample, tokens]
    patch: bytes = b""  # i32[P * width + R]: lines of rows, then the batch; empty: no change
    copies: bytes = b""  # i32[C, 3]: from page, to page, tokens kept


def ints(packed: bytes) -> np.ndarray:
    """A fresh array: a CPU device may alias what it is given."""
    return np.frombuffer(packed, np.int32).copy()


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
