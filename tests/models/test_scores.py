"""Scores over a temperature, where it is 0 too; and what training makes of them."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.models.scores import scale

SCORES = np.float32([[1.5, -2.0, 4.0], [1.5, -2.0, 4.0], [1e7, 1e7 - 1, 0.0], [3.0, 3.0, -1.0]])
TEMPERATURE = np.float32([0.0, 1.0, 0.5, 0.0])


def test_temperature_of_0_means_1():
    scaled = np.asarray(scale(jnp.array(SCORES), jnp.array(TEMPERATURE)))
    np.testing.assert_array_equal(scaled[0], scaled[1])
    np.testing.assert_array_equal(scaled, [[-2.5, -6, 0], [-2.5, -6, 0], [0, -2, -2e7], [0, 0, -4]])


def test_gradient_of_a_logprob_is_one_hot_minus_the_softmax_over_the_temperature():
    """Of the scores; that of a temperature of 0 is 0, for there it is not the divisor."""

    def loss(scores, temperature):
        return jax.nn.log_softmax(scale(scores, temperature))[:, 1].sum()

    of_scores, of_temperature = jax.grad(loss, argnums=(0, 1))(
        jnp.array(SCORES), jnp.array(TEMPERATURE)
    )
    divisor = np.where(TEMPERATURE > 0, TEMPERATURE, 1)[:, None]
    softmax = np.asarray(jax.nn.softmax((SCORES - SCORES.max(axis=1, keepdims=True)) / divisor))
    np.testing.assert_allclose(of_scores, (np.eye(3)[1] - softmax) / divisor, atol=1e-6)
    assert np.isfinite(of_temperature).all()
    assert of_temperature[0] == of_temperature[3] == 0 != of_temperature[1]
