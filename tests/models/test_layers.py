"""A product is the same in whatever form the platform computes it, and so are its gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.models.layers import project

COUNTS = [1, 2, 3, 16, 17]  # tokens; on a CPU one and few have forms of their own


def operands(num_tokens: int, dtype) -> tuple[jax.Array, jax.Array]:
    x, weight = jax.random.split(jax.random.key(num_tokens))
    return jax.random.normal(x, (num_tokens, 24), dtype), jax.random.normal(weight, (40, 24), dtype)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("num_tokens", COUNTS)
def test_product_for_any_number_of_tokens(num_tokens, dtype):
    x, weight = operands(num_tokens, dtype)
    want = np.asarray(x, np.float64) @ np.asarray(weight, np.float64).T
    full = jax.jit(project, static_argnums=2)(x, weight, jnp.float32)
    assert full.dtype == jnp.float32
    np.testing.assert_allclose(full, want, rtol=1e-5, atol=1e-5)
    own = project(x, weight)
    assert own.dtype == dtype
    np.testing.assert_allclose(own.astype(jnp.float32), want, rtol=1e-2, atol=1e-1)


@pytest.mark.parametrize("num_tokens", COUNTS)
def test_gradients_of_the_product(num_tokens):
    x, weight = operands(num_tokens, jnp.float32)
    y = jax.random.normal(jax.random.key(0), (num_tokens, 40))
    by_x, by_weight = jax.grad(lambda *both: (project(*both) * y).sum(), argnums=(0, 1))(x, weight)
    np.testing.assert_allclose(by_x, y @ weight, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(by_weight, y.T @ x, rtol=1e-5, atol=1e-5)


def test_products_of_a_batch_of_sequences():
    x = jax.random.normal(jax.random.key(0), (5, 4, 24))
    weight = operands(1, jnp.float32)[1]
    out = jax.vmap(lambda tokens: project(tokens, weight))(x)
    np.testing.assert_allclose(out, x @ weight.T, rtol=1e-5, atol=1e-5)
