"""Network deconvolution (Ye et al., ICLR 2020) for JAX and Flax."""

import importlib
from typing import TYPE_CHECKING, Any

from netdeconv_jax import interop, models, ops
from netdeconv_jax.linen import (
    ChannelDeconv,
    DeconvConv,
    DeconvConvTranspose,
    DeconvDense,
    deconvolve,
)
from netdeconv_jax.whitening import WhiteningSpec

__all__ = [
    "ChannelDeconv",
    "DeconvConv",
    "DeconvConvTranspose",
    "DeconvDense",
    "WhiteningSpec",
    "deconvolve",
    "interop",
    "models",
    "nnx",
    "ops",
]
__version__ = "0.1.0"

if TYPE_CHECKING:
    from netdeconv_jax import nnx


def __getattr__(name: str) -> Any:
    # A quarter of a second that who uses Linen does not wait for.
    if name == "nnx":
        return importlib.import_module("netdeconv_jax.nnx")
    raise AttributeError(f"module 'netdeconv_jax' has no attribute {name!r}")
