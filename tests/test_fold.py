"""Whitening folded into the kernel, against whitening the patch matrix and multiplying."""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import numpy_oracle as oracle
import pytest
from jax import lax
from jax.test_util import check_grads
from traced import products

from netdeconv_jax import ops

BATCH, FEATURES = 2, 12


def case(
    spatial=(4, 5),
    kernel_size=(3, 3),
    channels=4,
    *,
    block_size=64,
    kind="interleaved",
    shared=True,
    feature_groups=1,
    whiten="patches",
    bias=True,
    strides=None,
):
    return locals()


CASES = {
    "one group": case(),
    "no bias": case(bias=False),
    "two groups": case(block_size=2),
    "three groups of four": case(channels=12, block_size=4, kernel_size=(2, 3)),
    "blocks of one": case(channels=3, block_size=1),
    "contiguous": case(block_size=2, kind="contiguous"),
    "three groups of four, contiguous": case(channels=12, block_size=4, kind="contiguous"),
    "per group": case(block_size=2, shared=False),
    "contiguous per group": case(channels=6, block_size=2, kind="contiguous", shared=False),
    "per group, no bias": case(block_size=2, shared=False, bias=False),
    "two feature groups": case(feature_groups=2),
    "three feature groups, contiguous": case(channels=6, feature_groups=3, kind="contiguous"),
    "depthwise": case(feature_groups=4),
    "depthwise, no bias": case(feature_groups=4, bias=False),
    "channels": case(whiten="channels"),
    "channels in two groups": case(whiten="channels", block_size=2),
    "channels, contiguous": case(whiten="channels", block_size=2, kind="contiguous"),
    "channels per group": case(whiten="channels", block_size=2, shared=False),
    "channels of two feature groups": case(whiten="channels", feature_groups=2),
    "1x1": case(kernel_size=(1, 1)),
    "1x1 in two groups": case(kernel_size=(1, 1), block_size=2),
    "1x1 in two groups, contiguous": case(kernel_size=(1, 1), block_size=2, kind="contiguous"),
    "strides": case(strides=(2, 3), block_size=2),
    "1d": case((7,), (3,), block_size=2),
    "1d channels": case((7,), (3,), block_size=2, whiten="channels"),
    "3d": case((3, 2, 3), (3, 2, 2), block_size=2),
    "3d depthwise": case((3, 2, 3), (2, 1, 2), feature_groups=4),
}


def groups_of(case):
    """Ours, and the oracle's as column numbers of the whole patch."""
    taps = int(np.prod(case["kernel_size"]))
    own_taps = taps if case["whiten"] == "patches" else 1
    ours = ops.column_groups(
        case["channels"],
        own_taps,
        case["block_size"],
        kind=case["kind"],
        shared=case["shared"],
        feature_group_count=case["feature_groups"],
    )
    theirs = oracle.group_columns(
        case["channels"], own_taps, case["block_size"], case["kind"], case["feature_groups"]
    )
    return ours, theirs, taps


def statistics(groups, seed=0):
    """A mean and a whitener that no symmetry saves from a wrong index: not even that of a real one."""
    rng = np.random.default_rng(seed)
    mean = 1 + rng.normal(size=(*groups.stat_shape, groups.width))
    whitener = rng.normal(size=(*groups.stat_shape, groups.width, groups.width))
    return mean, whitener


def explicitly(x, kernel, bias, mean, whitener, groups, taps, case):
    """(X - mu) D w + b on the patch matrix, group by group and feature group by feature group."""
    ndim, channels = len(case["spatial"]), case["channels"]
    geometry = oracle.Geometry(case["kernel_size"], case["strides"] or (1,) * ndim)
    patches = oracle.columns(oracle.patches(x, geometry), ndim)
    out = patches.shape[:-1]
    rows = patches.reshape(-1, channels * taps)
    if case["whiten"] == "patches":
        rows = oracle.whitened(rows, groups, mean, whitener, case["shared"])
    else:
        for tap in range(taps):  # one whitener for the channels under every tap
            columns = [channel * taps + tap for channel in range(channels)]
            rows[:, columns] = oracle.whitened(
                rows[:, columns], groups, mean, whitener, case["shared"]
            )
    per_group, features = channels // case["feature_groups"] * taps, kernel.shape[-1]
    y = np.zeros((len(rows), features))
    for f in range(features):
        group = f // (features // case["feature_groups"])
        w = np.moveaxis(kernel[..., f], -1, 0).reshape(-1)  # (channel, tap)
        y[:, f] = rows[:, group * per_group : (group + 1) * per_group] @ w
    return (y + (0 if bias is None else bias)).reshape(*out, features)


def arrays(case):
    rng = np.random.default_rng(1)
    x = 2 + rng.normal(size=(BATCH, *case["spatial"], case["channels"]))
    per_group = case["channels"] // case["feature_groups"]
    kernel = rng.normal(size=(*case["kernel_size"], per_group, FEATURES))
    return x, kernel, rng.normal(size=FEATURES) if case["bias"] else None


@pytest.fixture(params=[1, 8])
def devices(request, monkeypatch):
    """On one device a kernel is multiplied as a matrix. Equal layers share a trace, which does not know."""
    trace = importlib.import_module("netdeconv_jax.ops.fold")._fold
    monkeypatch.setattr(jax, "device_count", lambda: request.param)
    trace.clear_cache()
    yield request.param
    trace.clear_cache()


@pytest.mark.usefixtures("devices")
@pytest.mark.parametrize("name", CASES)
def test_the_folded_convolution_is_whitening_and_multiplying(x64, name):
    case = CASES[name]
    ours, theirs, taps = groups_of(case)
    x, kernel, bias = arrays(case)
    mean, whitener = statistics(ours)
    window = ops.window(case["kernel_size"], case["strides"])

    @jax.jit
    def convolved(x, kernel, bias, mean, whitener):
        kernel, bias = ops.fold(kernel, bias, mean, whitener, ours)
        y = window.convolve(x, kernel, feature_group_count=case["feature_groups"])
        return y + bias.reshape((1,) * (y.ndim - 1) + (-1,)), kernel, bias

    found, folded, shift = convolved(x, kernel, bias, mean, whitener)
    expected = explicitly(x, kernel, bias, mean, whitener, theirs, taps, case)
    assert folded.shape == kernel.shape
    assert shift.shape == (FEATURES,)
    assert folded.dtype == shift.dtype == jnp.float64
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12 * np.abs(expected).max())


def test_zero_mean_and_identity_change_nothing():
    groups = ops.column_groups(4, 9, 2)
    kernel = jnp.asarray(np.random.default_rng(0).normal(size=(3, 3, 4, 5)), jnp.float32)
    bias = jnp.arange(5.0)
    folded, shift = ops.fold(kernel, bias, jnp.zeros(groups.width), jnp.eye(groups.width), groups)
    np.testing.assert_array_equal(folded, kernel)
    np.testing.assert_array_equal(shift, bias)


def low_precision(mean):
    """32 channels under one tap: X of the given mean, its exact statistics, a random kernel."""
    rng = np.random.default_rng(0)
    x = (mean + rng.normal(size=(500, 32))).astype(np.float32)
    groups = ops.column_groups(32, 1, 64)
    found = ops.moments(jnp.asarray(x))
    whitener = ops.eigh(found.cov)
    kernel = jnp.asarray(rng.normal(size=(1, 32, 8)) / 6, jnp.bfloat16)
    return x, kernel, found.mean, whitener, groups


@pytest.mark.usefixtures("devices")
def test_in_bfloat16_the_bias_is_of_the_rounded_kernel():
    x, kernel, mean, whitener, groups = low_precision(mean=100.0)
    folded, shift = ops.fold(kernel, None, mean, whitener, groups)
    assert folded.dtype == jnp.bfloat16
    assert shift.dtype == jnp.float32

    rows, w = x.astype(np.float64), np.asarray(folded[0], np.float64)
    exact = (rows - np.asarray(mean, np.float64)) @ np.asarray(whitener, np.float64)
    exact = exact @ np.asarray(kernel[0], np.float64)
    error = np.abs(rows @ w + np.asarray(shift) - exact).max()
    assert error < 0.03  # rounding the kernel, seen by deviations of one

    unrounded, bias = ops.fold(kernel, None, mean, whitener, groups, dtype=jnp.float32)
    assert unrounded.dtype == jnp.float32
    naive = np.abs(rows @ w + np.asarray(bias) - exact).max()
    assert naive > 0.3  # the same rounding, seen by the mean
    np.testing.assert_allclose(rows.mean(0) @ w + np.asarray(shift), 0, atol=1e-3)


@pytest.mark.usefixtures("devices")
def test_the_product_is_formed_in_the_precision_of_the_statistics_and_rounded_once():
    _, kernel, mean, whitener, groups = low_precision(mean=0.0)
    folded, _ = ops.fold(kernel, None, mean, whitener, groups)
    exact = np.asarray(whitener, np.float64) @ np.asarray(kernel[0], np.float64)
    once = jnp.asarray(exact, jnp.float32).astype(jnp.bfloat16)
    disagree = np.asarray(folded[0] != once)
    assert disagree.mean() < 0.02  # ties that float32 breaks otherwise


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_the_folded_kernel_has_the_dtype_asked_for_and_the_bias_that_of_the_statistics(dtype):
    groups = ops.column_groups(2, 1, 2)
    folded, shift = ops.fold(
        jnp.ones((1, 2, 3), jnp.float16), jnp.ones(3), jnp.ones(2), jnp.eye(2), groups, dtype=dtype
    )
    assert folded.dtype == dtype
    assert shift.dtype == jnp.float32
    np.testing.assert_array_equal(shift, [-1, -1, -1])


def products_of(groups):
    """The products in folding a 3x3 kernel of 4 channels."""
    args = (jnp.ones((3, 3, 4, 5)), jnp.ones(5), jnp.ones(groups.width), jnp.eye(groups.width))
    return products(functools.partial(ops.fold, groups=groups), *args)


@pytest.mark.usefixtures("devices")
def test_every_product_runs_at_highest_precision():
    found = products_of(ops.column_groups(4, 9, 2))
    assert len(found) == 2
    for eqn in found:
        assert eqn.params["precision"] == (lax.Precision.HIGHEST,) * 2


def test_only_on_one_device_and_only_interleaved_groups_are_one_matrix(devices):
    shapes = {
        kind: [v.aval.shape for v in products_of(ops.column_groups(4, 9, 2, kind=kind))[0].invars]
        for kind in ("interleaved", "contiguous")
    }
    assert (shapes["interleaved"] == [(18, 18), (18, 10)]) == (devices == 1)
    assert sorted(map(len, shapes["contiguous"])) == [4, 6]


@pytest.mark.usefixtures("devices")
@pytest.mark.parametrize(
    "name", ["two groups", pytest.param("channels per group", marks=pytest.mark.slow)]
)
def test_folding_has_derivatives_to_second_order_forward_and_reverse(x64, name):
    case = CASES[name] | {"kernel_size": (2, 1)}
    ours, _, _ = groups_of(case)
    _, kernel, bias = arrays(case)
    function = jax.jit(functools.partial(ops.fold, groups=ours))
    args = tuple(map(jnp.asarray, (kernel, bias, *statistics(ours))))
    check_grads(function, args, order=2, modes=("fwd", "rev"), eps=1e-4, rtol=1e-4)


def test_a_kernel_with_other_columns_is_refused_with_both_numbers():
    groups = ops.column_groups(4, 9, 64)
    with pytest.raises(ValueError, match="`kernel`") as raised:
        ops.fold(jnp.ones((3, 3, 5, 2)), None, jnp.zeros(36), jnp.eye(36), groups)
    for word in ("(3, 3, 5, 2)", "45", "36"):
        assert word in str(raised.value)


@pytest.mark.parametrize(
    ("name", "shape"), [("mean", (4,)), ("whitener", (3,)), ("whitener", (4, 4)), ("bias", (1,))]
)
def test_arrays_that_do_not_fit_the_groups_are_refused_by_name(name, shape):
    arrays = {"mean": (3,), "whitener": (3, 3), "bias": (2,)} | {name: shape}
    bias, mean, whitener = (jnp.ones(arrays[key]) for key in ("bias", "mean", "whitener"))
    groups = ops.column_groups(3, 1, 64)
    with pytest.raises(ValueError, match=f"`{name}` must have shape"):
        ops.fold(jnp.ones((1, 1, 3, 2)), bias, mean, whitener, groups)
