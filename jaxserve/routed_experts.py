"""Which experts the tokens of one request took, for a trainer that replays them."""

import base64

import numpy as np

from jaxserve.messages import ExpertInfo


class RoutedExperts:
    """Grows as the request does."""

    def __init__(self, info: ExpertInfo):
        self._info, self._packed = info, bytearray()

    def extend(self, expert_ids: bytes) -> None:
        """By `RequestUpdate.expert_ids`."""
        self._packed += expert_ids

    def encode(self, num_tokens: int) -> str:
        """Of the first `num_tokens`, as base64 of i32[tokens, layers, top_k], little-endian; -1 in
        layers without experts."""
        info = self._info
        chosen = np.frombuffer(bytes(self._packed), np.int16)
        chosen = chosen.reshape(-1, len(info.sparse_layers), info.top_k)[:num_tokens]
        told = np.full((len(chosen), info.num_layers, info.top_k), -1, "<i4")
        told[:, info.sparse_layers] = chosen
        return base64.b64encode(told.tobytes()).decode()
