"""The product of samples with themselves: NumPy's values, the plain product's derivatives, at less cost."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend.core import jaxprs_in_params
from jax.test_util import check_grads

from netdeconv_jax import ops
from netdeconv_jax.ops.gram import gram

SHAPE, AXES = (
    (3, 2, 5, 4),
    (0, 2),
)  # samples along two axes; one set of them for each place on the other


def normal(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def weights_of(kind):
    shape = {"none": None, "full": (*SHAPE[:-1], 1), "shared": (3, 1, 1, 1)}[kind]
    return None if shape is None else np.abs(normal(shape, 1))


def plain(x, weights, axes=AXES):
    """What `gram` is, as a product that JAX differentiates by itself."""
    assert axes == AXES
    weighted = x if weights is None else x * weights
    return jnp.einsum("abcd,abce->bde", weighted, x, precision="highest")


def dots(function, *args):
    def found(jaxpr):
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == "dot_general":
                yield eqn.params["precision"]
            for inner in jaxprs_in_params(eqn.params):
                yield from found(inner)

    return list(found(jax.make_jaxpr(function)(*args).jaxpr))


@pytest.mark.parametrize("kind", ["none", "full", "shared"])
def test_the_value_is_numpys(x64, kind):
    x, weights = normal(SHAPE), weights_of(kind)
    ones = np.ones((*SHAPE[:-1], 1)) if weights is None else weights
    expected = np.einsum("abcd,abce->bde", x * ones, x)
    given = None if weights is None else jnp.asarray(weights)
    np.testing.assert_allclose(gram(jnp.asarray(x), given, AXES), expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("kind", ["none", "full"])
def test_derivatives_to_second_order_forward_and_reverse(x64, kind):
    x, weights = jnp.asarray(normal(SHAPE)), weights_of(kind)
    if weights is None:
        check_grads(lambda x: gram(x, None, AXES), (x,), order=2, modes=("fwd", "rev"))
    else:
        both = (x, jnp.asarray(weights))
        check_grads(lambda x, w: gram(x, w, AXES), both, order=2, modes=("fwd", "rev"))


@pytest.mark.parametrize("kind", ["none", "full"])
@pytest.mark.parametrize("order", [1, 2])
def test_gradients_are_those_of_the_plain_product_under_jit_and_vmap(x64, kind, order):
    x, weights = jnp.asarray(normal((2, *SHAPE))), weights_of(kind)
    weights = None if weights is None else jnp.asarray(weights)
    cotangent = jnp.asarray(normal((2, 4, 4), 3))  # not symmetric: no consumer need be

    def gradient(product):
        def value(x):
            return (jnp.sin(product(x, weights, AXES)) * cotangent).sum()

        if order == 1:
            return jax.grad(value)
        return jax.grad(lambda x: (jax.grad(value)(x) ** 3).sum())

    ours = jax.jit(jax.vmap(gradient(gram)))(x)
    expected = jax.vmap(gradient(plain))(x)
    np.testing.assert_allclose(ours, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("kind", ["none", "full"])
def test_only_what_is_differentiated_costs_a_product(kind):
    x, weights = jnp.asarray(normal(SHAPE), jnp.float32), weights_of(kind)
    weights = None if weights is None else jnp.asarray(weights, jnp.float32)

    def value(x, weights):
        return gram(x, weights, AXES).sum()

    assert len(dots(value, x, weights)) == 1
    assert len(dots(jax.grad(value), x, weights)) == 2
    assert len(dots(jax.grad(lambda x: plain(x, weights).sum()), x)) == 3
    if kind == "full":
        assert len(dots(jax.grad(value, argnums=1), x, weights)) == 2
        assert len(dots(jax.grad(value, argnums=(0, 1)), x, weights)) == 3


def test_the_moments_of_a_batch_and_their_gradient_are_two_products_at_highest_precision():
    x = jnp.asarray(normal((6, 5)), jnp.float32)

    def value(x):
        return ops.moments(x).cov.sum()

    assert dots(jax.grad(value), x) == [(lax.Precision.HIGHEST,) * 2] * 2
    mask = jnp.ones((6,))
    found = dots(jax.grad(lambda x: ops.moments(x, mask).cov.sum()), x)
    assert found == [(lax.Precision.HIGHEST,) * 2] * 2


@pytest.mark.parametrize("shape", [(10, 0, 3), (10, 4, 0), (10, 1, 0), (10, 0)])
def test_no_matrices_and_no_variables_are_no_mistake(shape):
    cov = ops.moments(jnp.zeros(shape), axes=(0,)).cov
    assert cov.shape == (*shape[1:], shape[-1])
