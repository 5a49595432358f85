"""The scheduler's decision for one step, as one self-contained record.

Whoever holds the same weights and executes the same records gets the same tokens: several hosts,
a replay, the flight recorder. All integers, packed as the device wants them.
"""

from collections.abc import Sequence
from typing import Literal

import msgspec
import numpy as np

from jaxserve.request import MOST_LOGPROB_IDS, MOST_TOP_LOGPROBS, Request
from jaxserve.sampling_params import GREEDY_BELOW, MOST_BIASES, MOST_STOP_TOKEN_IDS

LAST_TOKEN = -1  # in place of a token id: the row's last sampled token, which the device knows
KEEP = -1  # in a row patch: leave the device's value
NUM_STOP_IDS = 8  # per row that the device looks for; the host looks for all
NUM_SAMPLING = 11  # int32s of sampling parameters per row
SAMPLING_START = 5 + NUM_STOP_IDS  # after row, seq_len, last_token, finish, limit, stop ids
PATCH_HEADER = SAMPLING_START + NUM_SAMPLING  # the page table follows

# A line of extras: the row, biased ids, their biases as float bits, the ids that may not come
# before `min_new_tokens`, and those whose logprobs are asked for.
NUM_BANNED = MOST_STOP_TOKEN_IDS + NUM_STOP_IDS
EXTRAS_PARTS = (MOST_BIASES, MOST_BIASES, NUM_BANNED, MOST_LOGPROB_IDS)
NUM_EXTRAS = sum(EXTRAS_PARTS)
NO_TOKEN = 2**31 - 1  # beyond every vocabulary: what is scattered there is dropped

# What clients write for "always" and "never" may be beyond float32. Scores within these stay finite
# when they are divided by any temperature that is not greedy.
MOST_SCORE, LEAST_REPETITION = 1e30, 1e-6

# A line of tops, which tells more of one token: the best ids, their logprobs as float bits, and
# the logprobs of the ids that were asked for.
TOPS_PARTS = (MOST_TOP_LOGPROBS, MOST_TOP_LOGPROBS, MOST_LOGPROB_IDS)
NUM_TOPS = sum(TOPS_PARTS)

# What the device notes of a row; above RUNNING the row takes part in no further step.
RUNNING, STOPPED, OUT_OF_LENGTH, NOT_FINITE = 0, 1, 2, 3

# What the sampler of a step can do: only the best token; temperatures, and the logprobs of drawn
# tokens; everything. A row draws the same token from each that can serve it. "pool" draws none: it
# makes vectors, and an engine has either this one or the others.
Sampler = Literal["greedy", "plain", "full", "pool"]
SAMPLERS: tuple[Sampler, ...] = ("greedy", "plain", "full")


class StepPlan(msgspec.Struct, frozen=True):
    """What the runner executes, in this order: change rows, copy pages, run the model, sample,
    score the prompt.

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
    extras: bytes = b""  # i32[rows, 1 + NUM_EXTRAS], for rows that begin and have any
    counts: bytes = b""  # i32, for rows that begin and count: row, how many tokens, these tokens
    copies: bytes = b""  # i32[C, 3]: from page, to page, tokens kept
    scores: bytes = b""  # i32[S, 3]: index of a token in `forward`, the token after it, its row
    wants_tops: bool = False  # tell more of drawn and scored tokens
    wants_experts: bool = False  # tell whose choice the tokens were

    @property
    def num_forwarded(self) -> int:
        """Tokens that the model runs over in all steps of the dispatch, padding too."""
        return self.num_steps * self.num_tokens


def ints(packed: bytes) -> np.ndarray:
    """A fresh array: a CPU device may alias what it is given."""
    return np.frombuffer(packed, np.int32).copy()


def pack_sampling(request: Request) -> np.ndarray:
    """i32[NUM_SAMPLING], as `sampling.Rows` names them; floats as their bits."""
    sampling, seed = request.sampling, request.seed % 2**64
    packed = np.zeros(NUM_SAMPLING, np.int32)
    floats = packed.view(np.float32)
    is_cold = sampling.temperature < GREEDY_BELOW
    floats[0] = 0.0 if is_cold else min(sampling.temperature, MOST_SCORE)
    floats[1] = sampling.top_p
    packed[2] = sampling.top_k
    packed[3:5] = np.array([seed & 0xFFFFFFFF, seed >> 32], np.uint32).view(np.int32)
    floats[5] = sampling.min_p
    floats[6] = sampling.frequency_penalty
    floats[7] = sampling.presence_penalty
    floats[8] = max(sampling.repetition_penalty, LEAST_REPETITION)
    packed[9] = len(request.prompt_ids) + min(sampling.min_new_tokens, request.max_new_tokens)
    packed[10] = has_extras(request)
    return packed


def has_extras(request: Request) -> bool:
    """Whether the request needs a line of extras."""
    sampling = request.sampling
    is_probed = request.logprobs is not None and bool(request.logprobs.token_ids)
    return bool(sampling.logit_bias) or sampling.min_new_tokens > 0 or is_probed


def pack_extras(row: int, request: Request, banned: Sequence[int]) -> np.ndarray:
    """i32[1 + NUM_EXTRAS]. `banned` may not come before `min_new_tokens`."""
    packed = np.full(1 + NUM_EXTRAS, NO_TOKEN, np.int32)
    packed[0] = row
    ids, biases, ends, probes = np.split(packed[1:], np.cumsum(EXTRAS_PARTS)[:-1])
    bias = request.sampling.logit_bias
    ids[: len(bias)] = list(bias)
    biases.view(np.float32)[:] = 0
    biases.view(np.float32)[: len(bias)] = np.clip(list(bias.values()), -MOST_SCORE, MOST_SCORE)
    ends[: len(banned)] = banned
    if request.logprobs is not None:
        probes[: len(request.logprobs.token_ids)] = request.logprobs.token_ids
    return packed


def sampler_of(request: Request) -> Sampler:
    """The least that can serve the request."""
    if request.is_pooled:
        return "pool"
    sampling, logprobs = request.sampling, request.logprobs
    wants_tops = logprobs is not None and logprobs.wants_tops
    if wants_tops or has_extras(request) or sampling.counts_tokens:
        return "full"
    if sampling.is_greedy:
        return "greedy" if logprobs is None else "plain"
    return "full" if sampling.is_filtered else "plain"
