"""The loop: a whole dataset on the device, one jitted step, an evaluation that counts every example once."""

import math
import time
from collections.abc import Iterator
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from train import augment, networks, optimizer
from train.config import Config
from train.data import Dataset, Examples


class NonFiniteLossError(Exception):
    """The loss became NaN or infinite.

    Attributes:
      step: the first such step, counted from 1.
      loss: its loss.
    """

    def __init__(self, step: int, loss: float, run: str = ""):
        super().__init__(f"The loss is {loss} at step {step}{run and f' of {run}'}.")
        self.step, self.loss = step, loss


@flax.struct.dataclass
class TrainState:
    """What a run is, apart from its config and its data."""

    step: jax.Array
    key: jax.Array
    params: Any
    batch_stats: Any
    opt_state: Any


class Trainer:
    """One config, compiled once by `compile`: runs that differ in their seed share it.

    Args:
      config: as in `configs/digits.py`.
      dataset: copied to the device.

    Attributes:
      config: as given.
      model: the network.
      steps_per_epoch: int; what does not fill a batch is left out of an epoch, something else each time.

    Raises:
      ValueError, TypeError: an unknown network, norm or optimizer, a setting that a layer refuses, or a batch
        larger than the training set.
    """

    def __init__(self, config: Config, dataset: Dataset):
        self.steps_per_epoch = len(dataset.train) // config.batch_size
        if not self.steps_per_epoch:
            raise ValueError(
                f"`batch_size` must be at most the {len(dataset.train)} training examples, got "
                f"{config.batch_size}."
            )
        self.config = config
        self.use(dataset)
        self.model: Any = networks.create(
            config.network, norm=config.norm, num_classes=dataset.num_classes, **config.model
        )
        self._optimizer = optimizer.create(
            config.optimizer, total_steps=config.epochs * self.steps_per_epoch
        )
        # Shapes alone: a setting that no layer can take is found here, not after the compilation of another.
        self._state = jax.eval_shape(self._init_fn, jax.random.key(0))

    def use(self, dataset: Dataset) -> None:
        """Go on with another dataset of the same shape; nothing is compiled anew."""
        self._train, self._test = _on_device(dataset.train), _on_device(dataset.test)

    def compile(self) -> float:
        """Compile everything that a run needs; return the seconds it took."""
        start = time.perf_counter()
        key = jax.random.key(0)
        # The step donates its state, so that nothing outside may share its arrays: init is jitted too.
        self._init = jax.jit(self._init_fn).lower(key).compile()
        state = self._state
        self._order = jax.jit(self._order_fn).lower(state).compile()
        order = jax.eval_shape(self._order_fn, state)
        self._step = (
            jax.jit(self._step_fn, donate_argnums=0).lower(state, order, self._train).compile()
        )
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        self._evaluate = (
            jax.jit(self._evaluate_fn).lower(variables, np.int32(0), self._test).compile()
        )
        return time.perf_counter() - start

    def run(self, seed: int) -> Iterator[dict[str, Any]]:
        """Train from `seed`, yielding after each epoch what `train_epoch` and `evaluate` measured."""
        state = self.init(seed)
        for _ in range(self.config.epochs):
            state, row = self.train_epoch(state)
            yield row | self.evaluate(state)

    def init(self, seed: int) -> TrainState:
        """Return the state before the first step."""
        return self._init(jax.random.key(seed))

    def train_epoch(self, state: TrainState) -> tuple[TrainState, dict[str, float]]:
        """Train for one epoch, waiting for the device only at its end.

        Args:
          state: its memory is given to the result.
        Returns:
          The state afterwards; and `step`, the steps so far, `epoch`, `train_loss`, the mean over the epoch,
          and `step_seconds`, the mean time of a step.
        Raises:
          NonFiniteLossError: the loss of a step is NaN or infinite.
        """
        first = int(state.step)
        order = self._order(state)
        start = time.perf_counter()
        losses = []
        for _ in range(self.steps_per_epoch):
            state, loss = self._step(state, order, self._train)
            losses.append(loss)
        losses = np.array(jax.device_get(losses))
        seconds = time.perf_counter() - start
        broken = np.flatnonzero(~np.isfinite(losses))
        if len(broken):
            raise NonFiniteLossError(first + int(broken[0]) + 1, float(losses[broken[0]]))
        step = first + len(losses)
        return state, {
            "step": step,
            "epoch": step // self.steps_per_epoch,
            "train_loss": float(losses.mean()),
            "step_seconds": seconds / len(losses),
        }

    def evaluate(self, state: TrainState) -> dict[str, float]:
        """Return `test_loss` and `test_accuracy` over the whole test set."""
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        batches = math.ceil(len(self._test) / self.config.eval_batch_size)
        sums = [self._evaluate(variables, np.int32(i), self._test) for i in range(batches)]
        totals = np.array(jax.device_get(sums), np.float64).sum(axis=0)
        loss, correct = totals / len(self._test)
        return {"test_loss": float(loss), "test_accuracy": float(correct)}

    def _init_fn(self, key):
        key, init_key = jax.random.split(key)
        variables = self.model.init(init_key, self._train.images[:1], train=False)
        params, batch_stats = variables["params"], variables["batch_stats"]
        return TrainState(
            jnp.zeros((), jnp.int32), key, params, batch_stats, self._optimizer.init(params)
        )

    def _order_fn(self, state):
        epoch_key = jax.random.fold_in(state.key, state.step)
        return jax.random.permutation(epoch_key, len(self._train))

    def _step_fn(self, state, order, examples):
        config = self.config
        position = state.step % self.steps_per_epoch * config.batch_size
        chosen = jax.lax.dynamic_slice_in_dim(order, position, config.batch_size)
        # The orders of the epochs are drawn from `key` itself; this is another branch of it.
        step_key = jax.random.fold_in(jax.random.split(state.key)[1], state.step)
        images = augment.shift(step_key, examples.images[chosen], config.augment.shift)
        labels = examples.labels[chosen]

        def loss_fn(params):
            variables = {"params": params, "batch_stats": state.batch_stats}
            logits, updates = self.model.apply(
                variables, images, train=True, mutable=["batch_stats"]
            )
            return _cross_entropy(logits, labels).mean(), updates["batch_stats"]

        (loss, batch_stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
        updates, opt_state = self._optimizer.update(grads, state.opt_state, state.params)
        state = state.replace(
            step=state.step + 1,
            params=optax.apply_updates(state.params, updates),
            batch_stats=batch_stats,
            opt_state=opt_state,
        )
        return state, loss

    def _evaluate_fn(self, variables, batch, examples):
        size = self.config.eval_batch_size
        index = batch * size + jnp.arange(size)
        counted = index < len(
            examples
        )  # the last batch runs over the end: what is past it weighs 0
        index = jnp.minimum(index, len(examples) - 1)
        labels = examples.labels[index]
        logits = self.model.apply(variables, examples.images[index], train=False)
        loss = jnp.where(counted, _cross_entropy(logits, labels), 0).sum()
        correct = jnp.where(counted, logits.argmax(-1) == labels, False).sum()
        return loss, correct


def _on_device(examples: Examples) -> Examples:
    return Examples(jnp.asarray(examples.images), jnp.asarray(examples.labels))


def _cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)
