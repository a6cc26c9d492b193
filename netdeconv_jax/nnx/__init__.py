"""Network deconvolution for Flax NNX: layers, and models converted to them."""

from netdeconv_jax.nnx.convert import conversion_report, deconvolve
from netdeconv_jax.nnx.former import FormerConv, FormerConvTranspose, FormerLinear, FormerNorm
from netdeconv_jax.nnx.layers import (
    ChannelDeconv,
    DeconvConv,
    DeconvConvTranspose,
    DeconvDense,
    DeconvLinear,
    WhiteningDiagnostic,
    WhiteningStat,
)
from netdeconv_jax.nnx.warm_start import warm_start

__all__ = [
    "ChannelDeconv",
    "DeconvConv",
    "DeconvConvTranspose",
    "DeconvDense",
    "DeconvLinear",
    "FormerConv",
    "FormerConvTranspose",
    "FormerLinear",
    "FormerNorm",
    "WhiteningDiagnostic",
    "WhiteningStat",
    "conversion_report",
    "deconvolve",
    "warm_start",
]
