"""How to whiten (`WhiteningSpec`) and one pure forward per kind of layer, shared by every Flax API."""

from netdeconv_jax.whitening.conversion import Entry, Report
from netdeconv_jax.whitening.spec import WhiteningSpec
from netdeconv_jax.whitening.strategies import (
    Budget,
    Chebyshev,
    ChebyshevRidge,
    Contiguous,
    Eigh,
    Freeze,
    Interleaved,
    NewtonSchulz,
    Stride,
)

__all__ = [
    "Budget",
    "Chebyshev",
    "ChebyshevRidge",
    "Contiguous",
    "Eigh",
    "Entry",
    "Freeze",
    "Interleaved",
    "NewtonSchulz",
    "Report",
    "Stride",
    "WhiteningSpec",
]
