"""From the `whitening` part of a config to a `WhiteningSpec`, and to the steps that compute statistics."""

import dataclasses

import jax

from netdeconv_jax import WhiteningSpec
from netdeconv_jax.interop.trained import configured_spec
from netdeconv_jax.whitening import NewtonSchulz
from train.config import Config


@dataclasses.dataclass(frozen=True)
class Detached(NewtonSchulz):
    """The same root, as a constant to the gradient: what whitening without its correction term would be.

    Source: ours, to measure what the paper's equation 4 calls for.
    """

    def __call__(self, cov: jax.Array) -> jax.Array:
        """Return the inverse square root, through which no gradient flows."""
        return jax.lax.stop_gradient(super().__call__(cov))


def create(config: Config) -> WhiteningSpec:
    """Return the spec that `config` describes.

    Raises:
      ValueError: a setting that `WhiteningSpec` refuses, a `ridge` for another method than "eigh" and
        "chebyshev", or `through_root=False` for another than "newton_schulz".
    """
    spec = configured_spec(dict(config.items()))
    if not config.through_root:
        if not isinstance(spec.root, NewtonSchulz):
            raise ValueError(
                f"`whitening.through_root` must be True with {spec.root!r}: only the root of method "
                "'newton_schulz' can be detached."
            )
        spec = spec.replace(root=Detached(spec.root.num_iters, spec.root.precision))
    return spec


def updates(config: Config, step: int) -> bool:
    """Return whether a step, counted from 0, computes statistics; if not, it reuses the running ones.

    A function of the step alone, so that a run that is resumed takes the same ones.

    Example:
      >>> from train import config, whitening
      >>> settings = config.default().whitening
      >>> settings.update_every, settings.update_warmup_steps = 3, 2
      >>> [step for step in range(10) if whitening.updates(settings, step)]
      [0, 1, 3, 6, 9]
    """
    return step < config.update_warmup_steps or step % config.update_every == 0


def ever_reuses(config: Config, total_steps: int) -> bool:
    """Return whether any of `total_steps` steps reuses running statistics."""
    return not all(updates(config, step) for step in range(total_steps))
