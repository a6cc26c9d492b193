"""Covariances before and after whitening: spectrum, condition, and what is correlated with what."""

import dataclasses
from typing import Any

import numpy as np

from netdeconv_jax.ops.grouping import check_count


def spectrum(cov: Any) -> np.ndarray:
    """Return the eigenvalues of a covariance, the largest first.

    Args:
      cov: symmetric positive semi-definite, shape [..., d, d]; its symmetric part is used.
    Returns:
      float64 [..., d].
    Raises:
      ValueError: `cov` is not square.

    Source: ours.

    Example:
      >>> import numpy as np
      >>> from netdeconv_jax.analysis import spectrum
      >>> spectrum(np.diag([1.0, 4.0])).tolist()
      [4.0, 1.0]
    """
    cov = _square("cov", cov)
    return np.linalg.eigvalsh((cov + np.swapaxes(cov, -1, -2)) / 2)[..., ::-1]


def condition(cov: Any) -> float:
    """Return the largest eigenvalue by the smallest one; infinite for a singular covariance.

    Args:
      cov: as in `spectrum`, shape [d, d].
    Raises:
      ValueError: `cov` is not square, or a stack of matrices.

    Source: ours.

    Example:
      >>> import numpy as np
      >>> from netdeconv_jax.analysis import condition
      >>> condition(np.diag([1.0, 4.0]))
      4.0
    """
    values = spectrum(_square("cov", cov, stack=False))
    # Below this an eigenvalue of a float64 matrix is rounding.
    floor = len(values) * np.finfo(np.float64).eps * values[0]
    return float(values[0] / values[-1]) if values[-1] > floor else float("inf")


def whitened_covariance(cov: Any, whitener: Any) -> np.ndarray:
    """Return the covariance D' Cov D of what is whitened by D: the identity if D is the inverse root.

    Args:
      cov: shape [..., d, d].
      whitener: shape [..., d, d].
    Returns:
      float64 [..., d, d].
    Raises:
      ValueError: one is not square, or they are of two sizes.

    Source: ours.

    Example:
      >>> import numpy as np
      >>> from netdeconv_jax.analysis import whitened_covariance
      >>> whitened_covariance(np.diag([1.0, 4.0]), np.diag([1.0, 0.5])).tolist()
      [[1.0, 0.0], [0.0, 1.0]]
    """
    cov, whitener = _square("cov", cov), _square("whitener", whitener)
    if cov.shape[-1] != whitener.shape[-1]:
        raise ValueError(
            f"`whitener` must be of the size of `cov`, {cov.shape}, got shape {whitener.shape}."
        )
    return np.swapaxes(whitener, -1, -2) @ cov @ whitener


def correlation(cov: Any) -> np.ndarray:
    """Return the correlation matrix of a covariance; what has no variance correlates with nothing.

    Args:
      cov: shape [..., d, d].
    Returns:
      float64 [..., d, d].
    Raises:
      ValueError: `cov` is not square.

    Source: ours.

    Example:
      >>> import numpy as np
      >>> from netdeconv_jax.analysis import correlation
      >>> correlation(np.array([[4.0, 1.0], [1.0, 1.0]])).tolist()
      [[1.0, 0.5], [0.5, 1.0]]
    """
    cov = _square("cov", cov)
    deviation = np.sqrt(np.maximum(np.diagonal(cov, axis1=-2, axis2=-1), 0))
    scale = np.where(deviation > 0, 1 / np.where(deviation > 0, deviation, 1), 0)
    return cov * scale[..., :, None] * scale[..., None, :]


@dataclasses.dataclass(frozen=True)
class BlockCorrelation:
    """Mean absolute correlations of the columns of a patch matrix, those with themselves left out.

    Attributes:
      pixels: of one channel at two pixels: the diagonal blocks.
      channels: of two channels at one pixel.
      both: of two channels at two pixels.
      across: of two channels anywhere: the off-diagonal blocks, `channels` and `both` together.

    Source: Ye et al. 2020, figure 2, in numbers.

    Example:
      >>> import numpy as np
      >>> from netdeconv_jax.analysis import block_correlation
      >>> block_correlation(np.eye(6), channels=3).pixels
      0.0
    """

    pixels: float
    channels: float
    both: float
    across: float


def block_correlation(cov: Any, channels: int) -> BlockCorrelation:
    """Return how much pixels and channels of a patch correlate.

    Args:
      cov: of columns in the order (channel, tap), shape [channels * taps, channels * taps].
      channels: int >= 2.
    Raises:
      ValueError: `cov` is not square, or a stack of matrices; or `channels` does not divide its side or
        leaves one pixel or channel.
      TypeError: `channels` is not an int.

    Source: Ye et al. 2020, figure 2, in numbers.

    Example:
      >>> import numpy as np
      >>> from netdeconv_jax.analysis import block_correlation
      >>> block_correlation(np.ones((6, 6)), channels=2).across
      1.0
    """
    cov = _square("cov", cov, stack=False)
    taps, rest = divmod(len(cov), check_count("channels", channels))
    if rest or taps < 2 or channels < 2:
        raise ValueError(
            f"`channels` must be at least 2 and leave several taps of the {len(cov)} columns, got {channels}."
        )
    strength = np.abs(correlation(cov))
    column = np.arange(len(cov))
    channel, tap = column // taps, column % taps
    same_channel, same_tap = channel[:, None] == channel, tap[:, None] == tap
    return BlockCorrelation(
        pixels=float(strength[same_channel & ~same_tap].mean()),
        channels=float(strength[~same_channel & same_tap].mean()),
        both=float(strength[~same_channel & ~same_tap].mean()),
        across=float(strength[~same_channel].mean()),
    )


def _square(name: str, matrix: Any, *, stack: bool = True) -> np.ndarray:
    """Return a matrix in float64, or a stack of them, once it is known to be square."""
    matrix = np.asarray(matrix, np.float64)
    one = matrix.ndim == 2 or (stack and matrix.ndim > 2)
    if not one or matrix.shape[-1] != matrix.shape[-2]:
        form = "[..., d, d]" if stack else "[d, d]"
        raise ValueError(f"`{name}` must be {form}, got shape {matrix.shape}.")
    return matrix
