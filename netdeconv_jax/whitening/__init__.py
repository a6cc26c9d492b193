"""How to whiten (`WhiteningSpec`) and one pure forward per kind of layer, shared by every Flax API."""

from netdeconv_jax.whitening.spec import (
    Budget,
    Chebyshev,
    Contiguous,
    Eigh,
    Freeze,
    Interleaved,
    NewtonSchulz,
    Stride,
    WhiteningSpec,
)

__all__ = [
    "Budget",
    "Chebyshev",
    "Contiguous",
    "Eigh",
    "Freeze",
    "Interleaved",
    "NewtonSchulz",
    "Stride",
    "WhiteningSpec",
]
