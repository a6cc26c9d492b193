"""Moments in one pass about a shift: the function of the two-pass form, in one product and one reduction."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads
from nnx_twins import compare
from traced import primitives

import netdeconv_jax
from netdeconv_jax import DeconvConv, DeconvConvTranspose, DeconvDense, WhiteningSpec, ops
from netdeconv_jax import nnx as dnnx

SHAPE = (8, 7, 6, 4)
CASES = {
    "3x3": ((3, 3), {"block_size": 2}),
    "3x3, own groups": ((3, 3), {"block_size": 2, "shared": False, "kind": "contiguous"}),
    "3x3, feature groups": ((3, 3), {"block_size": 4, "feature_group_count": 2}),
    "1x1": ((1, 1), {"block_size": 2}),
}


def normal(shape, seed=0, dtype=jnp.float64):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def case(name):
    kernel, options = CASES[name]
    return ops.window(kernel), ops.column_groups(4, kernel[0] * kernel[1], **options)


def mask_of(masked):
    if not masked:
        return None
    return jnp.abs(normal((8, 7, 6, 1), 3)).at[0].set(0).at[1, :3].set(0)


@pytest.mark.parametrize(
    ("name", "masked"),
    [
        pytest.param(name, masked, marks=pytest.mark.slow if masked and name != "3x3" else ())
        for name in CASES
        for masked in (False, True)
    ],
)
def test_value_and_gradients_are_those_of_two_passes(x64, name, masked):
    geometry, groups = case(name)
    x, mask = normal(SHAPE) + 2, mask_of(masked)
    weights = {"mean": normal(groups.mean_shape, 1), "cov": normal(groups.mean_shape, 2)}

    def value(x, mask, shift):
        found = ops.patch_moments(x, geometry, groups, sampling_stride=2, mask=mask, shift=shift)
        cov = jnp.einsum("...i,...ij,...j", weights["cov"], found.cov, weights["cov"])
        return jnp.vdot(found.mean, weights["mean"]) + cov.sum(), found

    arguments = (0,) if mask is None else (0, 1)
    differentiate = jax.jit(jax.grad(value, argnums=arguments, has_aux=True))
    expected = differentiate(x, mask, None)
    for seed in range(3):  # whatever the shift
        shift = 2 + seed * normal(groups.mean_shape, seed)
        ours = differentiate(x, mask, shift)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9), ours, expected
        )
    assert not jax.grad(lambda s: value(x, mask, s)[0])(2 + normal(groups.mean_shape)).any()
    check_grads(lambda x: value(x, mask, shift)[0], (x,), order=2)


# In float32, relative to the covariance's norm. Deviations that the shift is off, and the error allowed.
@pytest.mark.parametrize("mean", [0, 3, 30, 300])
@pytest.mark.parametrize(("off", "error"), [(0, 5e-7), (1, 5e-6), (10, 5e-4)])
def test_the_error_grows_with_what_the_shift_misses_and_not_with_the_mean(mean, off, error):
    x = np.random.default_rng(0).normal(size=(4000, 20)) @ np.random.default_rng(1).normal(
        size=(20, 20)
    )
    deviations = x.std(0)
    x = np.float32(x + mean * deviations)
    window, groups = ops.window((1, 1)), ops.column_groups(20, 1, 64)
    shift = np.float32(x.mean(0, dtype=np.float64) + off * deviations)
    found = ops.patch_moments(
        jnp.asarray(x)[:, None, None], window, groups, shift=jnp.asarray(shift)
    )
    expected = np.cov(x.T.astype(np.float64), bias=True)
    assert np.linalg.norm(found.cov - expected) < error * np.linalg.norm(expected)
    # The mean itself is rounded to what float32 holds.
    slack = error * deviations + 4e-7 * np.abs(x).max()
    assert np.all(np.abs(found.mean - x.mean(0, dtype=np.float64)) < slack)


def test_what_is_masked_out_may_be_anything_and_nothing_at_all_has_the_moments_of_none():
    geometry, groups = case("3x3")
    x, shift = normal(SHAPE, dtype=jnp.float32), jnp.ones(groups.mean_shape)
    mask = jnp.ones((8, 1, 1, 1)).at[3].set(0)
    found, expected = (
        ops.patch_moments(x.at[3].set(filling), geometry, groups, mask=mask, shift=shift)
        for filling in (jnp.nan, 0)
    )
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    nothing = ops.patch_moments(x, geometry, groups, mask=0 * mask, shift=shift)
    assert nothing.count == 0
    assert not nothing.cov.any()
    merged = found.merge(nothing)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), merged, found)


def reductions(function, *args):
    """How many reductions over devices there are."""
    found = primitives(function, *args)
    return sum(count for name, count in found.items() if name.startswith("psum"))


@pytest.mark.parametrize("name", CASES)
def test_devices_exchange_once_and_agree_with_one(name):
    geometry, groups = case(name)
    x, shift = normal(SHAPE, dtype=jnp.float32) + 2, jnp.full(groups.mean_shape, 1.5)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))

    def pooled(x, shift):
        return ops.patch_moments(x, geometry, groups, shift=shift, axis_name="data")

    mapped = jax.shard_map(pooled, mesh=mesh, in_specs=(P("data"), P()), out_specs=P())
    assert reductions(mapped, x, shift) == 1
    assert reductions(lambda x: mapped(x, None), x) > 1
    expected = ops.patch_moments(x, geometry, groups)
    for found in (jax.jit(mapped)(x, shift), ops.patch_moments(x, geometry, groups, shift=shift)):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-5), found, expected
        )


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_a_sharded_batch_under_jit_is_reduced_once(axis_type):
    geometry, groups = case("3x3")
    mesh = jax.make_mesh((8,), ("data",), axis_types=(axis_type,))
    x = jax.device_put(normal(SHAPE, dtype=jnp.float32), NamedSharding(mesh, P("data")))
    shift = jax.device_put(jnp.full(groups.mean_shape, 0.5), NamedSharding(mesh, P()))

    def compiled(*shift):
        def found(x, *shift):
            return ops.patch_moments(x, geometry, groups, shift=shift[0] if shift else None)

        return jax.jit(found).lower(x, *shift).compile()

    counts = [
        len(re.findall(r" all-reduce(?:-start)?\(", program.as_text() or ""))
        for program in (compiled(shift), compiled())
    ]
    assert counts == [1, 2]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5),
        compiled(shift)(x, shift),
        compiled()(x),
    )


ONE_PASS = WhiteningSpec(one_pass=True)


@pytest.mark.parametrize(
    "make",
    [
        lambda spec: DeconvConv(5, (3, 3), spec=spec, block_size=2, param_dtype=jnp.float64),
        lambda spec: DeconvConv(5, (3, 3), spec=spec, whiten="channels", param_dtype=jnp.float64),
        lambda spec: DeconvConvTranspose(5, (3, 3), 2, spec=spec, param_dtype=jnp.float64),
        lambda spec: DeconvDense(5, spec=spec, block_size=4, param_dtype=jnp.float64),
    ],
)
def test_a_layer_trains_as_with_two_passes(x64, make):
    x, mask = normal(SHAPE) + 1, mask_of(True)

    def run(spec):
        layer, results = make(spec), []
        variables = layer.init(jax.random.key(0), x, True)
        for scale in (1, 2, 3):

            def loss(params, scale=scale, variables=variables, layer=layer):
                given = {**variables, "params": params}
                y, updates = layer.apply(
                    given, scale * x, False, mask=mask, mutable=["batch_stats"]
                )
                return jnp.sum(jnp.sin(y)), (y, updates)

            grads, (y, updates) = jax.grad(loss, has_aux=True)(variables["params"])
            variables = {**variables, **updates}
            results.append((y, grads, updates))
        return results

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-9),
        run(ONE_PASS),
        run(WhiteningSpec()),
    )


def test_nnx_is_linen_array_for_array():
    layer = dnnx.DeconvConv(4, 6, (3, 3), spec=ONE_PASS, block_size=2, rngs=nnx.Rngs(0))
    twin = netdeconv_jax.DeconvConv(6, (3, 3), spec=ONE_PASS, block_size=2)
    compare(layer, twin, normal(SHAPE, dtype=jnp.float32) + 1, jnp.ones((8, 1, 1, 1)).at[0].set(0))


def test_the_setting_is_a_bool_and_off_by_default():
    assert not WhiteningSpec().one_pass
    assert not WhiteningSpec.fast().one_pass
    with pytest.raises(TypeError, match="`one_pass` must be True or False, got 1"):
        WhiteningSpec(one_pass=1)  # pyright: ignore[reportArgumentType]
