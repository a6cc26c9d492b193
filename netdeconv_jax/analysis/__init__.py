"""What whitening does to data and what a whitened network learns, in numbers and in pictures.

Functions of arrays, on the host in NumPy. Pictures are in `netdeconv_jax.analysis.figures`, which needs
matplotlib and is therefore imported by its own name.
"""

from netdeconv_jax.analysis.filters import (
    CentreSurround,
    centre_surround,
    deconvolved,
    whitening_filters,
)
from netdeconv_jax.analysis.sparsity import hoyer, kurtosis, standardized_histogram
from netdeconv_jax.analysis.spectra import (
    BlockCorrelation,
    block_correlation,
    condition,
    correlation,
    spectrum,
    whitened_covariance,
)

__all__ = [
    "BlockCorrelation",
    "CentreSurround",
    "block_correlation",
    "centre_surround",
    "condition",
    "correlation",
    "deconvolved",
    "hoyer",
    "kurtosis",
    "spectrum",
    "standardized_histogram",
    "whitened_covariance",
    "whitening_filters",
]
