"""Moments as a monoid: any split, order, mask or device gives the moments of the whole."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpy_oracle as oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

from netdeconv_jax import ops

SAMPLES, WIDTH, PARTS = 24, 3, 4


def samples(seed=0, n=SAMPLES, d=WIDTH, mean=1.0):
    rng = np.random.default_rng(seed)
    return mean + rng.normal(size=(n, d)) @ rng.normal(size=(d, d))


def assert_moments(found, expected, tolerance):
    """Compare with an oracle's (count, mean, cov), relative to the largest entry of each."""
    for name, theirs in zip(("count", "mean", "cov"), expected, strict=True):
        ours = np.asarray(getattr(found, name), np.float64)
        assert ours.shape == np.shape(theirs), name
        error = np.abs(ours - theirs).max()
        assert error <= tolerance * np.abs(theirs).max(), f"{name}: {error:.2e}"


weighted_moments = jax.jit(ops.moments)
merge = jax.jit(ops.Moments.merge)


@st.composite
def divisions(draw):
    """(seed, part of every sample, weight of every sample, order of merging)."""
    parts = draw(st.lists(st.integers(0, PARTS - 1), min_size=SAMPLES, max_size=SAMPLES))
    weight = st.sampled_from([0.0, 0.0, 1.0, 1.0, 0.5, 3.0])
    weights = draw(st.lists(weight, min_size=SAMPLES, max_size=SAMPLES).filter(any))
    order = draw(st.permutations(range(PARTS)))
    return draw(st.integers(0, 1000)), np.array(parts), np.array(weights), order


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(divisions(), st.booleans())
def test_any_split_order_and_mask_gives_the_moments_of_the_whole(division, pairwise):
    seed, part, weights, order = division
    x = samples(seed)
    with jax.enable_x64():
        pieces = [weighted_moments(jnp.asarray(x), np.where(part == k, weights, 0)) for k in order]
        if pairwise:
            whole = merge(merge(pieces[0], pieces[1]), merge(pieces[2], pieces[3]))
        else:
            whole = functools.reduce(merge, pieces)
        assert whole.cov.dtype == jnp.float64
        assert_moments(whole, oracle.moments(x, weights), 1e-12)


@pytest.mark.parametrize("sizes", [(24,), (12, 12), (1, 23), (20, 3, 1), (1,) * 6 + (18,)])
def test_slices_of_any_size_merge_to_the_whole_in_float32(sizes):
    x = samples().astype(np.float32)
    cuts = np.cumsum(sizes)[:-1]
    pieces = [ops.moments(jnp.asarray(piece)) for piece in np.split(x, cuts)]
    whole = functools.reduce(ops.Moments.merge, pieces)
    assert whole.cov.dtype == jnp.float32
    assert_moments(whole, oracle.moments(x), 2e-6)


def test_the_order_of_samples_and_of_parts_does_not_matter(x64):
    x = samples()
    shuffled = np.random.default_rng(1).permutation(x)
    assert_moments(ops.moments(jnp.asarray(shuffled)), oracle.moments(x), 1e-13)
    first, second = ops.moments(jnp.asarray(x[:5])), ops.moments(jnp.asarray(x[5:]))
    assert_moments(second.merge(first), oracle.moments(x), 1e-13)


def test_averaging_the_covariances_of_parts_would_be_wrong(x64):
    # The law must have something to say: without the means' part the error is of order one.
    x = samples()
    x = x[np.argsort(x[:, 0])]
    parts = [ops.moments(jnp.asarray(part)).cov for part in np.split(x, 4)]
    assert np.abs(np.mean(parts, axis=0) - oracle.moments(x)[2]).max() > 0.1


def test_a_count_of_zero_is_the_neutral_element_from_both_sides(x64):
    whole = ops.moments(jnp.asarray(samples()))
    nothing = ops.moments(jnp.asarray(samples(1)), jnp.zeros(SAMPLES))
    zeros = jax.tree.map(jnp.zeros_like, whole)
    for empty in (nothing, zeros):
        for merged in (whole.merge(empty), empty.merge(whole)):
            assert_moments(merged, (whole.count, whole.mean, whole.cov), 0)
    both = nothing.merge(zeros)
    assert_moments(both, (0, np.zeros(WIDTH), np.zeros((WIDTH, WIDTH))), 0)


def test_merging_is_associative(x64):
    a, b, c = (ops.moments(jnp.asarray(part)) for part in np.split(samples(), [3, 10]))
    left, right = a.merge(b).merge(c), a.merge(b.merge(c))
    assert_moments(left, (right.count, right.mean, right.cov), 1e-14)


def test_moments_of_nothing_are_zero_and_finite():
    nothing = ops.moments(jnp.full((4, 2), jnp.nan), jnp.zeros(4))
    assert_moments(nothing, (0, np.zeros(2), np.zeros((2, 2))), 0)


@pytest.mark.parametrize("axes", [(0,), (0, 1), (1, 0), (0, 2), (1,), (0, 1, 2)])
@pytest.mark.parametrize("masked", [False, True])
def test_any_axes_hold_the_samples_and_the_others_lead(x64, axes, masked):
    x = np.random.default_rng(0).normal(size=(2, 3, 4, 5))
    drawn = np.random.default_rng(1).integers(0, 3, (2, 3, 4)) / 2 + 0.25
    weights = jnp.asarray(drawn) if masked else None
    found = ops.moments(jnp.asarray(x), weights, axes=axes)
    lead = [axis for axis in range(3) if axis not in axes]
    shape = tuple(x.shape[axis] for axis in lead)
    rows = np.transpose(x, (*lead, *sorted(axes), 3)).reshape(*shape, -1, 5)
    spread = drawn if masked else np.ones(x.shape[:-1])
    spread = np.transpose(spread, (*lead, *sorted(axes))).reshape(*shape, -1)
    assert found.mean.shape == (*shape, 5)
    assert found.cov.shape == (*shape, 5, 5)
    assert found.count.shape == (shape if masked else ())
    for index in np.ndindex(*shape):
        count, mean, cov = oracle.moments(rows[index], spread[index])
        np.testing.assert_allclose(found.count[index if masked else ()], count, rtol=1e-13)
        np.testing.assert_allclose(found.mean[index], mean, rtol=0, atol=1e-13)
        np.testing.assert_allclose(found.cov[index], cov, rtol=0, atol=1e-13)


def test_the_covariance_is_the_biased_one(x64):
    x = samples(n=5)
    found = ops.moments(jnp.asarray(x))
    np.testing.assert_allclose(found.cov, np.cov(x.T, bias=True), rtol=1e-12)
    assert found.count == 5


def test_weights_broadcast_over_samples(x64):
    x = np.random.default_rng(0).normal(size=(4, 6, 2))
    weights = np.array([1.0, 0.0, 2.0, 1.0])[:, None]
    found = ops.moments(jnp.asarray(x), jnp.asarray(weights), axes=(0, 1))
    expected = oracle.moments(x.reshape(24, 2), np.repeat(weights, 6))
    assert_moments(found, expected, 1e-13)


def test_an_integer_weight_is_a_repeated_sample(x64):
    x, weights = samples(n=6), np.array([0, 1, 2, 3, 0, 1])
    found = ops.moments(jnp.asarray(x), jnp.asarray(weights, jnp.float64))
    expected = ops.moments(jnp.asarray(np.repeat(x, weights, axis=0)))
    assert_moments(found, (expected.count, expected.mean, expected.cov), 1e-13)


@pytest.mark.parametrize("hole", [np.nan, np.inf, -np.inf])
def test_samples_of_weight_zero_may_be_anything_also_in_the_gradient(hole):
    x = samples(n=6).astype(np.float32)
    weights = np.array([1, 0, 1, 1, 0, 1], np.float32)
    broken = np.where(weights[:, None] > 0, x, np.float32(hole))

    def value(x, weights):
        found = ops.moments(x, weights)
        return jnp.sum(found.mean) + jnp.sum(found.cov[0] * found.mean)

    clean = ops.moments(jnp.asarray(x[weights > 0]))
    assert_moments(
        ops.moments(jnp.asarray(broken), jnp.asarray(weights)),
        (clean.count, clean.mean, clean.cov),
        1e-6,
    )
    gradient = jax.jit(jax.grad(value, (0, 1)))
    dx, dw = gradient(jnp.asarray(broken), weights)
    expected, _ = gradient(jnp.asarray(x[weights > 0]), jnp.ones(4))
    np.testing.assert_allclose(dx[weights > 0], expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(dx[weights == 0], 0)
    assert np.isfinite(dw).all()


def one_pass(x):
    mean = jnp.mean(x, axis=0)
    return jnp.matmul(x.T, x, precision=lax.Precision.HIGHEST) / len(x) - jnp.outer(mean, mean)


def test_a_mean_of_a_hundred_deviations_costs_no_precision():
    # DESIGN.md, section 4: in one pass the error is about 8e-3, in two 3e-6.
    x = (100 + np.random.default_rng(0).normal(size=(4000, 8))).astype(np.float32)
    expected = np.cov(x.T.astype(np.float64), bias=True)
    assert np.abs(ops.moments(jnp.asarray(x)).cov - expected).max() < 1e-5
    assert np.abs(one_pass(jnp.asarray(x)) - expected).max() > 1e-3


@pytest.mark.parametrize("shape", [(5,), (2, 3, 5)])
def test_no_samples_are_neutral_in_a_merge_on_either_side(shape):
    x = jax.random.normal(jax.random.key(0), (7, *shape)) + 3
    some = ops.moments(x, jnp.ones(x.shape[:-1]), axes=(0,))
    none = ops.Moments.none(shape)
    assert jax.tree.map(jnp.shape, none) == jax.tree.map(jnp.shape, some)
    for merged in (none.merge(some), some.merge(none)):
        jax.tree.map(np.testing.assert_array_equal, merged, some)
    jax.tree.map(np.testing.assert_array_equal, none.merge(none), none)


def test_parts_with_a_large_mean_merge_and_sum_without_loss():
    x = (100 + np.random.default_rng(0).normal(size=(8, 500, 4))).astype(np.float32)
    expected = np.cov(x.reshape(4000, 4).T.astype(np.float64), bias=True)
    parts = [ops.moments(jnp.asarray(part)) for part in x]
    assert np.abs(functools.reduce(ops.Moments.merge, parts).cov - expected).max() < 1e-5
    summed = jax.vmap(lambda x: ops.moments(x).psum("d"), axis_name="d")(x)
    assert np.abs(summed.cov[0] - expected).max() < 1e-5


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("masked", [False, True])
def test_half_precision_input_has_float32_statistics_of_the_rounded_values(dtype, masked):
    x = jnp.asarray(samples(n=200, mean=5.0), dtype)
    weights = (np.arange(200) % 3 > 0).astype(np.float32) if masked else None
    found = jax.jit(ops.moments)(x, weights)
    assert found.mean.dtype == found.cov.dtype == jnp.float32
    assert_moments(found, oracle.moments(np.asarray(x, np.float64), weights), 2e-6)


def test_the_dtype_of_the_statistics_can_be_raised(x64):
    x = jnp.asarray(samples(), jnp.float32)
    found = ops.moments(x, dtype=jnp.float64)
    assert found.count.dtype == found.mean.dtype == found.cov.dtype == jnp.float64
    assert_moments(found, oracle.moments(np.asarray(x, np.float64)), 1e-13)


def test_the_moving_average_is_linear_in_every_part(x64):
    old, new = ops.moments(jnp.asarray(samples(0))), ops.moments(jnp.asarray(samples(1, n=7)))
    found = old.ema(new, 0.9)
    for name in ("count", "mean", "cov"):
        expected = 0.9 * getattr(old, name) + 0.1 * getattr(new, name)
        np.testing.assert_allclose(getattr(found, name), expected, rtol=1e-12)
    assert_moments(old.ema(new, 1.0), (old.count, old.mean, old.cov), 0)
    assert_moments(old.ema(new, 0.0), (new.count, new.mean, new.cov), 0)


def test_moments_pass_through_jit_and_tree_map():
    found = jax.jit(lambda m: jax.tree.map(lambda a: 2 * a, m))(ops.moments(jnp.ones((3, 2))))
    assert isinstance(found, ops.Moments)
    assert found.count == 6
    np.testing.assert_array_equal(found.mean, [2, 2])


# Devices. Each keeps another number of its samples, and the fourth none at all.
DEVICES, PER_DEVICE = 8, 6
KEPT = (6, 1, 3, 0, 5, 2, 6, 4)


def sharded():
    x = samples(n=DEVICES * PER_DEVICE).astype(np.float32)
    weights = np.array([[i < kept for i in range(PER_DEVICE)] for kept in KEPT], np.float32)
    return x, weights.reshape(-1)


def pooled(x, weights, axis_index_groups=None):
    return ops.moments(x, weights).psum("d", axis_index_groups)


def by_device(a):
    return a.reshape(DEVICES, PER_DEVICE, *a.shape[1:])


def on_mesh(a, axis_type, shape=(DEVICES,), names=("d",)):
    mesh = jax.make_mesh(shape, names, axis_types=(axis_type,) * len(shape))
    return jax.device_put(a, NamedSharding(mesh, P(names)))


@pytest.mark.parametrize("transform", [jax.pmap, jax.vmap])
def test_devices_of_a_mapped_axis_all_hold_the_moments_of_the_whole(transform):
    x, weights = sharded()
    found = transform(pooled, axis_name="d")(by_device(x), by_device(weights))
    expected = oracle.moments(x, weights)
    for device in range(DEVICES):
        assert_moments(jax.tree.map(lambda a, i=device: a[i], found), expected, 2e-6)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_shards_of_shard_map_hold_the_moments_of_the_whole(axis_type):
    x, weights = sharded()
    mesh = jax.make_mesh((DEVICES,), ("d",), axis_types=(axis_type,))
    x, weights = (jax.device_put(a, NamedSharding(mesh, P("d"))) for a in (x, weights))
    # Replicated out_specs: the check of varying axes proves that every device holds the same.
    found = jax.jit(jax.shard_map(pooled, mesh=mesh, in_specs=P("d"), out_specs=P()))(x, weights)
    assert_moments(found, oracle.moments(*sharded()), 2e-6)


def test_two_mapped_axes_pool_as_one():
    x, weights = sharded()
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    total = jax.shard_map(
        lambda x, w: ops.moments(x, w).psum(("a", "b")),
        mesh=mesh,
        in_specs=P(("a", "b")),
        out_specs=P(),
    )
    assert_moments(jax.jit(total)(x, weights), oracle.moments(x, weights), 2e-6)


GROUPS = [[0, 3, 4, 7], [1, 2, 5, 6]]


def test_axis_index_groups_pool_among_themselves_under_pmap():
    x, weights = sharded()
    grouped = functools.partial(pooled, axis_index_groups=GROUPS)
    found = jax.pmap(grouped, axis_name="d")(by_device(x), by_device(weights))
    for members in GROUPS:
        rows, kept = by_device(x)[members], by_device(weights)[members]
        expected = oracle.moments(rows.reshape(-1, WIDTH), kept.reshape(-1))
        for device in members:
            assert_moments(jax.tree.map(lambda a, i=device: a[i], found), expected, 2e-6)


def test_axis_index_groups_pool_among_themselves_under_shard_map():
    # JAX has them under shard_map only without the check of varying axes.
    x, weights = sharded()
    mesh = jax.make_mesh((DEVICES,), ("d",), axis_types=(AxisType.Auto,))
    grouped = jax.shard_map(
        lambda x, w: jax.tree.map(lambda a: a[None], pooled(x, w, GROUPS)),
        mesh=mesh,
        in_specs=P("d"),
        out_specs=P("d"),
        check_vma=False,
    )
    found = jax.jit(grouped)(x, weights)
    for members in GROUPS:
        rows, kept = by_device(x)[members], by_device(weights)[members]
        expected = oracle.moments(rows.reshape(-1, WIDTH), kept.reshape(-1))
        for device in members:
            assert_moments(jax.tree.map(lambda a, i=device: a[i], found), expected, 2e-6)


def test_without_any_sample_on_any_device_the_sum_is_zero_and_finite():
    x = np.full((DEVICES, 2, WIDTH), np.nan, np.float32)
    found = jax.vmap(pooled, axis_name="d")(x, np.zeros((DEVICES, 2), np.float32))
    for part in (found.count, found.mean, found.cov):
        np.testing.assert_array_equal(part, 0)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("jit", [False, True])
def test_a_sharded_sample_axis_gives_the_replicated_moments_of_the_whole(jit, masked, axis_type):
    x, weights = sharded()
    args = (x, weights) if masked else (x,)
    function = jax.jit(ops.moments) if jit else ops.moments
    found = function(*[on_mesh(a, axis_type) for a in args])
    assert_moments(found, oracle.moments(*args), 2e-6)
    for part in (found.count, found.mean, found.cov):
        assert part.sharding.is_fully_replicated


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_unsharded_weights_weigh_a_sharded_batch(axis_type):
    x, weights = sharded()
    found = jax.jit(lambda x: ops.moments(x, jnp.asarray(weights)))(on_mesh(x, axis_type))
    assert_moments(found, oracle.moments(x, weights), 2e-6)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_leading_axes_survive_a_sharded_sample_axis(axis_type):
    x = np.random.default_rng(0).normal(size=(DEVICES, 4, 2, 3)).astype(np.float32)
    found = jax.jit(lambda x: ops.moments(x, axes=(0, 1)))(on_mesh(x, axis_type))
    for group in range(2):
        _, mean, cov = oracle.moments(x[:, :, group].reshape(-1, 3))
        np.testing.assert_allclose(found.mean[group], mean, atol=1e-6)
        np.testing.assert_allclose(found.cov[group], cov, atol=2e-6)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_the_gradient_of_a_sharded_batch_is_that_of_one_device(axis_type):
    x, weights = sharded()
    target = np.random.default_rng(2).normal(size=(WIDTH, WIDTH)).astype(np.float32)

    def value(x):
        found = ops.moments(x, jnp.asarray(weights))
        return jnp.sum(found.cov * target) + jnp.sum(found.mean**2)

    found = jax.jit(jax.grad(value))(on_mesh(x, axis_type))
    np.testing.assert_allclose(found, jax.jit(jax.grad(value))(x), atol=1e-6)
    assert found.sharding.spec[0] == "d"


def test_the_gradient_through_the_sum_over_devices_is_that_of_the_whole(x64):
    x, weights = (a.astype(np.float64) for a in sharded())
    target = np.random.default_rng(2).normal(size=(WIDTH, WIDTH))

    def value(moments):
        return jnp.sum(moments.cov * target) + jnp.sum(moments.mean**2)

    def over_devices(x):
        return value(
            jax.tree.map(
                lambda a: a[0], jax.vmap(pooled, axis_name="d")(by_device(x), by_device(weights))
            )
        )

    whole = jax.jit(jax.grad(lambda x: value(weighted_moments(x, weights))))(x)
    np.testing.assert_allclose(jax.jit(jax.grad(over_devices))(x), whole, rtol=0, atol=1e-13)


def test_moments_have_derivatives_to_second_order_forward_and_reverse(x64):
    x, weights = jnp.asarray(samples(n=5)), jnp.asarray([1.0, 0.5, 2.0, 1.5, 0.3])
    check_grads(jax.jit(ops.moments), (x,), order=2, modes=("fwd", "rev"), eps=1e-4, rtol=1e-5)
    check_grads(
        jax.jit(ops.moments), (x, weights), order=2, modes=("fwd", "rev"), eps=1e-4, rtol=1e-5
    )


def test_merging_has_derivatives_to_second_order_forward_and_reverse(x64):
    both = ops.moments(jnp.asarray(samples(0, n=3))), ops.moments(jnp.asarray(samples(1, n=5)))
    check_grads(merge, both, order=2, modes=("fwd", "rev"), eps=1e-4, rtol=1e-5)


@pytest.mark.parametrize(("shape", "axes"), [((0, 3), (0,)), ((2, 0, 3), (0, 1))])
def test_an_input_without_samples_is_refused_by_name(shape, axes):
    with pytest.raises(ValueError, match=r"`x` has no samples") as raised:
        ops.moments(jnp.ones(shape), axes=axes)
    assert str(shape) in str(raised.value)
