"""Network deconvolution (Ye et al., ICLR 2020) for JAX and Flax."""

from netdeconv_jax import interop, models, ops
from netdeconv_jax.linen import ChannelDeconv, DeconvConv, DeconvDense
from netdeconv_jax.whitening import WhiteningSpec

__all__ = [
    "ChannelDeconv",
    "DeconvConv",
    "DeconvDense",
    "WhiteningSpec",
    "interop",
    "models",
    "ops",
]
__version__ = "0.1.0"
