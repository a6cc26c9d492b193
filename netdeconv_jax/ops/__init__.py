"""Pure functions of network deconvolution: arrays in, arrays out, on jax and numpy alone."""

from netdeconv_jax.ops.convolution import convolution
from netdeconv_jax.ops.fold import fold
from netdeconv_jax.ops.grouping import ColumnGroups, column_groups, effective_block
from netdeconv_jax.ops.inverse_sqrt import inverse_sqrt
from netdeconv_jax.ops.local_norm import local_norm
from netdeconv_jax.ops.moments import Moments, moments
from netdeconv_jax.ops.patch_moments import patch_moments, sampled_rows
from netdeconv_jax.ops.patches import Padding, Window, extract_patches, window
from netdeconv_jax.ops.polynomial import chebyshev, chebyshev_ridge
from netdeconv_jax.ops.relu import relu
from netdeconv_jax.ops.roots import eigh, newton_schulz
from netdeconv_jax.ops.sampling import every_nth
from netdeconv_jax.ops.transposed import Transposed, transposed

__all__ = [
    "ColumnGroups",
    "Moments",
    "Padding",
    "Transposed",
    "Window",
    "chebyshev",
    "chebyshev_ridge",
    "column_groups",
    "convolution",
    "effective_block",
    "eigh",
    "every_nth",
    "extract_patches",
    "fold",
    "inverse_sqrt",
    "local_norm",
    "moments",
    "newton_schulz",
    "patch_moments",
    "relu",
    "sampled_rows",
    "transposed",
    "window",
]
