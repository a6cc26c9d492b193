"""What whitening by the whitener of the step before would cost in accuracy: digits, the network `cnn`.

  python -m benchmarks.lagged

Such a lagged mode would take roots and exchanges off the critical path. The library does not have it; this is
why. Here it is emulated, at twice the cost of a step: gradients are those of a network that whitens by
the last batch's mean and whitener, as constants; these are then taken from the batch by a second forward
pass, in which each layer whitens by its own batch. The first `WARM` steps are ordinary ones. Recipe and
evaluation are those of `configs/digits.py`.

Needs the extra `train`. Writes benchmarks/results/lagged.json.
"""

import functools
import json
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.step_time import ROOT, say
from train import config as configs
from train import data, loop, metrics, optimizer, whitening

EPOCHS, SEEDS, WARM = 15, (0, 1, 2), 50


def main(argv: list[str]) -> None:
    """Train with and without, and write the JSON."""
    if argv:
        raise SystemExit(f"python -m benchmarks.lagged takes no arguments, got {argv}.")
    config = configs.load("configs/digits.py:cnn,deconv", {"epochs": EPOCHS})
    found = {
        mode: [accuracies(config, seed, lagged=mode == "lagged") for seed in SEEDS]
        for mode in ("every step its own", "lagged")
    }
    result = {
        "command": "python -m benchmarks.lagged",
        "environment": metrics.environment(),
        "seeds": SEEDS,
        "ordinary_steps_first": WARM,
        "test_accuracy_by_epoch": found,
    }
    path = ROOT / "benchmarks" / "results" / "lagged.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    say(f"Written to {path}.")


def accuracies(config: Any, seed: int, *, lagged: bool) -> list[float]:
    """Return the test accuracy after each epoch."""
    source = data.create(config)
    arrays = jax.tree.map(jnp.asarray, source.arrays)
    model = loop.create_model(config, source.num_classes, None)
    spec = whitening.create(config.whitening)
    last_only = model.clone(
        spec=spec.replace(momentum=0.0)
    )  # its running statistics: the last batch's
    steps_per_epoch = source.train_size // config.batch_size
    chain, _ = optimizer.create(
        config.optimizer, total_steps=EPOCHS * steps_per_epoch, steps_per_epoch=steps_per_epoch
    )
    image = jnp.zeros((1, *source.image_shape))
    variables = model.init(jax.random.key(seed), image, train=False)

    def loss_of(params: Any, stats: Any, batch: Any, network: Any, **options: Any) -> Any:
        logits, updates = network.apply(
            {"params": params, "batch_stats": stats},
            batch.images,
            train=True,
            mutable=["batch_stats"],
            **options,
        )
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
        return losses.mean(), updates.get("batch_stats", stats)

    @functools.partial(jax.jit, static_argnames="lags")
    def step(params: Any, stats: Any, last: Any, opt_state: Any, batch: Any, lags: bool) -> Any:
        (_, stats), grads = jax.value_and_grad(loss_of, has_aux=True)(params, stats, batch, model)
        if lags:
            gradient = jax.grad(loss_of, has_aux=True)
            grads, _ = gradient(params, last, batch, last_only, update_whitener=False)
        _, last = loss_of(params, last, batch, last_only)
        updates, opt_state = chain.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), stats, last, opt_state

    @jax.jit
    def correct(params: Any, stats: Any, batch: Any) -> jax.Array:
        logits = model.apply({"params": params, "batch_stats": stats}, batch.images, train=False)
        right = (logits.argmax(-1) == batch.labels) & (batch.weights > 0)
        return jnp.stack([right.sum(), (batch.weights > 0).sum()])

    params, stats = variables["params"], variables["batch_stats"]
    last, opt_state, feeds, found = stats, chain.init(params), source.train_feeds(seed, 0), []
    make, make_test = jax.jit(source.train_batch), jax.jit(source.test_batch)
    for number in range(EPOCHS * steps_per_epoch):
        key = jax.random.fold_in(jax.random.key(seed), number)
        batch = make(arrays, next(feeds), key, number)
        params, stats, last, opt_state = step(
            params, stats, last, opt_state, batch, lags=lagged and number >= WARM
        )
        if (number + 1) % steps_per_epoch == 0:
            tests = (make_test(arrays, feed) for feed in source.test_feeds())
            right, count = np.sum([correct(params, stats, test) for test in tests], axis=0)
            found.append(float(right / count))
    say(f"seed {seed}, {'lagged' if lagged else 'every step its own'}: {found[-1]:.4f}")
    return found


if __name__ == "__main__":
    main(sys.argv[1:])
