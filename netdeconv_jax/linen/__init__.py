"""Network deconvolution for Flax Linen: layers, and models converted to them."""

from netdeconv_jax.linen.conversion import Conversion
from netdeconv_jax.linen.convert import DeconvolvedModel, deconvolve
from netdeconv_jax.linen.layers import ChannelDeconv, DeconvConv, DeconvConvTranspose, DeconvDense

__all__ = [
    "ChannelDeconv",
    "Conversion",
    "DeconvConv",
    "DeconvConvTranspose",
    "DeconvDense",
    "DeconvolvedModel",
    "deconvolve",
]
