"""Inverse square roots against NumPy, the scalar recursion on the eigenvalues, and their own laws."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.test_util import check_grads
from traced import products

from netdeconv_jax import ops

METHODS = ["newton_schulz", "eigh"]


def orthogonal(d, seed=0):
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(d, d)))[0]


def with_eigenvalues(values, seed=0):
    q = orthogonal(len(values), seed)
    a = (q * values) @ q.T
    return (a + a.T) / 2


def conditioned(d, condition, seed=0):
    return with_eigenvalues(np.geomspace(1, 1 / condition, d), seed)


def of_eigenvalues(function, a):
    """`function` of the eigenvalues of a symmetric matrix, in its eigenbasis."""
    values, vectors = np.linalg.eigh(np.asarray(a, np.float64))
    return (vectors * function(values)) @ vectors.T


def scalar_recursion(values, norm, num_iters):
    """The iteration as each eigenvalue sees it: the paper's, with every product."""
    y, z = values / norm, np.ones_like(values)
    for _ in range(num_iters):
        t = (3 - z * y) / 2
        y, z = y * t, t * z
    return z / np.sqrt(norm)


def textbook(a, num_iters):
    """The paper's loop on matrices, with every product."""
    a = np.asarray(a, np.float64)
    norm, eye = np.sqrt((a**2).sum()), np.eye(len(a))
    y, z = a / norm, eye
    for _ in range(num_iters):
        t = (3 * eye - z @ y) / 2
        y, z = y @ t, t @ z
    return z / np.sqrt(norm)


def relative_error(found, expected):
    return np.abs(np.asarray(found, np.float64) - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize("num_iters", [1, 2, 3, 5, 8, 15])
@pytest.mark.parametrize("condition", [1e1, 1e4])
def test_newton_schulz_is_the_scalar_recursion_on_the_eigenvalues(x64, condition, num_iters):
    a = conditioned(12, condition)
    norm = np.linalg.norm(a)
    expected = of_eigenvalues(lambda values: scalar_recursion(values, norm, num_iters), a)
    found = ops.newton_schulz(jnp.asarray(a), num_iters=num_iters)
    assert found.dtype == jnp.float64
    assert relative_error(found, expected) < 1e-12


@pytest.mark.parametrize(("condition", "num_iters"), [(1e1, 5), (1e3, 5), (1e5, 5), (1e1, 1)])
def test_newton_schulz_is_the_scalar_recursion_in_float32(condition, num_iters):
    a = conditioned(48, condition).astype(np.float32)
    norm = np.linalg.norm(a.astype(np.float64))
    expected = of_eigenvalues(lambda values: scalar_recursion(values, norm, num_iters), a)
    found = jax.jit(lambda a: ops.newton_schulz(a, num_iters=num_iters))(a)
    assert found.dtype == jnp.float32
    assert relative_error(found, expected) < 2e-6


@pytest.mark.parametrize("num_iters", [1, 2, 5, 10])
def test_newton_schulz_without_its_wasted_products_is_the_textbook_loop(x64, num_iters):
    a = conditioned(9, 1e2)
    found = ops.newton_schulz(jnp.asarray(a), num_iters=num_iters)
    assert relative_error(found, textbook(a, num_iters)) < 1e-13


def test_five_steps_are_the_default():
    a = jnp.asarray(conditioned(6, 1e2), jnp.float32)
    np.testing.assert_array_equal(ops.newton_schulz(a), ops.newton_schulz(a, num_iters=5))
    np.testing.assert_array_equal(ops.inverse_sqrt(a), ops.newton_schulz(a, num_iters=5))


def test_five_steps_leave_the_damping_that_the_design_states(x64):
    # DESIGN.md, section 4: eigenvalue / ||Cov||_F -> variance after whitening. The eigenvalue 1 has no
    # part in these numbers, since the norm is made of it and a little more.
    shares = np.array([0.1, 0.03, 0.01, 0.003, 0.001])
    first = np.sqrt(1 - (shares**2).sum())
    a = np.diag([first, *shares])
    d = np.asarray(ops.newton_schulz(jnp.asarray(a), num_iters=5))
    variances = np.diag(d @ a @ d)[1:]
    np.testing.assert_allclose(variances, [0.995, 0.81, 0.43, 0.16, 0.056], atol=0.006)


def test_many_steps_reach_the_exact_root(x64):
    a = conditioned(8, 1e2)
    exact = of_eigenvalues(lambda values: values**-0.5, a)
    assert relative_error(ops.newton_schulz(jnp.asarray(a), num_iters=15), exact) < 1e-10
    assert relative_error(ops.newton_schulz(jnp.asarray(a), num_iters=5), exact) > 1e-2


@pytest.mark.parametrize("num_iters", [1, 2, 5, 9])
def test_k_steps_cost_3k_minus_3_products(num_iters):
    found = products(lambda a: ops.newton_schulz(a, num_iters=num_iters), jnp.eye(4))
    assert len(found) == 3 * num_iters - 3


@pytest.mark.parametrize("method", METHODS)
def test_every_product_runs_at_highest_precision_also_in_the_derivatives(method):
    def root(a):
        return ops.inverse_sqrt(a, method=method).sum()

    for order, function in enumerate([root, jax.grad(root), jax.hessian(root)]):
        found = products(function, jnp.eye(4))
        assert len(found) >= [1, 3, 6][order]
        for eqn in found:
            assert eqn.params["precision"] == (lax.Precision.HIGHEST,) * 2, order


@pytest.mark.parametrize("condition", [1e0, 1e3, 1e6, 1e9])
def test_eigh_is_exact_in_float64(x64, condition):
    a = conditioned(10, condition)
    expected = of_eigenvalues(lambda values: values**-0.5, a)
    found = np.asarray(ops.eigh(jnp.asarray(a)))
    assert found.dtype == np.float64
    # An eigenvalue is known to rounding of the largest: the error is the condition times that.
    assert relative_error(found, expected) < max(condition, 10) * 1e-15
    assert np.abs(found @ a @ found - np.eye(10)).max() < max(condition, 10) * 1e-15


def test_eigh_is_close_in_float32():
    a = conditioned(32, 1e3).astype(np.float32)
    found = np.asarray(ops.eigh(jnp.asarray(a)), np.float64)
    assert found.dtype == np.float64
    assert np.abs(found @ a @ found - np.eye(32)).max() < 1e-3


@pytest.mark.parametrize("ridge", [1e-4, 1e-2, 1.0])
def test_the_ridge_of_eigh_is_relative_to_the_frobenius_norm(x64, ridge):
    a = 7 * conditioned(10, 1e6)
    norm = np.linalg.norm(a)
    expected = of_eigenvalues(lambda values: (values + ridge * norm) ** -0.5, a)
    assert relative_error(ops.eigh(jnp.asarray(a), ridge=ridge), expected) < 1e-11


def test_eigenvalues_below_rounding_are_raised_to_it(x64):
    a = with_eigenvalues(np.array([2.0, 1.0, 0.0]))
    largest = np.linalg.eigvalsh(np.asarray(ops.eigh(jnp.asarray(a)))).max()
    np.testing.assert_allclose(largest, (3 * np.finfo(np.float64).eps * 2) ** -0.5, rtol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_four_times_the_covariance_has_half_the_root(x64, method):
    a = jnp.asarray(conditioned(7, 1e3))
    root = ops.inverse_sqrt(a, method=method)
    for scale in (4.0, 1e8, 1e-10):
        scaled = ops.inverse_sqrt(scale * a, method=method)
        assert relative_error(scaled * np.sqrt(scale), np.asarray(root)) < 1e-12


@pytest.mark.parametrize("method", METHODS)
def test_the_root_of_a_rotated_covariance_is_the_rotated_root(x64, method):
    a, q = conditioned(7, 1e3), orthogonal(7, seed=1)
    rotated = ops.inverse_sqrt(jnp.asarray(q @ a @ q.T), method=method)
    expected = q @ np.asarray(ops.inverse_sqrt(jnp.asarray(a), method=method)) @ q.T
    assert relative_error(rotated, expected) < 1e-12


@pytest.mark.parametrize("method", METHODS)
def test_the_root_is_symmetric_and_commutes_with_the_covariance(x64, method):
    a = conditioned(7, 1e3)
    root = np.asarray(ops.inverse_sqrt(jnp.asarray(a), method=method))
    scale = np.abs(root).max()
    assert np.abs(root - root.T).max() < 1e-13 * scale
    assert np.abs(root @ a - a @ root).max() < 1e-13 * scale


@pytest.mark.parametrize("method", METHODS)
def test_a_batch_is_a_vmap_is_a_loop(x64, method):
    a = jnp.asarray([[conditioned(5, 10.0 ** (i + j), seed=i) for j in range(3)] for i in range(2)])

    @jax.jit
    def root(a):
        return ops.inverse_sqrt(a, method=method)

    batched, mapped = root(a), jax.vmap(jax.vmap(root))(a)
    assert batched.shape == (2, 3, 5, 5)
    for i in range(2):
        for j in range(3):
            expected = np.asarray(root(a[i, j]))
            assert relative_error(batched[i, j], expected) < 1e-12
            assert relative_error(mapped[i, j], expected) < 1e-12


@pytest.mark.parametrize("method", METHODS)
def test_the_gradient_of_a_batch_is_that_of_each(x64, method):
    a = jnp.asarray([conditioned(4, 10.0, seed=i) for i in range(3)])
    weights = jnp.asarray(np.random.default_rng(0).normal(size=(4, 4)))

    def value(a):
        return jnp.einsum("...ij,ij->", ops.inverse_sqrt(a, method=method), weights)

    gradient = jax.jit(jax.grad(value))
    expected = np.stack([gradient(part) for part in a])
    together = gradient(a)
    assert relative_error(together, expected) < 1e-12


@pytest.mark.parametrize("method", METHODS)
def test_jit_changes_nothing(method):
    a = jnp.asarray(conditioned(6, 1e2), jnp.float32)
    root = jax.jit(lambda a: ops.inverse_sqrt(a, method=method))
    assert relative_error(root(a), np.asarray(ops.inverse_sqrt(a, method=method))) < 1e-5


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_computed_and_returned_in_float32(method, dtype):
    a = jnp.asarray(conditioned(4, 10.0), dtype)
    found = ops.inverse_sqrt(a, method=method)
    assert found.dtype == jnp.float32
    expected = ops.inverse_sqrt(a.astype(jnp.float32), method=method)
    np.testing.assert_array_equal(found, expected)


@functools.cache
def on_symmetric(method, **options):
    """A root as a function of all matrices, since `check_grads` steps off the symmetric ones.

    Cached for the compilations, which are most of the time of these tests.
    """
    return jax.jit(lambda b: getattr(ops, method)((b + b.T) / 2, **options))


@pytest.mark.parametrize(
    ("method", "options", "a"),
    [
        # The derivative of an eigendecomposition is infinite wherever eigenvalues repeat.
        ("eigh", {}, with_eigenvalues(np.array([2.0, 1.0, 0.5, 0.1]))),
        ("eigh", {}, np.eye(4)),
        ("eigh", {}, np.diag([2.0, 2.0, 0.3, 0.3])),
        ("eigh", {}, with_eigenvalues(np.array([2.0, 2.0, 0.3, 0.3]))),
        ("eigh", {}, with_eigenvalues(np.array([2.0, 2.0 + 1e-9, 0.5, 0.3]))),
        ("eigh", {"ridge": 0.05}, with_eigenvalues(np.array([2.0, 1.0, 0.0, 0.0]))),
        ("eigh", {"ridge": 0.05}, np.ones((4, 4))),
        ("newton_schulz", {"num_iters": 3}, with_eigenvalues(np.array([2.0, 1.0, 0.5, 0.1]))),
        ("newton_schulz", {"num_iters": 3}, np.eye(4)),
        ("newton_schulz", {"num_iters": 3}, with_eigenvalues(np.array([2.0, 1.0, 0.0, 0.0]))),
        ("newton_schulz", {"num_iters": 3}, np.ones((4, 4))),
    ],
)
def test_derivatives_to_second_order_forward_and_reverse(x64, method, options, a):
    function = on_symmetric(method, **options)
    check_grads(function, (jnp.asarray(a),), order=2, modes=("fwd", "rev"), eps=1e-5, rtol=1e-4)


def test_the_derivative_of_eigh_is_that_of_many_newton_schulz_steps(x64):
    # At repeated eigenvalues, where the derivative of an eigendecomposition is infinite.
    a = jnp.asarray(with_eigenvalues(np.array([2.0, 2.0, 0.3, 0.3])))
    weights = jnp.asarray(np.random.default_rng(0).normal(size=(4, 4)))
    weights = weights + weights.T
    exact = jax.grad(lambda a: (ops.eigh(a) * weights).sum())(a)
    iterated = jax.grad(lambda a: (ops.newton_schulz(a, num_iters=20) * weights).sum())(a)
    assert relative_error(exact, np.asarray(iterated)) < 1e-10


HOSTILE = {
    "all zeros": np.zeros((5, 5)),
    "rank one": np.ones((5, 5)),
    "one zero row": np.diag([1.0, 1.0, 1.0, 1.0, 0.0]),
    "1e8": 1e8 * conditioned(5, 1e2),
    "1e-12": 1e-12 * conditioned(5, 1e2),
    "1e20": 1e20 * conditioned(5, 1e2),
    "1e8 beside 1e-8": np.diag([1e8, 1.0, 1.0, 1e-4, 1e-8]),
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("method", METHODS)
def test_hostile_covariances_have_finite_roots_and_gradients_in_float32(method, name):
    a = jnp.asarray(HOSTILE[name], jnp.float32)
    weights = jnp.asarray(np.random.default_rng(0).normal(size=(5, 5)), jnp.float32)

    @jax.jit
    def both(a):
        root, pullback = jax.vjp(lambda a: ops.inverse_sqrt(a, method=method), a)
        return root, pullback(weights)[0]

    root, gradient = both(a)
    assert np.isfinite(root).all()
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("scale", [1e8, 1e-12, 1e20])
@pytest.mark.parametrize("method", METHODS)
def test_extreme_scales_lose_no_digits_in_float32(method, scale):
    a = jnp.asarray(conditioned(5, 1e2), jnp.float32)
    plain = np.asarray(ops.inverse_sqrt(a, method=method), np.float64)
    scaled = np.asarray(ops.inverse_sqrt(scale * a, method=method), np.float64)
    assert relative_error(scaled * np.sqrt(scale), plain) < 1e-4


@pytest.mark.parametrize("num_iters", [1, 5])
def test_the_root_of_zeros_is_that_of_the_iteration_without_products(num_iters):
    found = ops.newton_schulz(jnp.zeros((3, 3)), num_iters=num_iters)
    np.testing.assert_array_equal(found, 1.5**num_iters * np.eye(3, dtype=np.float32))


def test_one_by_one_is_the_reciprocal_square_root():
    a = jnp.full((1, 1), 16.0)
    np.testing.assert_allclose(ops.newton_schulz(a), [[0.25]], rtol=1e-6)
    np.testing.assert_allclose(ops.eigh(a), [[0.25]], rtol=1e-6)


EYE = jnp.eye(2)
NOT_AN_INT: Any = 2.0


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: ops.inverse_sqrt(EYE, method="cholesky"), ValueError, ["`method`", "cholesky"]),
        (lambda: ops.inverse_sqrt(EYE, num_iters=0), ValueError, ["`num_iters`", "0"]),
        (lambda: ops.newton_schulz(EYE, num_iters=-1), ValueError, ["`num_iters`", "-1"]),
        (lambda: ops.newton_schulz(EYE, num_iters=NOT_AN_INT), TypeError, ["`num_iters`", "2.0"]),
        (lambda: ops.newton_schulz(EYE, num_iters=True), TypeError, ["`num_iters`", "True"]),
        (lambda: ops.newton_schulz(jnp.ones((2, 3))), ValueError, ["`cov`", "(2, 3)"]),
        (lambda: ops.newton_schulz(jnp.ones(3)), ValueError, ["`cov`", "(3,)"]),
        (lambda: ops.eigh(jnp.ones((0, 0))), ValueError, ["`cov`", "(0, 0)"]),
        (lambda: ops.eigh(jnp.ones((4, 2, 3))), ValueError, ["`cov`", "(4, 2, 3)"]),
        (lambda: ops.eigh(jnp.eye(2, dtype=int)), TypeError, ["`cov`", "int32"]),
        (lambda: ops.newton_schulz(jnp.eye(2, dtype=int)), TypeError, ["`cov`", "int32"]),
        (lambda: ops.eigh(EYE, ridge=-0.5), ValueError, ["`ridge`", "-0.5"]),
        (lambda: ops.eigh(EYE, ridge=float("nan")), ValueError, ["`ridge`", "nan"]),
    ],
)
def test_bad_input_names_the_argument_and_its_value(call, error, words):
    with pytest.raises(error) as raised:
        call()
    for word in words:
        assert word in str(raised.value)
