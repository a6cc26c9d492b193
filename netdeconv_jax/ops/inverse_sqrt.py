"""The inverse square root by the name of its method."""

import jax

from netdeconv_jax.ops.polynomial import chebyshev
from netdeconv_jax.ops.roots import check_num_iters, eigh, newton_schulz

METHODS = ("newton_schulz", "chebyshev", "eigh")


def inverse_sqrt(cov: jax.Array, *, method: str = "newton_schulz", num_iters: int = 5) -> jax.Array:
    """Return the inverse square root of symmetric positive semi-definite matrices.

    Args:
      cov: symmetric positive semi-definite, shape [..., d, d], floating point.
      method: `"newton_schulz"`, the paper's truncated iteration; `"chebyshev"`, the same function to 1e-4 in
        half the products; or `"eigh"`, the exact root.
      num_iters: static int >= 1; steps of the iteration, of no meaning to `"eigh"`.
    Returns:
      [..., d, d] in `promote_types(float32, cov.dtype)`, computed at HIGHEST matmul precision.
    Raises:
      ValueError: `cov` is not square, `method` is unknown, or `num_iters` < 1.
      TypeError: `cov` is not floating point, or `num_iters` not an int.

    Source: Ye et al. 2020, section 3.5 and Algorithm 1, line 8.

    Example:
      >>> import jax.numpy as jnp
      >>> from netdeconv_jax import ops
      >>> ops.inverse_sqrt(jnp.diag(jnp.array([4.0, 1.0])), method="eigh").round(4).tolist()
      [[0.5, 0.0], [0.0, 1.0]]
    """
    check_num_iters(num_iters)
    if method == "newton_schulz":
        return newton_schulz(cov, num_iters=num_iters)
    if method == "chebyshev":
        return chebyshev(cov, num_iters=num_iters)
    if method == "eigh":
        return eigh(cov)
    raise ValueError(f"`method` must be one of {METHODS}, got {method!r}.")
