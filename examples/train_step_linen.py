"""A training step in Flax Linen: DeconvConv where nn.Conv and nn.BatchNorm would stand.

  python examples/train_step_linen.py

Real handwritten digits (1,797 images of 8x8 inside scikit-learn), some seconds on two cores.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from sklearn.datasets import load_digits

from netdeconv_jax import DeconvConv, DeconvDense, ops

EPOCHS, BATCH, LEARNING_RATE = 3, 32, 0.05


class Net(nn.Module):
    """Two convolutions and a classifier; neither bias nor scale of any norm."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Return logits of x [batch, 8, 8, 1]."""
        conv = partial(DeconvConv, kernel_size=(3, 3), block_size=16, use_running_average=not train)
        x = ops.relu(conv(16, sampling_stride=1)(x))  # 1: on maps this small, see every patch
        x = ops.relu(conv(32, strides=2, sampling_stride=1)(x))
        return DeconvDense(10, use_running_average=not train)(x.mean((1, 2)))


model, optimizer = Net(), optax.sgd(LEARNING_RATE, momentum=0.9)


@jax.jit
def train_step(variables, opt_state, images, labels):
    """Return variables and optimizer state after one step, and the loss before it."""

    def loss_of(params):
        # The running mean and whitener are the mutable collection `batch_stats`, as with nn.BatchNorm.
        logits, updates = model.apply(
            {**variables, "params": params}, images, train=True, mutable=["batch_stats"]
        )
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), updates

    (loss, updates), grads = jax.value_and_grad(loss_of, has_aux=True)(variables["params"])
    steps, opt_state = optimizer.update(grads, opt_state)
    params = optax.apply_updates(variables["params"], steps)
    return {"params": params, **updates}, opt_state, loss


@jax.jit
def accuracy(variables, images, labels):
    """Return the share of images that are recognized, by running statistics."""
    logits: Any = model.apply(variables, images, train=False)
    return jnp.mean(logits.argmax(-1) == labels)


def main() -> None:
    """Train on two thirds of the digits, test on the rest."""
    digits: Any = load_digits()
    images, labels = (digits.images[..., None] - 4.9).astype(np.float32) / 6, digits.target
    test = slice(1198, None)
    variables = model.init(jax.random.key(0), images[:1], train=False)
    opt_state, loss = optimizer.init(variables["params"]), None
    for epoch in range(EPOCHS):
        order = np.random.default_rng(epoch).permutation(1198)
        for start in range(0, 1198 - BATCH + 1, BATCH):
            batch = (images[at := order[start : start + BATCH]], labels[at])
            variables, opt_state, loss = train_step(variables, opt_state, *batch)
        share = accuracy(variables, images[test], labels[test])
        print(f"epoch {epoch + 1}: loss {loss:.3f}, test accuracy {share:.1%}")


if __name__ == "__main__":
    main()
