"""Covariance, root and folding run at HIGHEST precision, forward and backward, whatever the layer's own."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend.core import jaxprs_in_params

from netdeconv_jax import ChannelDeconv, DeconvConv, DeconvDense, WhiteningSpec

HIGHEST = (lax.Precision.HIGHEST,) * 2
LOW = [None, "default", "bfloat16", lax.Precision.DEFAULT]


def products(function, *args):
    """The precisions of all products of matrices, and of all convolutions, inner functions included."""
    found = collections.defaultdict(list)

    def collect(jaxpr):
        for eqn in jaxpr.eqns:
            if eqn.primitive.name in ("dot_general", "conv_general_dilated"):
                found[eqn.primitive.name].append(eqn.params["precision"])
            for inner in jaxprs_in_params(eqn.params):
                collect(inner)

    collect(jax.make_jaxpr(function)(*args).jaxpr)
    return found["dot_general"], found["conv_general_dilated"]


def normal(shape, dtype):
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), dtype)


def value_and_gradients(layer, x):
    """A training step of one layer, as a function of parameters and input."""
    variables = layer.init(jax.random.key(0), x, use_running_average=False)
    stats = variables["batch_stats"]

    def loss(params, x):
        variables = {"params": params, "batch_stats": stats}
        y, updates = layer.apply(variables, x, use_running_average=False, mutable=["batch_stats"])
        return y.astype(jnp.float32).sum(), updates

    step = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    return step, variables.get("params", {})


# Forward, then backward: the covariance, the root, the folded kernel and its bias.
COVARIANCE, FOLD = 1 + 1, 2 + 2 * 2
ROOTS = {"newton_schulz": 12 + 24, "chebyshev": 6 + 12, "eigh": 1 + 10}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("precision", LOW)
def test_a_convolutions_statistics_are_highest_in_value_and_gradient(precision, dtype):
    x = normal((4, 6, 6, 8), dtype)
    step, params = value_and_gradients(
        DeconvConv(4, (3, 3), block_size=4, precision=precision, dtype=dtype), x
    )
    dots, convolutions = products(step, params, x)
    assert len(dots) == COVARIANCE + ROOTS["newton_schulz"] + FOLD
    assert set(dots) == {HIGHEST}
    assert len(convolutions) == 3
    assert HIGHEST not in convolutions


@pytest.mark.parametrize("method", ROOTS)
@pytest.mark.parametrize("whiten", ["patches", "channels"])
def test_every_root_is_highest_in_value_and_gradient(method, whiten):
    x = normal((4, 6, 6, 8), jnp.float32)
    layer = DeconvConv(4, (3, 3), method=method, whiten=whiten, precision="default")
    step, params = value_and_gradients(layer, x)
    dots, _ = products(step, params, x)
    assert len(dots) >= COVARIANCE + ROOTS[method] - 4 + FOLD
    assert set(dots) == {HIGHEST}


def test_the_fast_spec_and_a_mask_change_nothing_about_it():
    x = normal((8, 12, 12, 32), jnp.bfloat16)
    layer = DeconvConv(4, (3, 3), spec=WhiteningSpec.fast(), precision="default", dtype=x.dtype)
    variables = layer.init(jax.random.key(0), x, use_running_average=False)
    mask = jnp.ones((8, 1, 1, 1))

    def loss(params):
        y, _ = layer.apply(
            {**variables, "params": params},
            x,
            use_running_average=False,
            mask=mask,
            mutable=["batch_stats"],
        )
        return y.sum()

    dots, _ = products(jax.grad(loss), variables["params"])
    assert dots
    assert set(dots) == {HIGHEST}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_of_a_dense_layers_products_only_its_own_have_its_precision(dtype):
    x = normal((16, 8), dtype)
    step, params = value_and_gradients(DeconvDense(4, precision="default", dtype=dtype), x)
    dots, _ = products(step, params, x)
    low = [precision for precision in dots if precision != HIGHEST]
    assert (
        low == [(lax.Precision.DEFAULT,) * 2] * 3
    )  # y, the gradient of the kernel, that of the input
    assert len(dots) - 3 == COVARIANCE + ROOTS["newton_schulz"] + FOLD


def test_channel_deconvolution_is_highest_altogether():
    x = normal((4, 6, 6, 8), jnp.bfloat16)
    step, params = value_and_gradients(ChannelDeconv(block_size=4), x)
    dots, _ = products(step, params, x)
    assert len(dots) >= COVARIANCE + ROOTS["newton_schulz"] + 3
    assert set(dots) == {HIGHEST}
