"""One step of training and one batch of evaluation, as pure functions of state and feed."""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import lax

from netdeconv_jax.interop import accumulate
from netdeconv_jax.interop.batch_norm import laid_over
from train.config import Config
from train.data.input import Batch, Input
from train.diagnostics import layers_of


@flax.struct.dataclass
class TrainState:
    """What a run is, apart from its config and its data.

    Attributes:
      step: int32, steps done.
      key: uint32 key data, the same in every step; each step derives its own from it.
      params, batch_stats, opt_state: of the model and the optimizer.
      ema: exponential average of `params`, or None.
    """

    step: jax.Array
    key: jax.Array
    params: Any
    batch_stats: Any
    opt_state: Any
    ema: Any = None

    def variables(self) -> dict[str, Any]:
        """Return the variables to evaluate: the average weights where there are such."""
        params = self.params if self.ema is None else self.ema
        return {"params": params, "batch_stats": self.batch_stats}


class Steps:
    """The functions of a run, to be compiled by `train.parallel`.

    Args:
      model: called as `model.apply(variables, images, train=..., mutable=...)`, and with
        `update_whitener=False` in steps that reuse whiteners.
      optimizer, rate: see `train.optimizer.create`.
      data: what makes a batch of a feed.
      config: `accumulate`, `ema`, `loss` and `label_smoothing` are used.
      axis: mapped axis that holds the parts of the batch, or None if the step sees all of it.
    """

    def __init__(
        self,
        model: Any,
        optimizer: optax.GradientTransformation,
        rate: Any,
        data: Input,
        config: Config,
        axis: str | None,
    ):
        self.model, self.optimizer, self.rate, self.data = model, optimizer, rate, data
        self.config, self.axis = config, axis

    def init(self, key: jax.Array) -> TrainState:
        """Return the state before the first step, from key data."""
        params_key, run_key = jax.random.split(jax.random.wrap_key_data(key))
        image = jnp.zeros((1, *self.data.image_shape))
        variables = self.model.init(params_key, image, train=False)
        params, batch_stats = variables["params"], variables.get("batch_stats", {})
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            key=jax.random.key_data(run_key),
            params=params,
            batch_stats=batch_stats,
            opt_state=self.optimizer.init(params),
            ema=params if self.config.ema else None,
        )

    def train(
        self, state: TrainState, arrays: Any, feed: Any, *, update_whitener: bool = True
    ) -> tuple[TrainState, jax.Array]:
        """Return the state after a step, and its figures: loss, accuracy, learning rate, is it finite; and
        whether the statistics of each layer are, in the order of `train.diagnostics.layer_names`.

        With `update_whitener=False`, which is static, layers that whiten reuse their running statistics. The
        fourth tells of parameters and statistics. The loss does not tell of them: on a CPU the maximum of a
        NaN and 0, which a ReLU compiles to, is 0.
        """
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        data_key, noise_key = jax.random.split(key)
        if self.axis is not None:  # or all devices would drop the same units
            noise_key = jax.random.fold_in(noise_key, lax.axis_index(self.axis))
        batch = self.data.train_batch(arrays, feed, data_key, state.step)
        grads, batch_stats, loss, accuracy = self._gradients(
            state, batch, noise_key, update_whitener
        )
        new = batch_stats if update_whitener else _but_for_whitening(batch_stats)
        grads, new, loss, accuracy = self._mean((grads, new, loss, accuracy))
        batch_stats = laid_over(batch_stats, new)
        updates, opt_state = self.optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = state.ema
        if self.config.ema:
            ema = optax.incremental_update(params, state.ema, 1 - self.config.ema)
        layers = [_all_finite(leaves) for _, leaves in layers_of(batch_stats)]
        finite = jnp.stack([_all_finite(params), *layers]).all()
        figures = [loss, accuracy, self.rate(state.step), finite, *layers]
        figures = jnp.stack([jnp.asarray(figure, jnp.float32) for figure in figures])
        state = dataclasses.replace(
            state,
            step=state.step + 1,
            params=params,
            batch_stats=batch_stats,
            opt_state=opt_state,
            ema=ema,
        )
        return state, figures

    def moments(self, step: jax.Array, variables: Any, arrays: Any, feed: Any) -> Any:
        """Return the moments of every whitened layer on a training batch."""
        batch = self.data.train_batch(arrays, feed, jax.random.key(0), step)
        noise = {"dropout": jax.random.key(0)}
        _, updates = self.model.apply(
            variables, batch.images, train=True, mutable=["moments", "batch_stats"], rngs=noise
        )
        return updates.get("moments", {})

    def images(self, key: jax.Array, step: jax.Array, arrays: Any, feed: Any) -> Any:
        """Return the images of a training batch, for a pass that trains nothing."""
        key = jax.random.fold_in(jax.random.wrap_key_data(key), step)
        return self.data.train_batch(arrays, feed, key, step).images

    def evaluate(self, variables: Any, arrays: Any, feed: Any) -> jax.Array:
        """Return sums over a batch: of the losses, of the correct answers, of the examples."""
        batch = self.data.test_batch(arrays, feed)
        logits = self.model.apply(variables, batch.images, train=False)
        losses = example_losses(self.config.loss, logits, batch.labels, smoothing=0.0)
        correct = logits.argmax(-1) == batch.labels
        # What weighs 0 may be anything, infinities included.
        counted = batch.weights > 0
        figures = (jnp.where(counted, x, 0) for x in (losses, correct, counted))
        sums = jnp.stack([x.astype(jnp.float32).sum() for x in figures])
        return sums if self.axis is None else lax.psum(sums, self.axis)

    def _gradients(
        self, state: TrainState, batch: Batch, key: jax.Array, update_whitener: bool
    ) -> Any:
        # Not every model need know the argument.
        flags = {} if update_whitener else {"update_whitener": False}

        def loss_fn(variables, microbatch, mutable):
            batch, key = microbatch
            logits, updates = self.model.apply(
                variables, batch.images, train=True, mutable=mutable, rngs={"dropout": key}, **flags
            )
            loss = (self._losses(logits, batch.labels) * batch.weights).mean()
            accuracy = ((logits.argmax(-1) == batch.labels) * batch.weights).mean()
            return loss, (updates, accuracy)

        count = self.config.accumulate
        microbatches = jax.tree.map(lambda x: _microbatches(x, count), batch)
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        (loss, accuracy), grads, batch_stats = accumulate(
            loss_fn, variables, (microbatches, jax.random.split(key, count))
        )
        return grads, batch_stats, loss, accuracy.mean()

    def _losses(self, logits: jax.Array, labels: Any) -> jax.Array:
        return example_losses(self.config.loss, logits, labels, self.config.label_smoothing)

    def _mean(self, tree: Any) -> Any:
        """Average over the devices what each of them computed of its part."""
        if self.axis is None:
            return tree

        def mean(x: jax.Array) -> jax.Array:
            # Counts of steps are the same everywhere.
            return lax.pmean(x, self.axis) if jnp.issubdtype(x.dtype, jnp.floating) else x

        return jax.tree.map(mean, tree)


def example_losses(kind: str, logits: jax.Array, labels: Any, smoothing: float) -> jax.Array:
    """Return the loss of every example, in float32; `kind` is `config.loss`."""
    logits = logits.astype(jnp.float32)  # a network in half precision answers in half precision
    if kind == "cross_entropy" and not smoothing:
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), smoothing)
    if kind == "l2":
        return 0.5 * jnp.square(logits - targets).sum(-1)
    return optax.softmax_cross_entropy(logits, targets)


def _but_for_whitening(batch_stats: Any) -> Any:
    """The statistics of other layers. What whitening reuses is equal on all devices, and large."""
    flat = flatten_dict(batch_stats)
    return unflatten_dict({k: v for k, v in flat.items() if (*k[:-1], "whitener") not in flat})


def _all_finite(tree: Any) -> jax.Array:
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()


def _microbatches(x: jax.Array, count: int) -> jax.Array:
    """Return [count, batch / count, ...]; every device's share of the batch is divided, not the devices."""
    return jnp.moveaxis(x.reshape(-1, count, *x.shape[1:]), 1, 0)
