"""From the `whitening` part of a config to a `WhiteningSpec`."""

import dataclasses

import jax

from netdeconv_jax import WhiteningSpec
from netdeconv_jax.whitening import Chebyshev, ChebyshevRidge, Eigh, NewtonSchulz
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
    apart = ("preset", "ridge", "through_root")
    settings = {k: v for k, v in config.items() if k not in apart and v is not None}
    spec = WhiteningSpec.fast() if config.preset == "fast" else WhiteningSpec()
    spec = spec.replace(**settings)
    if config.ridge is not None:
        kinds = {Eigh: Eigh, Chebyshev: ChebyshevRidge}
        if type(spec.root) not in kinds:
            raise ValueError(
                f"`whitening.ridge` goes with method 'eigh' or 'chebyshev', got {config.method!r}."
            )
        spec = spec.replace(root=kinds[type(spec.root)](config.ridge))
    if not config.through_root:
        if not isinstance(spec.root, NewtonSchulz):
            raise ValueError(
                f"`whitening.through_root` must be True with method {config.method!r}: only the root of "
                "method 'newton_schulz' can be detached."
            )
        spec = spec.replace(root=Detached(spec.root.num_iters))
    return spec
