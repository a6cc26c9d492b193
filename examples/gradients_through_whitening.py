"""Derivatives through the whitener: what it adds to a gradient, forward mode, second order.

  python examples/gradients_through_whitening.py

y = (X - mu) D w: D is a function of X, so that whatever feeds X learns what whitening will make of it. Real
handwritten digits go through a first layer W1, tanh, and a whitened layer; derivatives are those with respect
to W1, once with D and once with D held constant. Float64, some seconds.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.datasets import load_digits

from netdeconv_jax import ops

jax.config.update("jax_enable_x64", True)

DIGITS: Any = load_digits()
IMAGES = jnp.asarray(DIGITS.data[:256] / 16)
LABELS = jax.nn.one_hot(DIGITS.target[:256], 10)
W1 = 0.3 * jax.random.normal(jax.random.key(0), (64, 24))
W2 = 0.3 * jax.random.normal(jax.random.key(1), (24, 10))


def loss(w1: jax.Array, detached: bool = False) -> jax.Array:
    """Return the cross-entropy of the whitened features; `detached`: with mean and D held constant."""
    x = jnp.tanh(IMAGES @ w1)
    moments = ops.moments(x)
    mean, whitener = moments.mean, ops.inverse_sqrt(moments.cov + 1e-5 * jnp.eye(24))
    if detached:
        mean, whitener = jax.lax.stop_gradient((mean, whitener))
    logits = (x - mean[None]) @ whitener @ W2
    return -jnp.mean(jnp.sum(LABELS * jax.nn.log_softmax(logits), -1))


def main() -> None:
    """Compare derivatives with each other and with finite differences."""
    through, constant = jax.grad(loss)(W1), jax.grad(loss)(W1, detached=True)
    norms = jnp.linalg.norm(through), jnp.linalg.norm(constant)
    show("norm of the gradient, through D", norms[0])
    show("norm of the gradient, D constant", norms[1])
    show("cosine between them", jnp.vdot(through, constant) / (norms[0] * norms[1]))

    # Whitened features do not grow with their input: a step along X itself changes little.
    x = jnp.asarray(np.random.default_rng(0).normal(size=(256, 24)))

    def whitened(scale, detached):
        m = ops.moments(scale * x)
        d = ops.inverse_sqrt(m.cov)
        return scale * x @ (jax.lax.stop_gradient(d) if detached else d)

    for what, detached in (("followed", False), ("constant", True)):
        _, tangent = jax.jvp(lambda s, held=detached: whitened(s, held), (1.0,), (1.0,))
        show(f"jvp along the input's scale, D {what}", jnp.linalg.norm(tangent))

    # Second order: a Hessian-vector product, forward over reverse, against a difference of gradients.
    v, step = jax.random.normal(jax.random.key(2), W1.shape), 1e-5
    _, hvp = jax.jvp(jax.grad(loss), (W1,), (v,))
    apart = (jax.grad(loss)(W1 + step * v) - jax.grad(loss)(W1 - step * v)) / (2 * step) - hvp
    error = jnp.linalg.norm(apart) / jnp.linalg.norm(hvp)
    show("Hessian-vector product, against finite differences", error)

    # Only the gradient through D is that of the loss.
    measured = (loss(W1 + step * v) - loss(W1 - step * v)) / (2 * step)
    show("slope along a direction, measured", measured)
    show("slope along a direction, by the gradient", jnp.vdot(through, v))
    show("slope along a direction, D constant", jnp.vdot(constant, v))


def show(what: str, value: jax.Array) -> None:
    """Print a line."""
    print(f"{what:52}{value:12.6g}")


if __name__ == "__main__":
    main()
