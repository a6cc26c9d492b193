"""Moments of the patches of a convolution, against an explicit patch matrix, grouping and sampling."""

import functools
import importlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy_oracle as oracle
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

from netdeconv_jax import ops


def case(
    spatial=(6, 7),
    kernel_size=(3, 3),
    channels=4,
    *,
    batch=2,
    strides=None,
    padding: ops.Padding = "SAME",
    input_dilation=None,
    kernel_dilation=None,
    sampling_stride=1,
    block_size=64,
    kind="interleaved",
    shared=True,
    feature_groups=1,
    whiten="patches",
    centred=False,
) -> dict[str, Any]:
    return locals()


def in_the_quick_run(names, quick):
    """All names, those that are not in `quick` marked `slow`: most of their time is compilation."""
    assert set(quick) <= set(names)
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


CASES = {
    "one group": case(),
    "two groups": case(block_size=2),
    "three groups": case(channels=6, block_size=2, kernel_size=(2, 3)),
    "contiguous": case(block_size=2, kind="contiguous"),
    "per group": case(block_size=2, shared=False),
    "contiguous per group": case(block_size=2, kind="contiguous", shared=False),
    "two feature groups": case(feature_groups=2),
    "depthwise": case(feature_groups=4, sampling_stride=2),
    "sampled by three": case(sampling_stride=3),
    "sampled by three, strides 2": case((9, 8), strides=(2, 2), sampling_stride=3),
    "strides differ, sampled by two": case((9, 8), strides=(2, 1), sampling_stride=2),
    "sampled beyond the map": case((3, 3), sampling_stride=5),
    "same, even kernel, stride 2": case(kernel_size=(2, 4), strides=(2, 2), sampling_stride=2),
    "valid": case(padding="VALID", sampling_stride=2),
    "valid, dilated": case((8, 9), padding="VALID", kernel_dilation=(2, 3), sampling_stride=2),
    "circular": case(padding="CIRCULAR", sampling_stride=2),
    "reflect": case(padding="REFLECT", strides=(1, 2)),
    "asymmetric pairs": case(padding=((0, 2), (1, 2)), sampling_stride=2),
    "windows of padding alone": case(padding=((3, 0), (0, 4)), sampling_stride=2),
    "windows of padding alone, apart": case(padding=((4, 0), (0, 5)), sampling_stride=3),
    "input dilation": case((3, 4), padding=((1, 2), (2, 0)), input_dilation=(2, 3)),
    "channels": case(whiten="channels", sampling_stride=2),
    "channels per group": case(whiten="channels", block_size=2, shared=False),
    "channels, strides and padding": case(
        (5, 5), whiten="channels", strides=(2, 2), padding=((2, 2), (2, 2)), sampling_stride=2
    ),
    "1x1": case(kernel_size=(1, 1)),
    "1x1, rows divide": case((6, 6), (1, 1), sampling_stride=3),
    "1x1, rows do not divide": case((5, 5), (1, 1), batch=4, sampling_stride=3),
    "1x1, strides 2": case((5, 7), (1, 1), batch=4, strides=(2, 2), sampling_stride=3),
    "1x1, strides differ": case((5, 7), (1, 1), batch=3, strides=(2, 1), sampling_stride=2),
    "1x1, padded": case((5, 5), (1, 1), batch=3, padding=((1, 1), (1, 1)), sampling_stride=2),
    "1x1, images below the step": case((2, 2), (1, 1), batch=7, sampling_stride=3),
    "1x1, two groups": case((5, 5), (1, 1), block_size=2, sampling_stride=2),
    "1x1, per group": case((5, 5), (1, 1), block_size=2, shared=False, sampling_stride=2),
    "1x1, feature groups": case((5, 5), (1, 1), feature_groups=2, sampling_stride=2),
    "1d": case((11,), (3,), sampling_stride=2, block_size=2),
    "1d causal": case((11,), (3,), padding="CAUSAL", strides=(2,), sampling_stride=2),
    "1d pointwise": case((5,), (1,), batch=3, sampling_stride=3),
    "3d": case((4, 3, 5), (2, 3, 1), sampling_stride=2, block_size=2),
    "3d pointwise": case((3, 3, 3), (1, 1, 1), batch=4, sampling_stride=2),
    "one sample": case((3, 3), padding="VALID", batch=1),
    "centred": case(sampling_stride=3, block_size=2, centred=True),
    "centred, windows overlap": case((8, 7), sampling_stride=2, centred=True),
    "centred, strides 2": case((9, 8), strides=(2, 1), sampling_stride=3, centred=True),
    "centred, beyond the map": case((3, 9), sampling_stride=7, centred=True),
    "centred, depthwise": case((9, 8), feature_groups=4, sampling_stride=4, centred=True),
    "centred, asymmetric pairs": case(padding=((3, 2), (1, 4)), sampling_stride=4, centred=True),
    "centred, dilated": case(
        (3, 4), padding=((2, 2), (3, 1)), input_dilation=(2, 3), sampling_stride=4, centred=True
    ),
    "centred, circular": case(padding="CIRCULAR", sampling_stride=4, centred=True),
    "centred, channels": case((6, 6), whiten="channels", sampling_stride=3, centred=True),
    "centred, 1x1": case((5, 5), (1, 1), batch=4, sampling_stride=4, centred=True),
    "centred, 1x1, strides 2": case(
        (5, 7), (1, 1), batch=4, strides=(2, 1), sampling_stride=3, centred=True
    ),
    "centred, 1x1, a pixel": case((1, 1), (1, 1), batch=7, sampling_stride=3, centred=True),
}


def data(case, seed=0, mean=0.5):
    rng = np.random.default_rng(seed)
    shape = (case["batch"], *case["spatial"], case["channels"])
    return mean + rng.normal(size=shape) @ rng.normal(size=(case["channels"],) * 2)


def ours(case, **options):
    """The library's function of (x, mask) for a case."""
    taps = int(np.prod(case["kernel_size"])) if case["whiten"] == "patches" else 1
    geometry = ops.window(
        case["kernel_size"],
        case["strides"],
        case["padding"],
        case["input_dilation"],
        case["kernel_dilation"],
    )
    groups = ops.column_groups(
        case["channels"],
        taps,
        case["block_size"],
        kind=case["kind"],
        shared=case["shared"],
        feature_group_count=case["feature_groups"],
    )
    options = {"sampling_stride": case["sampling_stride"], "centred": case["centred"]} | options
    return lambda x, mask=None: ops.patch_moments(x, geometry, groups, mask=mask, **options)


def explicitly(case, x, mask=None):
    """(count, mean, cov) by NumPy; mask [batch, *spatial]."""
    ndim, channels, sampling = len(case["spatial"]), case["channels"], case["sampling_stride"]
    strides = case["strides"] or (1,) * ndim
    taps = int(np.prod(case["kernel_size"])) if case["whiten"] == "patches" else 1
    if taps == 1:
        step = int(np.prod([s * sampling for s in strides]))
        corner = np.zeros(case["spatial"])[tuple(slice(None, None, s) for s in strides)]
        pixel = [s * n for s, n in zip(strides, first_of(case, corner.shape), strict=True)]
        first = np.ravel_multi_index(pixel, case["spatial"]) % step
        rows = x.reshape(-1, channels)[first::step]
        weights = None if mask is None else mask.reshape(-1)[first::step]
    else:
        geometry = oracle.Geometry(
            case["kernel_size"],
            strides,
            case["padding"],
            case["input_dilation"],
            case["kernel_dilation"],
        )
        rows = oracle.columns(oracle.patches(x, geometry), ndim)
        first = first_of(case, rows.shape[1 : ndim + 1])
        thin = (slice(None), *(slice(n, None, sampling) for n in first))
        rows = rows[thin].reshape(-1, channels * taps)
        weights = None
        if mask is not None:
            weights = oracle.patch_weights(mask, geometry)[thin].reshape(-1)
    groups = oracle.group_columns(
        channels, taps, case["block_size"], case["kind"], case["feature_groups"]
    )
    return oracle.grouped_moments(rows, groups, case["shared"], weights)


def first_of(case, counts):
    """Which of that many windows along each axis is the first sample."""
    if not case["centred"]:
        return [0] * len(counts)
    return [min(case["sampling_stride"] // 2, (n - 1) // 2) for n in counts]


def assert_moments(found, expected, tolerance):
    count, mean, cov = expected
    np.testing.assert_allclose(np.broadcast_to(found.count, np.shape(count)), count, rtol=1e-6)
    assert found.mean.shape == mean.shape
    assert found.cov.shape == cov.shape
    np.testing.assert_allclose(found.mean, mean, rtol=0, atol=tolerance * np.abs(mean).max())
    scale = np.abs(cov).max() + np.abs(mean).max() ** 2
    np.testing.assert_allclose(found.cov, cov, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("name", CASES)
def test_moments_are_those_of_the_explicit_patch_matrix(x64, name):
    x = data(CASES[name])
    found = jax.jit(ours(CASES[name]))(x)
    assert found.count.dtype == found.mean.dtype == found.cov.dtype == jnp.float64
    assert_moments(found, explicitly(CASES[name], x), 1e-13)


def test_feature_groups_may_have_several_groups_or_sets(x64):
    x, window = jnp.asarray(data(case(channels=8))), ops.window((3, 3))
    patches = jnp.moveaxis(ops.extract_patches(x, (3, 3)), -1, 3).reshape(*x.shape[:3], 72)
    for sets, count in ((1, 2), (2, 1)):
        groups = ops.ColumnGroups("contiguous", 2, sets, count, 18)
        rows = groups.split(patches)
        expected = ops.moments(rows, axes=(0, 1, 2, rows.ndim - 2))
        found = ops.patch_moments(x, window, groups)
        expected = expected.cov.reshape(found.cov.shape)
        np.testing.assert_allclose(found.cov, expected, rtol=0, atol=1e-12)


def test_without_jit_they_are_the_same():
    for name in ("1x1, rows do not divide", "two groups"):
        x = jnp.asarray(data(CASES[name]), jnp.float32)
        assert_moments(ours(CASES[name])(x), explicitly(CASES[name], np.asarray(x)), 2e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("name", ["two groups", "1x1, rows do not divide"])
def test_statistics_are_float32_of_the_input_as_it_is_rounded(name, dtype):
    x = jnp.asarray(data(CASES[name], mean=5.0), dtype)
    found = jax.jit(ours(CASES[name]))(x)
    assert found.mean.dtype == found.cov.dtype == jnp.float32
    assert_moments(found, explicitly(CASES[name], np.asarray(x, np.float64)), 2e-6)


def test_the_dtype_of_the_statistics_can_be_raised(x64):
    x = jnp.asarray(data(CASES["two groups"]), jnp.float32)
    found = jax.jit(ours(CASES["two groups"], dtype=jnp.float64))(x)
    assert found.cov.dtype == jnp.float64
    expected = explicitly(CASES["two groups"], np.asarray(x, np.float64))
    assert_moments(found, expected, 1e-13)


MASKED = [
    "one group",
    "two groups",
    "contiguous per group",
    "two feature groups",
    "sampled by three, strides 2",
    "valid, dilated",
    "circular",
    "reflect",
    "asymmetric pairs",
    "input dilation",
    "channels per group",
    "1x1, rows do not divide",
    "1x1, strides differ",
    "1x1, feature groups",
    "1d causal",
    "3d",
    "centred, strides 2",
    "centred, depthwise",
    "centred, 1x1",
]


ON_ONE_DEVICE = [
    "channels, strides and padding",
    "1x1, rows do not divide",
    "1x1, strides 2",
    "1x1, images below the step",
    "1x1, feature groups",
    "1d pointwise",
    "centred, 1x1",
    "centred, 1x1, strides 2",
]


@pytest.mark.parametrize(
    ("name", "masked"),
    [*((name, False) for name in ON_ONE_DEVICE), ("1x1, rows do not divide", True)],
)
def test_pixels_on_one_device_are_the_same_and_their_gradient_takes_no_scatter(
    x64, name, masked, monkeypatch
):
    x = data(CASES[name])
    mask = np.random.default_rng(3).choice([0.0, 0.5, 1.0, 2.0], x.shape[:-1]) if masked else None
    spread_out = None if mask is None else mask[..., None]
    # A trace that equal layers share; the module has the name of its function.
    own_moments = importlib.import_module("netdeconv_jax.ops.patch_moments")._own_moments

    def value(x):
        found = ours(CASES[name])(x, spread_out)
        return jnp.sin(found.cov).sum() + jnp.sin(found.mean).sum()

    def traced():
        own_moments.clear_cache()
        moments = jax.jit(ours(CASES[name]))(x, spread_out)
        return moments, jax.grad(value)(x), str(jax.make_jaxpr(jax.grad(value))(x))

    _, expected, several = traced()
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    moments, gradient, one = traced()
    own_moments.clear_cache()
    assert_moments(moments, explicitly(CASES[name], x, mask), 1e-13)
    np.testing.assert_allclose(gradient, expected, rtol=0, atol=1e-13 * np.abs(expected).max())
    assert "scatter" not in one
    assert "scatter" in several


def test_a_mask_over_an_explicit_mesh_of_one_device_is_taken(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Explicit,))
    case_ = CASES["1x1, rows do not divide"]
    x = jnp.asarray(data(case_), jnp.float32)
    mask = np.random.default_rng(3).choice([0.0, 1.0, 2.0], x.shape[:-1]).astype(np.float32)
    placed = jax.device_put(mask[..., None], NamedSharding(mesh, P("data")))
    assert_moments(ours(case_)(x, placed), explicitly(case_, np.asarray(x), mask), 2e-6)


@pytest.mark.parametrize("name", MASKED)
def test_a_patch_weighs_as_much_as_the_least_of_its_pixels(x64, name):
    x = data(CASES[name])
    rng = np.random.default_rng(3)
    mask = rng.choice([0.0, 0.5, 1.0, 1.0, 1.0, 2.0, 2.0, 2.0], x.shape[:-1])
    found = jax.jit(ours(CASES[name]))(x, mask[..., None])
    assert_moments(found, explicitly(CASES[name], x, mask), 1e-13)


@pytest.mark.parametrize(
    "name",
    in_the_quick_run(MASKED, ["two groups", "asymmetric pairs", "1x1, rows do not divide"]),
)
def test_a_mask_of_whole_samples_weighs_all_their_patches(x64, name):
    x = data(CASES[name] | {"batch": 4})
    weights = np.array([2.0, 0.0, 1.0, 0.5])
    mask = weights.reshape(4, *[1] * (x.ndim - 2))
    found = jax.jit(ours(CASES[name]))(x, mask[..., None])
    expected = explicitly(CASES[name], x, np.broadcast_to(mask, x.shape[:-1]))
    assert_moments(found, expected, 1e-13)


@pytest.mark.parametrize(
    "name",
    [
        "one group",
        "two groups",
        "per group",
        "depthwise",
        "sampled by three",
        "channels per group",
        "1x1",
        "1x1, rows divide",
        "1d causal",
        "3d",
    ],
)
def test_masked_samples_are_as_if_they_were_not_there(x64, name):
    case: dict[str, Any] = CASES[name] | {"batch": 4}
    if case["whiten"] == "channels" or set(case["kernel_size"]) == {1}:  # else rows shift
        step = case["sampling_stride"] ** len(case["spatial"])
        assert np.prod(case["spatial"]) % step == 0
    x, kept = data(case), np.array([True, False, True, False])
    broken = np.where(kept.reshape(-1, *[1] * (x.ndim - 1)), x, np.nan)
    mask = kept.astype(float).reshape(-1, *[1] * (x.ndim - 1))

    @jax.jit
    def value(x, mask):
        found = ours(case)(x, mask)
        return jnp.sum(found.mean**2) + jnp.sum(found.cov**2), found

    (_, found), gradient = jax.jit(jax.value_and_grad(value, has_aux=True))(broken, mask)
    (_, expected), dropped = jax.jit(jax.value_and_grad(value, has_aux=True))(x[kept], mask[kept])
    assert_moments(
        found, tuple(map(np.asarray, (expected.count, expected.mean, expected.cov))), 1e-13
    )
    np.testing.assert_allclose(gradient[kept], dropped, rtol=0, atol=1e-12)
    np.testing.assert_array_equal(gradient[~kept], 0)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"padding": ((3, 3), (3, 3))},  # some windows see padding alone
        {"input_dilation": (4, 4), "kernel_size": (2, 2), "padding": "VALID"},  # or holes alone
    ],
)
def test_a_mask_of_samples_may_be_spelled_out_per_pixel(x64, options):
    case_ = case(batch=3, **options)
    x, mask = data(case_), np.array([1.0, 0.0, 1.0]).reshape(3, 1, 1, 1)
    short = jax.jit(ours(case_))(x, mask)
    long = jax.jit(ours(case_))(x, np.broadcast_to(mask, (*x.shape[:-1], 1)))
    assert_moments(long, (short.count, np.asarray(short.mean), np.asarray(short.cov)), 1e-13)


@pytest.mark.parametrize("name", ["two groups", "1x1, rows do not divide"])
def test_a_mask_of_ones_or_of_any_broadcastable_shape_is_that_mask(x64, name):
    case_ = CASES[name]
    x = data(case_)
    full = (*x.shape[:-1], 1)
    for shape in [(1,), (1, full[1], 1, 1), full]:
        plain, found = explicitly(case_, x), jax.jit(ours(case_))(x, np.ones(shape))
        assert_moments(found, plain, 1e-13)
    column = np.arange(full[2], dtype=float)[:, None] + 1
    expected = explicitly(case_, x, np.broadcast_to(column, full)[..., 0])
    assert_moments(jax.jit(ours(case_))(x, column), expected, 1e-13)


@pytest.mark.parametrize("name", ["two groups", "1x1, rows do not divide"])
def test_a_boolean_mask_and_a_mask_of_all_zeros_are_finite(name):
    x = jnp.full((CASES[name]["batch"], *CASES[name]["spatial"], 4), jnp.nan)
    for mask in (jnp.zeros((len(x), 1, 1, 1), bool), jnp.zeros((*x.shape[:-1], 1))):
        found = jax.jit(ours(CASES[name]))(x, mask)
        for part in (found.count, found.mean, found.cov):
            np.testing.assert_array_equal(part, 0)


# Eight devices, and as many rows on each as do not divide by the step of 1x1 kernels.
DEVICE_CASES = {
    "patches": case((5, 5), batch=16, sampling_stride=2, block_size=2),
    "per group": case((5, 4), batch=16, sampling_stride=3, block_size=2, shared=False),
    "depthwise": case((5, 4), batch=8, feature_groups=4),
    "channels": case((5, 5), batch=16, sampling_stride=3, whiten="channels"),
    "1x1, step 9, 25 pixels": case((5, 5), (1, 1), batch=16, sampling_stride=3),
    "1x1, step 9, 49 pixels of one image": case((7, 7), (1, 1), batch=8, sampling_stride=3),
    "1x1, step 16, 12 pixels": case(
        (4, 3), (1, 1), batch=16, strides=(2, 2), sampling_stride=2, shared=False, block_size=2
    ),
    "1x1, rows divide": case((6, 6), (1, 1), batch=8, sampling_stride=3),
    "1d, step 3": case((5,), (1,), batch=16, sampling_stride=3),
    "centred patches": case((5, 5), batch=16, sampling_stride=3, centred=True),
    "centred, 1x1": case((5, 7), (1, 1), batch=16, sampling_stride=3, centred=True),
}


def by_device(a):
    return a.reshape(8, len(a) // 8, *a.shape[1:])


def sharded_inputs(name, *, masked):
    x = data(DEVICE_CASES[name]).astype(np.float32)
    if not masked:
        return x, None
    mask = np.random.default_rng(5).choice([0, 1, 1, 2], (*x.shape[:-1], 1)).astype(np.float32)
    mask[: len(x) // 8] = 0  # the first device has nothing that counts
    return x, mask


def expected_of(name, x, mask):
    return explicitly(DEVICE_CASES[name], x, None if mask is None else mask[..., 0])


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "name",
    in_the_quick_run(
        DEVICE_CASES, ["patches", "per group", "1x1, step 9, 25 pixels", "centred, 1x1"]
    ),
)
def test_devices_under_pmap_hold_the_statistics_of_the_whole_batch(name, masked):
    x, mask = sharded_inputs(name, masked=masked)
    args = [by_device(a) for a in (x, mask) if a is not None]
    found = jax.pmap(ours(DEVICE_CASES[name], axis_name="d"), axis_name="d")(*args)
    for device in (0, 3, 7):
        part = jax.tree.map(lambda a, i=device: a[i], found)
        assert_moments(part, expected_of(name, x, mask), 2e-6)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "name",
    in_the_quick_run(
        DEVICE_CASES,
        [
            "patches",
            "channels",
            "1x1, step 9, 49 pixels of one image",
            "1x1, step 16, 12 pixels",
            "centred patches",
        ],
    ),
)
def test_shards_under_shard_map_hold_the_statistics_of_the_whole_batch(name, masked):
    x, mask = sharded_inputs(name, masked=masked)
    args = [a for a in (x, mask) if a is not None]
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    found = jax.jit(
        jax.shard_map(
            ours(DEVICE_CASES[name], axis_name="d"), mesh=mesh, in_specs=P("d"), out_specs=P()
        )
    )(*args)
    assert_moments(found, expected_of(name, x, mask), 2e-6)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", ["patches", "per group", "1x1, step 9, 25 pixels", "centred, 1x1"])
def test_a_sharded_batch_under_jit_has_the_statistics_of_the_whole(name, masked, axis_type):
    x, mask = sharded_inputs(name, masked=masked)
    mesh = jax.make_mesh((8,), ("d",), axis_types=(axis_type,))
    args = [jax.device_put(a, NamedSharding(mesh, P("d"))) for a in (x, mask) if a is not None]
    found = jax.jit(ours(DEVICE_CASES[name]))(*args)
    assert_moments(found, expected_of(name, x, mask), 2e-6)
    assert found.cov.sharding.is_fully_replicated


@pytest.mark.parametrize("name", ["patches", "1x1, step 9, 25 pixels"])
def test_axis_index_groups_are_batches_of_their_own(name):
    x, _ = sharded_inputs(name, masked=False)
    members = [[0, 3, 4, 7], [1, 2, 5, 6]]
    function = ours(DEVICE_CASES[name], axis_name="d", axis_index_groups=members)
    found = jax.pmap(function, axis_name="d")(by_device(x))
    for group in members:
        whole = by_device(x)[group].reshape(-1, *x.shape[1:])
        for device in group:
            part = jax.tree.map(lambda a, i=device: a[i], found)
            assert_moments(part, explicitly(DEVICE_CASES[name], whole), 2e-6)


def test_two_mapped_axes_are_one_batch():
    name = "1x1, step 9, 25 pixels"
    x, _ = sharded_inputs(name, masked=False)
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    function = ours(DEVICE_CASES[name], axis_name=("a", "b"))
    total = jax.shard_map(function, mesh=mesh, in_specs=P(("a", "b")), out_specs=P())
    assert_moments(jax.jit(total)(x), expected_of(name, x, None), 2e-6)


@pytest.mark.parametrize("name", ["patches", "1x1, step 9, 25 pixels"])
def test_the_gradient_over_devices_is_that_of_the_whole_batch(x64, name):
    x = data(DEVICE_CASES[name])

    def value(moments):
        return jnp.sum(moments.mean**2) + jnp.sum(jnp.sin(moments.cov))

    @jax.jit
    @jax.grad
    def over_devices(x):
        mapped = jax.vmap(ours(DEVICE_CASES[name], axis_name="d"), axis_name="d")
        return value(jax.tree.map(lambda a: a[5], mapped(by_device(x))))

    whole = jax.jit(jax.grad(lambda x: value(ours(DEVICE_CASES[name])(x))))(x)
    np.testing.assert_allclose(over_devices(x), whole, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kernel_size", [(2, 2), (1, 1)])
def test_derivatives_to_second_order_forward_and_reverse(x64, kernel_size):
    case_ = case((3, 3), kernel_size, 2, sampling_stride=2, block_size=1)
    mask = np.array([1.0, 0.5]).reshape(2, 1, 1, 1)
    function = jax.jit(functools.partial(ours(case_), mask=mask))
    check_grads(
        function, (jnp.asarray(data(case_)),), order=2, modes=("fwd", "rev"), eps=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [
        ("two groups", (3, 1, 1, 1), ["`mask`", "(2, 6, 7, 1)", "(3, 1, 1, 1)"]),
        ("two groups", (2, 6, 7, 4), ["`mask`", "(2, 6, 7, 1)", "(2, 6, 7, 4)"]),
        ("two groups", (2,), ["`mask`", "(2, 6, 7, 1)", "(2,)"]),
        ("1x1", (1, 2, 6, 7, 1), ["`mask`", "(2, 6, 7, 1)", "(1, 2, 6, 7, 1)"]),
    ],
)
def test_a_mask_that_does_not_fit_is_refused_with_both_shapes(name, shape, words):
    with pytest.raises(ValueError, match="`mask`") as raised:
        ours(CASES[name])(jnp.asarray(data(CASES[name])), jnp.ones(shape))
    for word in words:
        assert word in str(raised.value)


def test_an_input_smaller_than_the_kernel_is_refused():
    small = case((2, 6), padding="VALID")
    with pytest.raises(ValueError, match="`x` is smaller than the kernel") as raised:
        ours(small)(jnp.ones((2, 2, 6, 4)))
    for word in ("(2, 6)", "(3, 3)", "VALID"):
        assert word in str(raised.value)


@pytest.mark.parametrize("name", ["two groups", "1x1"])
def test_an_empty_batch_is_refused(name):
    with pytest.raises(ValueError, match="no samples"):
        ours(CASES[name])(jnp.ones((0, 6, 7, 4)))


@pytest.mark.parametrize("name", ["two groups", "1x1"])
@pytest.mark.parametrize("stride", [0, -1])
def test_a_sampling_stride_below_one_is_refused(name, stride):
    with pytest.raises(ValueError, match="`sampling_stride`") as raised:
        ours(CASES[name], sampling_stride=stride)(jnp.ones((2, 6, 7, 4)))
    assert str(stride) in str(raised.value)


@pytest.mark.parametrize("stride", [2.0, "3", None])
def test_a_sampling_stride_that_is_no_int_is_refused(stride):
    groups = ops.column_groups(3, 9, 64)
    with pytest.raises(TypeError, match="`sampling_stride` must be an int"):
        ops.patch_moments(
            jnp.ones((2, 8, 8, 3)), ops.window((3, 3)), groups, sampling_stride=stride
        )


def test_integers_are_refused():
    groups = ops.column_groups(3, 9, 64)
    with pytest.raises(TypeError, match="`x` must be floating point, got int32"):
        ops.patch_moments(jnp.ones((2, 8, 8, 3), jnp.int32), ops.window((3, 3)), groups)
