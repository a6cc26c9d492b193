"""The loop: a compiled step, fed and watched, that never waits for the device to print.

`Trainer` holds what is compiled and is the same for every seed. Its method `run` is the loop.
"""

import functools
import itertools
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from netdeconv_jax import models
from netdeconv_jax.interop import recalibrate
from train import optimizer, parallel, whitening
from train.config import Config
from train.data.input import Input
from train.diagnostics import layer_diagnostics, layer_names
from train.output import Output
from train.step import Steps, TrainState
from train.stopping import Stopped
from train.totals import Totals

# Steps that the device may be behind: enough to keep it busy, few enough to stop soon.
IN_FLIGHT = 2
FIGURES = ("train_loss", "train_accuracy", "learning_rate", "finite")


class NonFiniteLossError(Exception):
    """The loss, or the state behind it, became NaN or infinite.

    Attributes:
      step: the first such step, counted from 1.
      loss: its loss.
      layers: names of the layers whose running statistics it left not finite.
    """

    def __init__(self, step: int, loss: float, layers: list[str], run: str = ""):
        what = f"The loss is {loss}" if not math.isfinite(loss) else "The state is not finite"
        super().__init__(f"{what} at step {step}{run and f' of {run}'}.")
        self.step, self.loss, self.layers = step, loss, layers


class Trainer:
    """One config on one dataset, compiled once by `compile`: runs that differ in their seed share it.

    Args:
      config: as `train.config.default` describes.
      data: what feeds it.
      devices: to train on, default all of all processes.

    Attributes:
      config, data: as given.
      model: the network.
      steps_per_epoch: int; what does not fill a batch is left out of an epoch, something else each time.
      total_steps: of a run.

    Raises:
      ValueError, TypeError: an unknown network, norm or optimizer, a setting that a layer refuses, or a batch
        that is larger than the training set or that the devices cannot share.
    """

    def __init__(self, config: Config, data: Input, devices: Sequence[Any] | None = None):
        self._parallel = parallel.create(config.parallel, config.statistics, devices)
        count = self._parallel.devices
        for name, parts in (("batch_size", count * config.accumulate), ("eval_batch_size", count)):
            if config[name] % parts:
                each = f", times `accumulate`={config.accumulate}" if parts > count else ""
                raise ValueError(
                    f"`{name}` must be a multiple of the {count} devices{each}, got {config[name]}."
                )
        self.config, self.data = config, data
        self.steps_per_epoch = data.train_size // config.batch_size
        if not self.steps_per_epoch:
            raise ValueError(
                f"`batch_size` must be at most the {data.train_size} training examples, got "
                f"{config.batch_size}."
            )
        self.total_steps = config.epochs * self.steps_per_epoch
        self.model = create_model(config, data.num_classes, self._parallel.layers_axis)
        chain, rate = optimizer.create(
            config.optimizer, total_steps=self.total_steps, steps_per_epoch=self.steps_per_epoch
        )
        self._steps = Steps(self.model, chain, rate, data, config, self._parallel.axis)
        # Shapes alone: a setting that no layer can take is found here, before anything is compiled.
        self.state_shapes = jax.eval_shape(self._steps.init, _key(0))
        self._layers = layer_names(self.state_shapes.batch_stats)

    def use(self, data: Input) -> None:
        """Go on with other data of the same shape and scale; nothing is compiled anew."""
        self.data, self._arrays = data, self._parallel.everywhere(data.arrays)

    def compile(self) -> float:
        """Compile everything that a run needs; return the seconds it took."""
        start = time.perf_counter()
        placed = self._parallel
        self.use(self.data)
        key = placed.everywhere(_key(0))
        self._init = placed.compile(self._steps.init, key)
        state = self._init(key)
        feed = placed.split(next(self.data.train_feeds(0, 0)))
        self._step = placed.compile(self._steps.train, state, self._arrays, feed=feed, donate=1)
        self._reusing = None
        if whitening.ever_reuses(self.config.whitening, self.total_steps) and _whitens(state):
            train = functools.partial(self._steps.train, update_whitener=False)
            self._reusing = placed.compile(train, state, self._arrays, feed=feed, donate=1)
        feed = placed.split(next(self.data.test_feeds()))
        variables = state.variables()
        self._evaluate = placed.compile(self._steps.evaluate, variables, self._arrays, feed=feed)
        self._images = jax.jit(self._steps.images)
        if self.config.log.diagnostics_every_steps:
            stats = {"params": state.params, "batch_stats": state.batch_stats}
            feed = placed.split(next(self.data.train_feeds(0, 0)))
            self._moments = placed.compile(
                self._steps.moments, state.step, stats, self._arrays, feed=feed
            )
        return time.perf_counter() - start

    def run(self, seed: int, output: Output | None = None) -> Iterator[dict[str, Any]]:
        """Train from `seed`, or go on where `output` has a checkpoint; yield a row after each epoch.

        Args:
          output: sees every step, keeps checkpoints and says when to stop; default: nothing of the kind.
        Yields:
          `step`, `epoch`, the means over the epoch of `train_loss` and `train_accuracy`, `learning_rate`,
          `step_seconds`, `images_per_second`, `input_wait_share`, and `test_loss` and `test_accuracy`.
        Raises:
          NonFiniteLossError: the loss of a step is NaN or infinite.
          Stopped: `output` asked for it, and its checkpoint is written.
        """
        output = output or Output()
        state, size = self.init(seed), self.config.batch_size
        epoch_totals, log_totals = Totals(size), Totals(size)
        restored = output.restore(self.state_shapes)
        if restored is not None:
            state = self._parallel.everywhere(restored[0])
            if restored[1]["owed"] or int(restored[0].step) % self.steps_per_epoch:
                epoch_totals.load(restored[1]["epoch_totals"])
            log_totals.load(restored[1]["log_totals"])
        step = int(self._parallel.host(state.step))
        feeds = self.placed_feeds(seed, step)
        diagnosing = self.config.log.diagnostics_every_steps
        pending: deque[tuple[int, jax.Array, float]] = deque()

        # A run that was stopped in an evaluation has all steps of the epoch behind it, and begins with that.
        owed = restored is not None and restored[1]["owed"]
        while step < self.total_steps or owed:
            if not owed:
                start = time.perf_counter()
                feed = next(feeds)
                waited = time.perf_counter() - start
                state, figures = self.step(state, feed, step)
                step += 1
                pending.append((step, figures, waited))
                if diagnosing and step % diagnosing == 0:
                    output.diagnose(step, self.diagnose(state, feed))
            owed = False

            epoch, rest = divmod(step, self.steps_per_epoch)
            stopping = output.stop_requested(step)
            saving = not rest or stopping is not None or output.checkpoint_due(step)
            while len(pending) > (0 if saving else IN_FLIGHT):
                done, figures, waited = pending.popleft()
                values = self._parallel.host(figures).tolist()
                row: dict[str, float] = dict(zip(FIGURES, values, strict=False))
                if not (row.pop("finite") and math.isfinite(row["train_loss"])):
                    flags = zip(self._layers, values[len(FIGURES) :], strict=True)
                    layers = [name for name, finite in flags if not finite]
                    raise NonFiniteLossError(done, row["train_loss"], layers)
                epoch_totals.add(row, waited)
                log_totals.add(row, waited)
                output.step(done, row, waited)
                if done % self.config.log.every_steps == 0:
                    place = {"step": done, "epoch": done / self.steps_per_epoch}
                    output.log(place | log_totals.row())
                    log_totals = Totals(size)

            result = None
            if not rest:
                evaluation = self.evaluate(self.variables(state, seed), output.interrupted)
                if evaluation is None:
                    stopping = output.interrupted()
                else:
                    result = {"step": step, "epoch": epoch} | epoch_totals.row() | evaluation
                    epoch_totals = Totals(size)
                    output.epoch(result)
            if saving:
                if output.saves:
                    meta = {
                        "epoch_totals": epoch_totals.saved(),
                        "log_totals": log_totals.saved(),
                        "owed": not rest and result is None,
                    }
                    output.save(step, self._parallel.host(state), meta, result)
                epoch_totals.restart_clock()
                log_totals.restart_clock()
            if stopping is not None:
                raise Stopped(step, stopping)
            if result is not None:
                yield result
                epoch_totals.restart_clock()  # whoever asked may have taken their time
                log_totals.restart_clock()

        output.finish(self._parallel.host(self.variables(state, seed)))

    def init(self, seed: int) -> TrainState:
        """Return the state before the first step."""
        return self._init(self._parallel.everywhere(_key(seed)))

    def step(self, state: TrainState, feed: Any, number: int = 0) -> tuple[TrainState, jax.Array]:
        """Return the state after a step, which takes over the memory of the old one, and `FIGURES`.

        `number` is that of `state.step`, which would have to be waited for: by it the step computes
        statistics for whitening, or reuses the running ones.
        """
        updates = whitening.updates(self.config.whitening, number)
        program = self._step if updates or self._reusing is None else self._reusing
        return program(state, self._arrays, feed)

    def variables(self, state: TrainState, seed: int) -> dict[str, Any]:
        """Return what is evaluated: average weights and precise statistics, if the config wants them."""
        variables = state.variables()
        if not self.config.recalibrate:
            return variables
        step = int(self._parallel.host(state.step))
        feeds = itertools.islice(self.placed_feeds(seed, step), self.config.recalibrate)
        # One after another, or the device would have to hold them all.
        images = (
            jax.block_until_ready(self._images(state.key, step + i, self._arrays, feed))
            for i, feed in enumerate(feeds)
        )
        noise = {"dropout": jax.random.key(seed)}
        return self._parallel.whole(recalibrate(self.model, variables, images, rngs=noise))

    def evaluate(
        self, variables: dict[str, Any], interrupted: Callable[[], int | None] = lambda: None
    ) -> dict[str, float] | None:
        """Return `test_loss` and `test_accuracy` over the whole test set, each example counted once.

        None if `interrupted` returns a signal meanwhile.
        """
        sums, pending = np.zeros(3), deque()
        for feed in self.data.test_feeds():
            if interrupted() is not None:
                return None
            pending.append(self._evaluate(variables, self._arrays, self._parallel.split(feed)))
            if len(pending) > IN_FLIGHT:  # or the device would have to hold the whole test set
                sums += self._parallel.host(pending.popleft())
        loss, correct, count = sum((self._parallel.host(batch) for batch in pending), sums)
        return {"test_loss": float(loss / count), "test_accuracy": float(correct / count)}

    def diagnose(self, state: TrainState, feed: Any) -> dict[str, dict[str, Any]]:
        """Return figures of every whitened layer on the batch of `feed`, see `train.diagnostics`."""
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        moments = self._moments(state.step, variables, self._arrays, feed)
        stats, spec = self._parallel.host(state.batch_stats), self.model.spec
        products = spec.root.products if hasattr(spec.root, "products") else 12
        return layer_diagnostics(
            self._parallel.host(moments), stats, eps=spec.eps, root_products=products
        )

    def placed_feeds(self, seed: int, first_step: int) -> Iterator[Any]:
        """Put feeds on the devices; one that comes again, as a resident epoch's does, is there already."""
        last = placed = None
        for feed in self.data.train_feeds(seed, first_step):
            if feed is not last:
                last, placed = feed, self._parallel.split(feed)
            yield placed


def create_model(config: Config, num_classes: int, axis_name: str | None) -> Any:
    """Return the network that a config describes.

    Raises:
      ValueError, TypeError: the zoo knows no such network or norm, or a setting of the whitening is bad.
    """
    return models.create(
        config.network,
        config.norm,
        num_classes,
        whitening.create(config.whitening),
        config.model.layout,
        width=config.model.width,
        dtype=None if config.dtype == "float32" else config.dtype,
        axis_name=axis_name,
    )


def _whitens(state: TrainState) -> bool:
    return any(path[-1] == "whitener" for path in flatten_dict(state.batch_stats))


def _key(seed: int) -> np.ndarray:
    return np.asarray(jax.random.key_data(jax.random.key(seed)))
