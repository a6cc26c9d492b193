"""A training step in Flax NNX: dnnx.DeconvConv where nnx.Conv and nnx.BatchNorm would stand.

  python examples/train_step_nnx.py

Real handwritten digits (1,797 images of 8x8 inside scikit-learn), some seconds on two cores.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits

from netdeconv_jax import nnx as dnnx
from netdeconv_jax import ops

EPOCHS, BATCH, LEARNING_RATE = 3, 32, 0.05


class Net(nnx.Module):
    """Two convolutions and a classifier; neither bias nor scale of any norm."""

    def __init__(self, rngs: nnx.Rngs):
        # A stride of 1: on maps this small, statistics are to see every patch.
        conv = partial(
            dnnx.DeconvConv, kernel_size=(3, 3), block_size=16, sampling_stride=1, rngs=rngs
        )
        self.conv1 = conv(1, 16)
        self.conv2 = conv(16, 32, strides=2)
        self.head = dnnx.DeconvDense(32, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return logits of x [batch, 8, 8, 1]."""
        x = ops.relu(self.conv2(ops.relu(self.conv1(x))))
        return self.head(x.mean((1, 2)))


@nnx.jit
def train_step(net: Net, optimizer: nnx.Optimizer, images: jax.Array, labels: jax.Array):
    """Take one step, running statistics included; return the loss before it."""

    def loss_of(net):
        return optax.softmax_cross_entropy_with_integer_labels(net(images), labels).mean()

    loss, grads = nnx.value_and_grad(loss_of)(net)
    optimizer.update(net, grads)
    return loss


@nnx.jit
def accuracy(net: Net, images: jax.Array, labels: jax.Array):
    """Return the share of images that are recognized."""
    return jnp.mean(net(images).argmax(-1) == labels)


def main() -> None:
    """Train on two thirds of the digits, test on the rest."""
    digits: Any = load_digits()
    images, labels = (digits.images[..., None] - 4.9).astype(np.float32) / 6, digits.target
    test = slice(1198, None)
    net, loss = Net(nnx.Rngs(0)), None
    optimizer = nnx.Optimizer(net, optax.sgd(LEARNING_RATE, momentum=0.9), wrt=nnx.Param)
    # The same variables by another name, which uses running statistics: as with nnx.BatchNorm.
    evaluated = nnx.view(net, use_running_average=True)
    for epoch in range(EPOCHS):
        order = np.random.default_rng(epoch).permutation(1198)
        for start in range(0, 1198 - BATCH + 1, BATCH):
            batch = order[start : start + BATCH]
            loss = train_step(net, optimizer, images[batch], labels[batch])
        share = accuracy(evaluated, images[test], labels[test])
        print(f"epoch {epoch + 1}: loss {loss:.3f}, test accuracy {share:.1%}")


if __name__ == "__main__":
    main()
