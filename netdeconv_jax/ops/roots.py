"""Inverse square roots of covariance matrices.

The paper's D ~ (Cov + eps I)^(-1/2) is `inverse_sqrt(cov + eps * eye)`. After the paper's five iterations
it is *not* the exact root: directions far below the Frobenius norm stay damped, which acts as a soft
ridge. Compare `newton_schulz` with its own scalar recursion on the eigenvalues, never with `eigh`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from netdeconv_jax.ops.arguments import check_number

PRECISIONS = ("highest", "high", "default")


def newton_schulz(cov: jax.Array, *, num_iters: int = 5, precision: str = "highest") -> jax.Array:
    """Return the coupled Newton-Schulz (Denman-Beavers) inverse square root, `num_iters` steps of it.

    With n = ||A||_F, Y = A / n, Z = I: `T = (3I - ZY) / 2, Y <- YT, Z <- TZ`, and the result is
    `Z / sqrt(n)`. The first T needs no product and the last Y is never read, so that k steps cost 3k - 3
    matrix products. An eigenvalue l of A moves by itself, `z <- z (3 - z y) / 2, y <- y (3 - z y) / 2`,
    and whatever is still small after the last step stays below its exact root. All zeros give 1.5^k I.

    Args:
      cov: symmetric positive semi-definite, shape [..., d, d], floating point.
      num_iters: static int >= 1. Below float64 more than about 15 steps gain nothing.
      precision: of its products, by JAX's names. `"highest"` is float32; `"high"` is TF32 on GPUs and three
        bfloat16 products on TPUs; `"default"` is TF32 on GPUs and one bfloat16 product on TPUs. CPUs have
        float32 alone. Five steps lose 1e-5 of the result with three bfloat16 products, 1e-3 with TF32 and
        7e-3 with one bfloat16 product; ten and more bear `"highest"` only.
    Returns:
      [..., d, d] in `promote_types(float32, cov.dtype)`; polynomial in `cov`, so it commutes with it.
    Raises:
      ValueError: `cov` is not square, `num_iters` < 1, or `precision` is unknown.
      TypeError: `cov` is not floating point, or `num_iters` not an int.

    Source: Ye et al. 2020, section 3.5; Lin and Maji 2017. Departures: the unused products are left out.

    Example:
      >>> import jax.numpy as jnp
      >>> from netdeconv_jax import ops
      >>> ops.newton_schulz(4.0 * jnp.eye(1), num_iters=1).tolist()
      [[0.5]]
    """
    check_num_iters(num_iters)
    check_precision(precision)
    return _iterate(check_square(cov), int(num_iters), precision)


# `jit`: one program where nobody else compiles, and a trace that equal layers share.
@functools.partial(jax.jit, static_argnums=(1, 2), inline=True)
def _iterate(cov: jax.Array, num_iters: int, precision: str) -> jax.Array:
    eye = identity_like(cov)
    norm = frobenius_norm(cov)[..., None, None]
    y, z = cov / norm, None
    for step in range(num_iters):
        t = 1.5 * eye - 0.5 * (y if z is None else kept_product(z, y, precision))
        z = t if z is None else kept_product(t, z, precision)
        if step < num_iters - 1:
            y = kept_product(y, t, precision)
    assert z is not None
    return z / jnp.sqrt(norm)


def eigh(cov: jax.Array, *, ridge: float = 0.0) -> jax.Array:
    """Return the exact inverse square root of `cov + ridge ||cov||_F I`.

    Differentiable to every order, also where eigenvalues repeat (there the derivative of an
    eigendecomposition is infinite): the derivative goes through the Sylvester equation `S dS + dS S = dA`
    of the root S. Eigenvalues below rounding, `d eps max(eig)`, are raised to it; all zeros to `d eps`.

    Args:
      cov: symmetric positive semi-definite, shape [..., d, d], floating point.
      ridge: static float >= 0, relative to the Frobenius norm (five Newton-Schulz steps act like 1e-2).
    Returns:
      [..., d, d] in `promote_types(float32, cov.dtype)`.
    Raises:
      ValueError: `cov` is not square, or `ridge` < 0 or infinite.
      TypeError: `cov` is not floating point, or `ridge` no number.

    Source: ours; the paper never takes the exact root.

    Example:
      >>> import jax.numpy as jnp
      >>> from netdeconv_jax import ops
      >>> ops.eigh(4.0 * jnp.eye(2)).round(4).tolist()
      [[0.5, 0.0], [0.0, 0.5]]
    """
    check_ridge(ridge)
    cov = check_square(cov)
    if ridge:
        cov = cov + ridge * frobenius_norm(cov)[..., None, None] * identity_like(cov)
    return _eigh_inverse_sqrt(cov)


def check_num_iters(num_iters: int) -> None:
    """Raise unless `num_iters` is an int >= 1."""
    if not isinstance(num_iters, (int, np.integer)) or isinstance(num_iters, bool):
        raise TypeError(f"`num_iters` must be a static int, got {num_iters!r}.")
    if num_iters < 1:
        raise ValueError(f"`num_iters` must be at least 1, got {num_iters}.")


def check_ridge(ridge: float) -> None:
    """Raise unless `ridge` is a finite number of at least 0."""
    check_number("ridge", ridge)


def check_precision(precision: str) -> None:
    """Raise unless `precision` is one of `PRECISIONS`."""
    if precision not in PRECISIONS:
        raise ValueError(f"`precision` must be one of {PRECISIONS}, got {precision!r}.")


def check_square(cov: jax.Array) -> jax.Array:
    """Return `cov` in float32 at least, once it is known to be [..., d, d] and floating point."""
    cov = jnp.asarray(cov)
    if cov.ndim < 2 or cov.shape[-1] != cov.shape[-2] or cov.shape[-1] == 0:
        raise ValueError(f"`cov` must be square, of shape [..., d, d], got {cov.shape}.")
    if not jnp.issubdtype(cov.dtype, jnp.floating):
        raise TypeError(f"`cov` must be floating point, got {cov.dtype}.")
    return cov.astype(jnp.promote_types(jnp.float32, cov.dtype))


def identity_like(a: jax.Array) -> jax.Array:
    """Return identities of the shape [..., d, d] and dtype of `a`."""
    return jnp.broadcast_to(jnp.eye(a.shape[-1], dtype=a.dtype), a.shape)


def multiply(a: jax.Array, b: jax.Array, precision: str = "highest") -> jax.Array:
    """Multiply; at HIGHEST precision unless told, since long iterations break under TF32 and bfloat16."""
    return jnp.matmul(a, b, precision=precision)


def kept_product(a: jax.Array, b: jax.Array, precision: str) -> jax.Array:
    """Multiply, and name the product `"whitener"`, for policies of `jax.checkpoint`.

    Small, and dear to compute again; and the gradient needs every product of a root, not only the last. Not
    for derivatives: a name cannot be transposed.
    """
    return checkpoint_name(multiply(a, b, precision), "whitener")


def frobenius_norm(a: jax.Array) -> jax.Array:
    """Norm over the last two axes; 1 for an all-zero matrix, and no overflow where entries pass 1e19.

    The scale is a constant to differentiation: rightly, since scale * ||a / scale|| does not depend on it.
    """
    scale = lax.stop_gradient(jnp.max(jnp.abs(a), axis=(-2, -1), keepdims=True))
    zero = scale == 0
    scale = jnp.where(zero, 1, scale)
    squares = jnp.sum((a / scale) ** 2, axis=(-2, -1), keepdims=True)
    # The square root of zero has an infinite slope: take that of one instead, before the root, not after.
    return (scale * jnp.sqrt(jnp.where(zero, 1, squares)))[..., 0, 0]


@jax.custom_jvp
def _eigh_inverse_sqrt(a: jax.Array) -> jax.Array:
    values, vectors = _eigh_floored(a)
    return multiply(vectors * lax.rsqrt(values)[..., None, :], jnp.swapaxes(vectors, -1, -2))


@_eigh_inverse_sqrt.defjvp
def _(primals, tangents):
    (a,), (da,) = primals, tangents
    d = _eigh_inverse_sqrt(a)
    root = multiply(a, d)
    dd = -multiply(multiply(d, _solve_sylvester(root, da)), d)
    return d, dd


def _solve_sylvester(root: jax.Array, b: jax.Array) -> jax.Array:
    """Solve `root X + X root = b` for a symmetric positive definite root; differentiable in both."""
    values, vectors = _eigh_floored(lax.stop_gradient(root))
    denominator = values[..., :, None] + values[..., None, :]

    def solve(_, b):
        inner = multiply(multiply(jnp.swapaxes(vectors, -1, -2), b), vectors) / denominator
        return multiply(multiply(vectors, inner), jnp.swapaxes(vectors, -1, -2))

    return lax.custom_linear_solve(
        lambda x: multiply(root, x) + multiply(x, root), b, solve, symmetric=True
    )


def _eigh_floored(a: jax.Array) -> tuple[jax.Array, jax.Array]:
    values, vectors = jnp.linalg.eigh(a)
    largest = jnp.max(values, axis=-1, keepdims=True)
    rounding = a.shape[-1] * jnp.finfo(a.dtype).eps * jnp.where(largest > 0, largest, 1)
    return jnp.maximum(values, rounding), vectors
