"""Roots as short polynomials: the paper's iteration in half its products, and the exact root with a ridge.

After k Newton-Schulz steps the result is one smooth scalar function of the eigenvalues of A / ||A||_F, which
lie in [0, 1]. A polynomial of X = 2 A / ||A||_F - I in the Chebyshev basis, fitted to that function and its
derivative, is evaluated by Paterson-Stockmeyer: degree 16 takes 6 matrix products where five steps take 12,
in a chain half as long. This is a cheaper way to the *same* whitening, not a better root.

Any other function of the eigenvalues is fitted the same way: the exact inverse root of A + ridge ||A||_F I is
whitening of which a ridge, not a number of iterations, says how far it goes, in matrix products alone.
"""

import bisect
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from netdeconv_jax.ops.arguments import check_number
from netdeconv_jax.ops.roots import (
    check_num_iters,
    check_precision,
    check_square,
    frobenius_norm,
    identity_like,
    kept_product,
    newton_schulz,
)

# The most that each number of products can reach, 2 to 20 of them; and the block of powers that reaches it.
_DEGREES = {4: 2, 6: 3, 9: 3, 12: 4, 16: 4, 20: 5, 25: 5, 30: 6, 36: 6, 42: 7, 49: 7}
_LARGEST_IMITATION = max(_DEGREES)
_DEGREES |= {56: 8, 64: 8, 72: 9, 81: 9, 90: 10, 100: 10, 110: 11, 121: 11}
_DERIVATIVE_WEIGHT = 0.01  # of the relative error of the slope; costs a few percent of the value's
_NODES = 400
_REWEIGHTINGS = 40

Target = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]  # value and slope at eigenvalues


def chebyshev(
    cov: jax.Array, *, num_iters: int = 5, tol: float = 1e-4, precision: str = "highest"
) -> jax.Array:
    """Return what `newton_schulz` returns after `num_iters` steps, to a relative error of `tol`.

    The derivative is exactly the polynomial's; it differs from the iteration's by about 40 `tol`. Where no
    polynomial of degree up to 49 needs fewer products than the iteration (one step, or ten), it is the
    iteration that runs.

    Args:
      cov: symmetric positive semi-definite, shape [..., d, d], floating point.
      num_iters: static int >= 1, steps of the iteration that is imitated.
      tol: static float > 0, relative error of the result along every eigenvector.
      precision: of its products, as `newton_schulz`; TF32 adds 1e-3 of the result, bfloat16 1e-2.
    Returns:
      [..., d, d] in `promote_types(float32, cov.dtype)`.
    Raises:
      ValueError: `cov` is not square, `num_iters` < 1, `tol` is not positive, or `precision` is unknown.
      TypeError: `cov` is not floating point, or `num_iters` not an int.

    Source: ours; Paterson and Stockmeyer 1973 for the evaluation, Lawson 1961 for the fit.

    Example:
      >>> import jax.numpy as jnp
      >>> from netdeconv_jax import ops
      >>> a = jnp.diag(jnp.array([4.0, 1.0, 0.1]))
      >>> bool(jnp.allclose(ops.chebyshev(a), ops.newton_schulz(a), rtol=1e-4, atol=0.0))
      True
    """
    check_num_iters(num_iters)
    check_tol(tol)
    check_precision(precision)
    cov = check_square(cov)
    coefficients = chebyshev_coefficients(int(num_iters), float(tol))
    if coefficients is None:
        return newton_schulz(cov, num_iters=num_iters, precision=precision)
    return _inverse_sqrt(cov, coefficients, precision)


def chebyshev_ridge(
    cov: jax.Array, *, ridge: float = 1e-2, tol: float = 1e-3, precision: str = "highest"
) -> jax.Array:
    """Return the exact inverse square root of `cov + ridge ||cov||_F I`, to a relative error of `tol`.

    What `eigh(cov, ridge=ridge)` returns, without an eigendecomposition: that one is a long sequential
    program, slow on accelerators above all. The smaller the ridge, the higher the degree, about
    `ln(1 / tol) / (2 sqrt(ridge))`.

    Args:
      cov: symmetric positive semi-definite, shape [..., d, d], floating point.
      ridge: static float > 0, relative to the Frobenius norm.
      tol: static float > 0, relative error of the result along every eigenvector.
      precision: of its products, as `newton_schulz`.
    Returns:
      [..., d, d] in `promote_types(float32, cov.dtype)`.
    Raises:
      ValueError: `cov` is not square, `ridge` or `tol` is not positive, no polynomial of degree up to 121
        reaches `tol` with such a ridge, or `precision` is unknown.
      TypeError: `cov` is not floating point.

    Source: ours; evaluation and fit as in `chebyshev`.

    Example:
      >>> import jax.numpy as jnp
      >>> from netdeconv_jax import ops
      >>> a = jnp.diag(jnp.array([4.0, 1.0, 0.1]))
      >>> exact = ops.eigh(a, ridge=0.01)
      >>> bool(jnp.allclose(ops.chebyshev_ridge(a, ridge=0.01), exact, rtol=1e-3, atol=1e-5))
      True
    """
    coefficients = ridge_coefficients(ridge, tol)
    check_precision(precision)
    return _inverse_sqrt(check_square(cov), coefficients, precision)


@functools.partial(jax.jit, static_argnums=(1, 2), inline=True)
def _inverse_sqrt(cov: jax.Array, coefficients: tuple[float, ...], precision: str) -> jax.Array:
    norm = frobenius_norm(cov)[..., None, None]
    eye = identity_like(cov)
    x = (2 / norm) * cov - eye
    return _evaluate(x, eye, coefficients, precision) / jnp.sqrt(norm)


@functools.lru_cache
def chebyshev_coefficients(num_iters: int, tol: float) -> tuple[float, ...] | None:
    """Return the fewest Chebyshev coefficients on [0, 1] that imitate `num_iters` steps to `tol`.

    Args:
      num_iters: static int >= 1.
      tol: float > 0, relative error.
    Returns:
      Coefficients c_0 ... c_n of T_k(2 l - 1), or None where the iteration needs no more products.
    Raises:
      ValueError: see `chebyshev`.

    Source: ours.

    Example:
      >>> from netdeconv_jax.ops.polynomial import chebyshev_coefficients
      >>> len(chebyshev_coefficients(5, 1e-4)) - 1
      16
    """
    check_num_iters(num_iters)
    check_tol(tol)
    most = min(3 * num_iters - 4, _products(_LARGEST_IMITATION))
    return _fewest(functools.partial(_scalar_iteration, num_iters=num_iters), tol, most)


def ridge_coefficients(ridge: float, tol: float) -> tuple[float, ...]:
    """Return the fewest Chebyshev coefficients on [0, 1] of `(l + ridge)^(-1/2)`, to a relative `tol`.

    Args:
      ridge: float > 0.
      tol: float > 0, relative error.
    Returns:
      Coefficients c_0 ... c_n of T_k(2 l - 1).
    Raises:
      ValueError: see `chebyshev_ridge`.

    Source: ours.

    Example:
      >>> from netdeconv_jax.ops.polynomial import ridge_coefficients
      >>> len(ridge_coefficients(1e-2, 1e-2)) - 1
      20
    """
    check_tol(tol)
    check_number("ridge", ridge, above=0)
    coefficients = _ridge_coefficients(float(ridge), float(tol))
    if coefficients is None:
        raise ValueError(
            f"`ridge`={ridge} is too small for `tol`={tol}: no polynomial of degree up to "
            f"{max(_DEGREES)} is that near; `ops.eigh` takes any ridge."
        )
    return coefficients


@functools.lru_cache
def _ridge_coefficients(ridge: float, tol: float) -> tuple[float, ...] | None:
    return _fewest(functools.partial(_scalar_ridge, ridge=ridge), tol, _products(max(_DEGREES)))


def _fewest(target: Target, tol: float, most: int) -> tuple[float, ...] | None:
    """The coefficients that reach `tol` in the fewest products, at most `most`; None where none do."""
    degrees = [degree for degree in _DEGREES if _products(degree) <= most]
    first = bisect.bisect_left(degrees, True, key=lambda degree: _fit(target, degree)[1] <= tol)
    if first == len(degrees):
        return None
    return tuple(float(c) for c in _fit(target, degrees[first])[0])


def products(num_iters: int, tol: float) -> int:
    """Return how many matrix products `chebyshev` takes."""
    coefficients = chebyshev_coefficients(num_iters, tol)
    return 3 * num_iters - 3 if coefficients is None else products_of(coefficients)


def products_of(coefficients: tuple[float, ...]) -> int:
    """Return how many matrix products a polynomial with these coefficients takes."""
    return _products(len(coefficients) - 1)


def _products(degree: int) -> int:
    m = _DEGREES[degree]
    return m - 1 + degree // m - 1


def check_tol(tol: float) -> None:
    """Raise unless `tol` is a positive number."""
    check_number("tol", tol, above=0)


def _scalar_iteration(x: np.ndarray, num_iters: int) -> tuple[np.ndarray, np.ndarray]:
    """The iteration on eigenvalues x of A / ||A||_F, and its derivative."""
    y, z, dy, dz = x, np.ones_like(x), np.ones_like(x), np.zeros_like(x)
    for _ in range(num_iters):
        t, dt = (3 - z * y) / 2, -(dz * y + z * dy) / 2
        y, z, dy, dz = y * t, t * z, dy * t + y * dt, dt * z + t * dz
    return z, dz


def _scalar_ridge(x: np.ndarray, ridge: float) -> tuple[np.ndarray, np.ndarray]:
    """The exact root with a ridge on eigenvalues x of A / ||A||_F, and its derivative."""
    value = (x + ridge) ** -0.5
    return value, -0.5 * value / (x + ridge)


def _fit(target: Target, degree: int) -> tuple[np.ndarray, float]:
    """Least squares, reweighted towards the largest relative error of value and slope (Lawson)."""
    theta = np.pi * (np.arange(_NODES) + 0.5) / _NODES
    value, slope = target((np.cos(theta) + 1) / 2)
    k = np.arange(degree + 1)
    basis = np.cos(np.outer(theta, k)) / value[:, None]
    slopes = 2 * k * np.sin(np.outer(theta, k)) / np.sin(theta)[:, None]
    rows = np.concatenate([basis, _DERIVATIVE_WEIGHT * slopes / slope[:, None]])
    wanted = np.concatenate([np.ones(_NODES), np.full(_NODES, _DERIVATIVE_WEIGHT)])
    weights = np.full(len(wanted), 1 / len(wanted))
    best, least = np.zeros(degree + 1), np.inf
    for _ in range(_REWEIGHTINGS):
        root = np.sqrt(weights)
        coefficients = np.linalg.lstsq(rows * root[:, None], wanted * root, rcond=None)[0]
        residual = np.abs(rows @ coefficients - wanted)
        if residual.max() < least:
            best, least = coefficients, residual.max()
        weights = weights * residual
        if not weights.sum() > 0:
            break
        weights = weights / weights.sum()
    return best, float(np.abs(basis @ best - 1).max())


def _evaluate(
    x: jax.Array, eye: jax.Array, coefficients: tuple[float, ...], precision: str
) -> jax.Array:
    """Sum c_k T_k(x) as sum_j q_j(x) T_j(T_m(x)), each q_j of degree below m, by Clenshaw over j."""
    degree = len(coefficients) - 1
    m = _DEGREES[degree]
    product = functools.partial(kept_product, precision=precision)
    rows = _split(np.asarray(coefficients), m)
    powers = [eye, x]
    for k in range(2, m + 1):  # T_(i+j) = 2 T_i T_j - T_|i-j|
        i, j = (k + 1) // 2, k // 2
        powers.append(2 * product(powers[i], powers[j]) - powers[i - j])

    def q(j: int) -> jax.Array:
        return sum(
            (float(c) * t for c, t in zip(rows[j][1:], powers[1:], strict=False)), rows[j][0] * eye
        )

    top = len(rows) - 1
    if not np.any(rows[top][1:]):  # a multiple of the identity costs no product
        above, here = rows[top][0] * eye, q(top - 1) + 2 * rows[top][0] * powers[m]
        top -= 1
        if top == 0:
            return here - rows[1][0] * powers[m]
    else:
        above, here = jnp.zeros_like(eye), q(top)
    for j in range(top - 1, 0, -1):
        above, here = here, q(j) + 2 * product(powers[m], here) - above
    return q(0) + product(powers[m], here) - above


def _split(coefficients: np.ndarray, m: int) -> np.ndarray:
    """Coefficients [j, i] of T_i T_jm, i < m, with T_(jm+i) = 2 T_jm T_i - T_(jm-i)."""
    rest = np.zeros((len(coefficients) - 1) // m * m + m)
    rest[: len(coefficients)] = coefficients
    rows = np.zeros((len(rest) // m, m))
    for k in range(len(rest) - 1, -1, -1):
        j, i = divmod(k, m)
        if j == 0 or i == 0:
            rows[j, i] = rest[k]
        else:
            rows[j, i] = 2 * rest[k]
            rest[j * m - i] -= rest[k]
    return rows
