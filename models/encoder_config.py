"""What a config.json says of an encoder beyond the shape of its layers."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """Of a model whose tokens see those before and behind them: nothing of it can be cached."""

    num_positions: int  # that it has learned
    first_position: int  # that of a text's first token
    num_token_types: int
    activation: str
    norm_eps: float
