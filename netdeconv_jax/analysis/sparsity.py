"""How sparse a representation is: few large values and many near zero."""

from typing import Any

import numpy as np


def kurtosis(x: Any) -> float:
    """Return the excess kurtosis of all values: E (x - mu)^4 / sigma^4 - 3.

    0 for a normal distribution, 3 for a Laplace one; the heavier the tails, the more.

    Args:
      x: array of any shape whose values are not all equal.
    Raises:
      ValueError: all values are equal, or there are none.

    Source: Olshausen and Field 1996 measure sparseness so.

    Example:
      >>> import numpy as np
      >>> from netdeconv_jax.analysis import kurtosis
      >>> kurtosis(np.array([-1.0, 1.0]))
      -2.0
    """
    x = _standardized(x)
    return float(np.mean(x**4) - 3)


def hoyer(x: Any) -> float:
    """Return Hoyer's sparseness, (sqrt n - |x|_1 / |x|_2) / (sqrt n - 1).

    0 if all values have one magnitude, 1 if a single one is not zero; for many normal values it is 0.2.
    Unlike the kurtosis it counts from zero, not from the mean.

    Args:
      x: array of any shape, n >= 2 values that are not all zero.
    Raises:
      ValueError: all values are zero, or there are fewer than two.

    Source: P. Hoyer, Non-negative matrix factorization with sparseness constraints, JMLR 2004.

    Example:
      >>> import numpy as np
      >>> from netdeconv_jax.analysis import hoyer
      >>> hoyer(np.array([0.0, 0.0, 0.0, 2.0])), hoyer(np.ones(4))
      (1.0, 0.0)
    """
    x = np.asarray(x, np.float64).ravel()
    norm = float(np.sqrt(np.square(x).sum()))
    if len(x) < 2 or not norm > 0:
        raise ValueError(f"`x` must hold two values, not all zero; got {len(x)} of norm {norm}.")
    root = np.sqrt(len(x))
    return float((root - np.abs(x).sum() / norm) / (root - 1))


def standardized_histogram(
    x: Any, *, bins: int = 80, limit: float = 5.0
) -> tuple[np.ndarray, np.ndarray]:
    """Return the density of (x - mean) / deviation and the edges of its bins.

    Args:
      x: array of any shape whose values are not all equal.
      bins: int >= 1.
      limit: values beyond this many deviations count in no bin; the density is of all values.
    Returns:
      density [bins] and edges [bins + 1].
    Raises:
      ValueError: all values are equal, or there are none.

    Source: ours.

    Example:
      >>> import numpy as np
      >>> from netdeconv_jax.analysis import standardized_histogram
      >>> density, edges = standardized_histogram(np.array([-1.0, 1.0]), bins=2, limit=2.0)
      >>> density.tolist(), edges.tolist()
      ([0.25, 0.25], [-2.0, 0.0, 2.0])
    """
    x = _standardized(x).ravel()
    counts, edges = np.histogram(x, bins, (-limit, limit))
    return counts / (len(x) * np.diff(edges)), edges


def _standardized(x: Any) -> np.ndarray:
    x = np.asarray(x, np.float64)
    deviation = x.std() if x.size else 0.0
    if not deviation > 0:
        raise ValueError(
            f"`x` must hold values that differ; got {x.size} with deviation {deviation}."
        )
    return (x - x.mean()) / deviation
