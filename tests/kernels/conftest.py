"""Products in float32 are those of float32 on every device: a GPU's are TF32's unless asked."""

import jax
import pytest


@pytest.fixture(autouse=True)
def exact_products():
    with jax.default_matmul_precision("highest"):
        yield
