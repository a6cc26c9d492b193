"""From the `optimizer` part of a config to an optax transformation.

A new optimizer is a function of the config and the schedule, in `OPTIMIZERS`; a new schedule is one of the
config, the steps that it has and those of the warm-up before them, in `SCHEDULES`.
"""

from collections.abc import Callable
from typing import Any

import jax
import optax

from train.config import Config

Schedule = Callable[[Any], Any]


def _sgd(config: Config, rate: Schedule) -> optax.GradientTransformation:
    # The original's: decay is a part of the gradient, `g + decay * p`, and so of the momentum.
    return optax.chain(
        optax.add_decayed_weights(config.weight_decay, decayed(config)),
        optax.sgd(rate, momentum=config.momentum, nesterov=config.nesterov),
    )


def _adamw(config: Config, rate: Schedule) -> optax.GradientTransformation:
    return optax.adamw(
        rate, b1=config.momentum, weight_decay=config.weight_decay, mask=decayed(config)
    )


def _muon(config: Config, rate: Schedule) -> optax.GradientTransformation:
    # Orthogonalizes matrices: a kernel is one with its outputs as columns; what has no rows goes to AdamW.
    return optax.contrib.muon(
        rate,
        beta=config.momentum,
        nesterov=config.nesterov,
        weight_decay=config.weight_decay,
        weight_decay_mask=decayed(config),
        adam_weight_decay=config.weight_decay if config.decay_on == "all" else 0.0,
        muon_weight_dimension_numbers=_matrices,
    )


def _matrices(params: Any) -> Any:
    def dimensions(leaf: jax.Array) -> Any:
        if leaf.ndim < 2:
            return None
        rows = tuple(range(leaf.ndim - 1))
        return optax.contrib.MuonDimensionNumbers(rows, leaf.ndim - 1)

    return jax.tree.map(dimensions, params)


OPTIMIZERS = {"sgd": _sgd, "adamw": _adamw, "muon": _muon}


def _constant(config: Config, steps: int, warmup: int) -> Schedule:
    del steps, warmup
    return optax.constant_schedule(config.learning_rate)


def _cosine(config: Config, steps: int, warmup: int) -> Schedule:
    del warmup
    return optax.cosine_decay_schedule(config.learning_rate, steps)


def _multistep(config: Config, steps: int, warmup: int) -> Schedule:
    at = [round(share * (steps + warmup)) - warmup for share in config.milestones]
    if warmup and any(step < 1 for step in at):
        raise ValueError(
            f"`optimizer.milestones` must come after the warm-up of {warmup} steps, of "
            f"{steps + warmup}, got {tuple(config.milestones)}."
        )
    decays: Any = dict.fromkeys(at, config.decay)
    return optax.piecewise_constant_schedule(config.learning_rate, decays)


SCHEDULES = {"constant": _constant, "cosine": _cosine, "multistep": _multistep}


def decayed(config: Config) -> Callable[[Any], Any] | None:
    """Return the mask of the parameters that weight decay acts on, or None for all of them."""
    if config.decay_on == "all":
        return None
    return lambda params: jax.tree.map(lambda leaf: leaf.ndim > 1, params)


def create(
    config: Config, *, total_steps: int, steps_per_epoch: int
) -> tuple[optax.GradientTransformation, Schedule]:
    """Return the optimizer that `config` describes, and its learning rate as a function of the step.

    Args:
      config: the `optimizer` part of a config.
      total_steps: where a schedule ends.
      steps_per_epoch: of which `warmup_epochs` are a linear rise from 0; the schedule takes what is left.
    Raises:
      ValueError: an unknown name or schedule, a warm-up as long as the run, or milestones within it.

    Source: the recipes of the original code.
    """
    for name, known in (("name", OPTIMIZERS), ("schedule", SCHEDULES)):
        if config[name] not in known:
            raise ValueError(
                f"`optimizer.{name}` must be one of {tuple(known)}, got {config[name]!r}."
            )
    warmup = round(config.warmup_epochs * steps_per_epoch)
    if warmup and warmup >= total_steps:
        raise ValueError(
            f"`optimizer.warmup_epochs` must be shorter than the run of {total_steps} steps, got "
            f"{config.warmup_epochs}, {warmup} steps."
        )
    rate = SCHEDULES[config.schedule](config, total_steps - warmup, warmup)
    if warmup:
        # The first step's rate is not 0, which would waste it.
        rise = optax.linear_schedule(
            config.learning_rate / warmup, config.learning_rate, max(1, warmup - 1)
        )
        rate = optax.join_schedules([rise, rate], [warmup])
    return OPTIMIZERS[config.name](config, rate), rate
