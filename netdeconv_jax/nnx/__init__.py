"""Network deconvolution for Flax NNX: layers, and models converted to them."""

from netdeconv_jax.nnx.convert import conversion_report, deconvolve
from netdeconv_jax.nnx.former import FormerConv, FormerLinear, FormerNorm
from netdeconv_jax.nnx.layers import (
    ChannelDeconv,
    DeconvConv,
    DeconvConvTranspose,
    DeconvDense,
    DeconvLinear,
    WhiteningDiagnostic,
    WhiteningStat,
)

__all__ = [
    "ChannelDeconv",
    "DeconvConv",
    "DeconvConvTranspose",
    "DeconvDense",
    "DeconvLinear",
    "FormerConv",
    "FormerLinear",
    "FormerNorm",
    "WhiteningDiagnostic",
    "WhiteningStat",
    "conversion_report",
    "deconvolve",
]
