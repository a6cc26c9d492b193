"""The polynomial form of the iteration: the same function of the eigenvalues, with fewer products."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from netdeconv_jax import ops
from netdeconv_jax.ops.polynomial import chebyshev_coefficients
from netdeconv_jax.whitening import ChebyshevRidge


def scalar_recursion(x, num_iters):
    """The iteration on one eigenvalue of A / ||A||_F, written out."""
    y, z = x, np.ones_like(x)
    for _ in range(num_iters):
        t = (3 - z * y) / 2
        y, z = y * t, t * z
    return z


def covariance(condition, d=24, seed=0):
    rng = np.random.default_rng(seed)
    vectors, _ = np.linalg.qr(rng.standard_normal((d, d)))
    values = np.logspace(0, -np.log10(condition), d)
    return vectors, values, (vectors * values) @ vectors.T


def products(function, a):
    def count(jaxpr):
        own = sum(e.primitive.name == "dot_general" for e in jaxpr.eqns)
        return own + sum(count(j) for e in jaxpr.eqns for j in jaxprs_in_params(e.params))

    return count(jax.make_jaxpr(function)(a).jaxpr)


@pytest.mark.parametrize("condition", [1e1, 1e3, 1e5])
@pytest.mark.parametrize(("num_iters", "tol"), [(2, 1e-6), (3, 1e-4), (5, 1e-2), (5, 1e-4)])
def test_every_eigenvalue_moves_as_in_the_iteration_to_the_tolerance(num_iters, tol, condition):
    vectors, values, a = covariance(condition)
    with jax.enable_x64():
        ours = np.asarray(ops.chebyshev(jnp.asarray(a), num_iters=num_iters, tol=tol))
    norm = np.linalg.norm(values)
    expected = scalar_recursion(values / norm, num_iters) / np.sqrt(norm)
    in_eigenbasis = vectors.T @ ours @ vectors
    np.testing.assert_allclose(np.diag(in_eigenbasis), expected, rtol=tol)
    off_diagonal = in_eigenbasis - np.diag(np.diag(in_eigenbasis))
    assert np.abs(off_diagonal).max() < 1e-13 * expected.max() * len(values)


@pytest.mark.parametrize("condition", [1e1, 1e3, 1e5])
def test_the_default_is_the_papers_function_to_1e_4_and_its_gradient_to_4e_3(condition):
    _, _, a = covariance(condition)
    direction = np.random.default_rng(1).standard_normal(a.shape)

    def value_and_gradient(root):
        return jax.value_and_grad(lambda a: jnp.vdot(root(a), direction))(jnp.asarray(a))

    with jax.enable_x64():
        value, gradient = value_and_gradient(ops.chebyshev)
        expected_value, expected = value_and_gradient(ops.newton_schulz)
        scale = jnp.linalg.norm(ops.newton_schulz(jnp.asarray(a))) * np.linalg.norm(direction)
        assert abs(value - expected_value) < 1e-4 * scale
        assert jnp.linalg.norm(gradient - expected) < 4e-3 * jnp.linalg.norm(expected)


def test_five_steps_take_six_products_where_the_iteration_takes_twelve():
    _, _, a = covariance(1e3)
    assert products(ops.chebyshev, a) == 6
    assert products(ops.newton_schulz, a) == 12


@pytest.mark.parametrize(
    ("num_iters", "tol", "expected"), [(2, 1e-3, 2), (3, 1e-3, 3), (5, 2e-3, 5), (5, 1e-6, 8)]
)
def test_the_fewest_products_that_reach_the_tolerance_are_taken(num_iters, tol, expected):
    _, _, a = covariance(1e3)
    root = lambda a: ops.chebyshev(a, num_iters=num_iters, tol=tol)  # noqa: E731
    assert products(root, a) == expected


@pytest.mark.parametrize("num_iters", [1, 15])
def test_where_no_polynomial_is_cheaper_the_iteration_runs(num_iters):
    _, _, a = covariance(1e3)
    assert chebyshev_coefficients(num_iters, 1e-4) is None
    np.testing.assert_array_equal(
        ops.chebyshev(jnp.asarray(a, jnp.float32), num_iters=num_iters),
        ops.newton_schulz(jnp.asarray(a, jnp.float32), num_iters=num_iters),
    )


def test_float32_keeps_the_tolerance_and_batches_agree_with_single_matrices():
    stack = jnp.stack([jnp.asarray(covariance(c, seed=int(c))[2], jnp.float32) for c in (1e1, 1e5)])
    together = ops.chebyshev(stack)
    for one, a in zip(together, stack, strict=True):
        np.testing.assert_allclose(one, ops.chebyshev(a), rtol=0, atol=1e-5 * np.abs(one).max())
        expected = ops.newton_schulz(a)
        assert jnp.linalg.norm(one - expected) < 1.1e-4 * jnp.linalg.norm(expected)


def test_degenerate_matrices_give_finite_values_and_gradients():
    for a in (jnp.zeros((4, 4)), jnp.ones((4, 4)), 1e8 * jnp.eye(4), 1e-12 * jnp.eye(4)):
        value, gradient = jax.value_and_grad(lambda a: ops.chebyshev(a).sum())(a)
        assert np.isfinite(value)
        assert np.isfinite(gradient).all()


def test_a_tolerance_that_is_not_positive_is_refused():
    with pytest.raises(ValueError, match=r"`tol` must be greater than 0, got 0"):
        ops.chebyshev(jnp.eye(2), tol=0.0)


@pytest.mark.parametrize("num_iters", [5.0, [5], jnp.int32(5)])
def test_a_number_of_steps_that_is_no_int_is_refused_whatever_ran_before(num_iters):
    ops.chebyshev(jnp.eye(2), num_iters=5)
    with pytest.raises(TypeError, match="`num_iters` must be a static int"):
        ops.chebyshev(jnp.eye(2), num_iters=num_iters)


@pytest.mark.parametrize("condition", [1e1, 1e3, 1e5])
@pytest.mark.parametrize(
    ("ridge", "tol", "expected"), [(3e-2, 1e-2, 5), (1e-2, 1e-3, 9), (3e-3, 1e-3, 13)]
)
def test_the_root_with_a_ridge_is_the_exact_one_to_the_tolerance(ridge, tol, expected, condition):
    vectors, values, a = covariance(condition)
    root = lambda a: ops.chebyshev_ridge(a, ridge=ridge, tol=tol)  # noqa: E731
    with jax.enable_x64():
        ours = np.asarray(root(jnp.asarray(a)))
    in_eigenbasis = vectors.T @ ours @ vectors
    exact = (values + ridge * np.linalg.norm(values)) ** -0.5
    np.testing.assert_allclose(np.diag(in_eigenbasis), exact, rtol=tol)
    off_diagonal = in_eigenbasis - np.diag(np.diag(in_eigenbasis))
    assert np.abs(off_diagonal).max() < 1e-12 * exact.max() * len(values)
    assert products(root, a) == expected == ChebyshevRidge(ridge, tol).products


def test_the_gradient_of_the_root_with_a_ridge_is_that_of_the_exact_one():
    _, _, a = covariance(1e5)
    direction = np.random.default_rng(1).standard_normal(a.shape)

    def gradient(root):
        return jax.grad(lambda a: jnp.vdot(root(a, ridge=1e-2), direction))(jnp.asarray(a))

    with jax.enable_x64():
        ours = gradient(functools.partial(ops.chebyshev_ridge, tol=1e-4))
        exact = gradient(ops.eigh)
        assert jnp.linalg.norm(ours - exact) < 5e-3 * jnp.linalg.norm(exact)


def test_float32_bears_the_longest_polynomial():
    a = jnp.asarray(covariance(1e5, d=200)[2], jnp.float32)
    ours = ops.chebyshev_ridge(a, ridge=2e-3, tol=1e-4)
    expected = ops.eigh(a, ridge=2e-3)
    assert jnp.linalg.norm(ours - expected) < 3e-4 * jnp.linalg.norm(expected)


@pytest.mark.parametrize(
    ("ridge", "tol", "message"),
    [
        (0.0, 1e-3, "`ridge` must be greater than 0, got 0.0"),
        (float("nan"), 1e-3, "`ridge` must be greater than 0, got nan"),
        (1e-4, 1e-3, "`ridge`=0.0001 is too small for `tol`=0.001"),
        (1e-2, 0.0, "`tol` must be greater than 0, got 0.0"),
    ],
)
def test_a_ridge_that_no_polynomial_reaches_is_refused(ridge, tol, message):
    for make in (
        lambda: ops.chebyshev_ridge(jnp.eye(2), ridge=ridge, tol=tol),
        lambda: ChebyshevRidge(ridge, tol),
    ):
        with pytest.raises(ValueError, match=message):
            make()
