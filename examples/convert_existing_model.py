"""A model that was trained with batch norm goes on as one that whitens: no step of its training is lost.

  python examples/convert_existing_model.py

Handwritten digits, 1,797 images of 8x8 that come inside scikit-learn. Needs the extra `train`.
"""

import jax
import numpy as np
import optax
from flax import linen as nn
from sklearn.datasets import load_digits

from netdeconv_jax import WhiteningSpec
from netdeconv_jax.interop import warm_start

BATCH = 128


class Net(nn.Module):
    """The model that exists: nothing in it knows of whitening."""

    @nn.compact
    def __call__(self, x, train: bool):
        """Return the logits of images [batch, 8, 8, 1]."""
        for features, strides in ((16, 1), (32, 2)):
            x = nn.Conv(features, (3, 3), strides, use_bias=False)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
        return nn.Dense(10)(x.mean((1, 2)))


def fit(model, variables, images, labels, epochs, learning_rate):
    """Return the variables after some epochs of SGD: one loop for every model with `batch_stats`."""
    tx = optax.sgd(learning_rate, momentum=0.9)

    @jax.jit
    def step(variables, opt_state, images, labels):
        def loss_fn(params):
            given = {**variables, "params": params}
            logits, updates = model.apply(given, images, train=True, mutable=["batch_stats"])
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return losses.mean(), updates

        grads, updates = jax.grad(loss_fn, has_aux=True)(variables["params"])
        changes, opt_state = tx.update(grads, opt_state)
        params = optax.apply_updates(variables["params"], changes)
        return {**variables, **updates, "params": params}, opt_state

    opt_state, rng = tx.init(variables["params"]), np.random.default_rng(1)
    for _ in range(epochs):
        order = rng.permutation(len(images))[: len(images) // BATCH * BATCH]
        for rows in order.reshape(-1, BATCH):
            variables, opt_state = step(variables, opt_state, images[rows], labels[rows])
    return variables


def main():
    """Train, convert, compare, fine-tune; print the accuracies and return them."""
    pixels, labels = map(np.asarray, load_digits(return_X_y=True))
    order = np.random.default_rng(0).permutation(len(labels))
    images = (pixels[order].reshape(-1, 8, 8, 1) / 16).astype(np.float32)
    (images, test), (labels, truth) = np.split(images, [1500]), np.split(labels[order], [1500])
    net = Net()
    start = net.init(jax.random.key(0), images[:1], train=False)
    trained = fit(net, start, images, labels, epochs=4, learning_rate=0.1)
    batches = np.split(images[: 8 * BATCH], 8)
    spec = WhiteningSpec(sampling_stride=1)  # maps of few pixels: let statistics see them all
    model, converted = warm_start(net, trained, batches, spec)
    print(model.report(images[:1], train=False))
    tuned = fit(model, converted, images, labels, epochs=4, learning_rate=0.02)
    models = {"trained": (net, trained), "converted": (model, converted), "tuned": (model, tuned)}
    logits = {name: one.apply(given, test, train=False) for name, (one, given) in models.items()}
    right = {name: float((found.argmax(-1) == truth).mean()) for name, found in logits.items()}
    print(right, "of test images right")
    return logits, right


if __name__ == "__main__":
    main()
