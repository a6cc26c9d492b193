"""From the `optimizer` part of a config to an optax transformation."""

import optax

from train.config import Config

OPTIMIZERS = ("sgd",)
SCHEDULES = ("cosine", "constant")


def create(config: Config, *, total_steps: int) -> optax.GradientTransformation:
    """Return the optimizer that `config` describes.

    SGD with momentum, and weight decay as a part of the gradient on every parameter: `g + decay * p`.

    Args:
      config: `name`, `learning_rate`, `schedule`, `momentum`, `weight_decay`.
      total_steps: where the cosine reaches 0.
    Raises:
      ValueError: an unknown name or schedule.

    Source: the recipe of the original code.
    """
    if config.name not in OPTIMIZERS:
        raise ValueError(f"`optimizer.name` must be one of {OPTIMIZERS}, got {config.name!r}.")
    if config.schedule not in SCHEDULES:
        raise ValueError(
            f"`optimizer.schedule` must be one of {SCHEDULES}, got {config.schedule!r}."
        )
    rate: optax.ScalarOrSchedule = config.learning_rate
    if config.schedule == "cosine":
        rate = optax.cosine_decay_schedule(config.learning_rate, total_steps)
    return optax.chain(
        optax.add_decayed_weights(config.weight_decay),
        optax.sgd(rate, momentum=config.momentum),
    )
