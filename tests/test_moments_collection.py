"""The collection `moments`: microbatches make one step of the running statistics, that of the whole batch."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from netdeconv_jax import ChannelDeconv, DeconvConv, DeconvDense, models, ops

# 36 pixels: microbatches and the whole batch sample the same rows, whatever the layer.
X = jax.random.normal(jax.random.key(0), (24, 6, 6, 6)) * jnp.arange(1, 25).reshape(-1, 1, 1, 1) + 1
PARTS = X.reshape(3, 8, 6, 6, 6)

LAYERS = {
    "conv": lambda **kw: DeconvConv(8, (3, 3), block_size=2, **kw),
    "conv of whitened channels": lambda **kw: DeconvConv(8, (3, 3), whiten="channels", **kw),
    "conv 1x1": lambda **kw: DeconvConv(8, (1, 1), block_size=3, **kw),
    "conv per group": lambda **kw: DeconvConv(8, (3, 3), block_size=2, shared_whitener=False, **kw),
    "depthwise": lambda **kw: DeconvConv(6, (3, 3), feature_group_count=6, **kw),
    "freezing": lambda **kw: DeconvConv(8, (3, 3), freeze_schedule=(2, 4), **kw),
    "channel": lambda **kw: ChannelDeconv(block_size=4, **kw),
    "channel without rest": lambda **kw: ChannelDeconv(block_size=3, **kw),
    "dense": lambda **kw: DeconvDense(7, **kw),
}


def apply(layer, variables, x, *mutable, **kwargs) -> Any:
    return layer.apply(variables, x, False, mutable=list(mutable), **kwargs)


def start(layer, x=X) -> Any:
    return {"params": {}, **layer.init(jax.random.key(1), x, True)}


def collect(layer, variables, parts, **kwargs) -> Any:
    """The moments of all parts, each pass on top of the last."""
    moments = {}
    for part in parts:
        _, moments = apply(layer, {**variables, **moments}, part, "moments", **kwargs)
    return moments


def accumulated(layer, variables, parts):
    """The running statistics after one step with all parts."""
    moments = collect(layer, variables, parts)
    return apply(layer, {**variables, **moments}, parts[0], "batch_stats")[1]["batch_stats"]


def whole(layer, variables, x=X):
    return apply(layer, variables, x, "batch_stats")[1]["batch_stats"]


def assert_close(actual, expected, tolerance=1e-5):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    assert len(jax.tree.leaves(expected)) >= 2
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(1e-3, np.abs(b).max()))


def assert_equal(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


@pytest.mark.parametrize("name", LAYERS)
def test_microbatches_make_the_step_of_the_whole_batch(name):
    layer = LAYERS[name]()
    variables = start(layer)
    for _ in range(2):  # the second step averages with something
        stats = accumulated(layer, variables, PARTS)
        assert_close(stats, whole(layer, variables))
        variables = {**variables, "batch_stats": stats}


@pytest.mark.parametrize("name", LAYERS)
def test_the_last_microbatch_alone_would_be_another_step(name):
    layer = LAYERS[name]()
    variables = start(layer)
    alone, all_of_it = whole(layer, variables, PARTS[-1]), whole(layer, variables)
    assert float(jnp.abs(alone["mean"] - all_of_it["mean"]).max()) > 1e-3


@pytest.mark.parametrize(
    "name", ["conv", "conv per group", pytest.param("channel", marks=pytest.mark.slow), "dense"]
)
def test_microbatches_make_the_step_of_the_whole_batch_in_float64(name, x64):
    layer = LAYERS[name](param_dtype=jnp.float64)
    x = X.astype(jnp.float64)
    variables = start(layer, x)
    stats = accumulated(layer, variables, x.reshape(PARTS.shape))
    assert stats["mean"].dtype == jnp.float64
    assert_close(stats, whole(layer, variables, x), 1e-13)


@pytest.mark.parametrize("name", LAYERS)
def test_a_pass_that_collects_whitens_by_its_own_batch_and_leaves_batch_stats(name):
    layer = LAYERS[name]()
    variables = start(layer)
    first = collect(layer, variables, PARTS[:1])
    y, updates = apply(layer, {**variables, **first}, PARTS[1], "moments")
    expected, _ = apply(layer, variables, PARTS[1], "batch_stats")
    assert_equal(y, expected)
    assert set(updates) == {"moments"}
    samples = collect(layer, variables, PARTS[1:2])["moments"]["count"]
    assert_equal(updates["moments"]["count"], first["moments"]["count"] + samples)
    assert float(samples.min()) > 0


@pytest.mark.parametrize("name", LAYERS)
def test_a_pass_that_may_do_both_steps_with_its_own_batch(name):
    layer = LAYERS[name]()
    variables = start(layer)
    first = collect(layer, variables, PARTS[:1])
    _, both = apply(layer, {**variables, **first}, PARTS[1], "moments", "batch_stats")
    assert_equal(both["batch_stats"], whole(layer, variables, PARTS[1]))
    assert_equal(both["moments"], collect(layer, variables, PARTS[:2])["moments"])


@pytest.mark.parametrize("name", LAYERS)
def test_given_moments_whiten_in_place_of_the_batch(name):
    layer = LAYERS[name]()
    variables = start(layer)
    moments = collect(layer, variables, [PARTS[0]])
    expected, _ = apply(layer, variables, PARTS[0], "batch_stats")
    y, _ = apply(layer, {**variables, **moments}, PARTS[0], "batch_stats")
    np.testing.assert_allclose(y, expected, atol=1e-5)
    of_another, _ = apply(layer, {**variables, **moments}, PARTS[1], "batch_stats")
    by_itself, _ = apply(layer, variables, PARTS[1], "batch_stats")
    assert float(jnp.abs(of_another - by_itself).max()) > 1e-2


@pytest.mark.parametrize("name", LAYERS)
def test_evaluation_and_initialization_know_nothing_of_moments(name):
    layer = LAYERS[name]()
    variables = start(layer)
    assert set(layer.init(jax.random.key(1), X, False)) <= {"params", "batch_stats"}
    moments = collect(layer, variables, PARTS)
    y, updates = layer.apply({**variables, **moments}, X, True, mutable=["moments"])
    assert_equal(y, layer.apply(variables, X, True))
    assert_equal(updates["moments"], moments["moments"])


def test_the_collection_holds_count_mean_and_covariance():
    layer = DeconvDense(7, block_size=6)
    x = X[:, 0, 0]
    moments = collect(layer, start(layer, x), x.reshape(3, 8, 6))["moments"]
    expected = ops.moments(x)
    assert set(moments) == {"count", "mean", "cov"}
    assert moments["count"] == 24
    np.testing.assert_allclose(moments["mean"], expected.mean, atol=1e-5)
    np.testing.assert_allclose(moments["cov"], expected.cov, rtol=1e-5, atol=1e-3)


def test_channels_left_over_have_moments_of_their_own():
    moments = {
        name: collect(LAYERS[name](), start(LAYERS[name]()), PARTS)["moments"]
        for name in ("channel", "channel without rest")
    }
    names = {"count", "mean", "cov"}
    assert set(moments["channel without rest"]) == names
    assert set(moments["channel"]) == names | {f"rest_{name}" for name in names}
    assert moments["channel"]["rest_count"] == 24 * 36 * 2 / 9


@pytest.mark.parametrize("name", LAYERS)
def test_a_masked_out_microbatch_changes_nothing(name):
    layer = LAYERS[name]()
    variables = start(layer)
    some = collect(layer, variables, PARTS[:2])
    blank = jnp.full_like(X[:8], jnp.nan)
    nothing = jnp.zeros((8, 1, 1, 1))
    _, after = apply(layer, {**variables, **some}, blank, "moments", mask=nothing)
    assert_equal(after["moments"], some["moments"])
    empty = collect(layer, variables, [blank], mask=nothing)
    stats = apply(layer, {**variables, **empty}, blank, "batch_stats")[1]["batch_stats"]
    stats.pop("step", None)  # a step all the same
    expected = {name: variables["batch_stats"][name] for name in stats}
    assert_equal(stats, expected)


def test_frozen_steps_take_no_moments_and_count_once():
    layer = LAYERS["freezing"]()  # active, active, frozen, frozen
    variables = start(layer)
    for step in range(6):
        moments = collect(layer, variables, PARTS)
        assert float(moments["moments"]["count"]) == (0 if step % 4 > 1 else 24 * 4)
        expected = whole(layer, variables)
        stats = apply(layer, {**variables, **moments}, X[:1], "batch_stats")[1]["batch_stats"]
        assert stats["step"] == step + 1
        assert_close(stats, expected)
        variables = {**variables, "batch_stats": stats}


def test_moments_of_another_layer_are_refused():
    narrow = LAYERS["dense"]()
    moments = collect(narrow, start(narrow, X[..., :4]), [X[..., :4]])
    wide = LAYERS["dense"]()
    with pytest.raises(ValueError, match=r"`moments` hold a mean of shape \(4,\).* needs \(6,\)"):
        apply(wide, {**start(wide), **moments}, X, "batch_stats")


def test_running_statistics_that_may_not_change_are_an_error_without_moments_to_collect():
    layer = LAYERS["conv"]()
    variables = start(layer)
    with pytest.raises(Exception, match="immutable"):
        apply(layer, variables, X)
    with pytest.raises(Exception, match="immutable"):
        apply(layer, {**variables, **collect(layer, variables, PARTS)}, X)


def flops(function, *arguments):
    cost: Any = jax.jit(function).lower(*arguments).compile().cost_analysis()
    return cost["flops"]


def test_the_pass_that_updates_costs_the_roots_and_no_forward():
    model = models.create("resnet18", width=0.125)
    x = jnp.ones((32, 32, 32, 3))
    variables: Any = jax.eval_shape(model.init, jax.random.key(0), x)

    def apply(variables, x, mutable):
        return model.apply(variables, x, train=True, mutable=mutable)

    _, moments = jax.eval_shape(lambda v: apply(v, x, ["moments"]), variables)

    def update(variables, x):
        return apply(variables, x, ["batch_stats"])[1]["batch_stats"]

    def roots(moments):
        width = {leaf.shape[-1] for leaf in jax.tree.leaves(moments) if leaf.ndim > 1}
        assert len(width) > 2
        return [ops.inverse_sqrt(leaf) for leaf in jax.tree.leaves(moments) if leaf.ndim > 1]

    forward = flops(update, variables, x)
    rest = flops(update, {**variables, **moments}, x)
    floor = flops(roots, moments["moments"])
    assert rest < 1.1 * floor
    assert rest < forward


@pytest.mark.parametrize("name", ["conv", "freezing", "channel"])
def test_a_rematerialized_layer_collects_the_same(name):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, use_running_average):
            return LAYERS[name](name="layer")(x, use_running_average)

    def grads(model, variables):
        def loss(x):
            y, updates = apply(model, variables, x, "moments")
            return jnp.sum(jnp.sin(y)), updates

        return jax.grad(loss, has_aux=True)(X)

    variables = start(Net())
    again = nn.remat(Net, static_argnums=(2,))()
    assert_close(grads(again, variables), grads(Net(), variables))


# On eight devices.


@functools.cache
def one_device(name):
    layer = LAYERS[name]()
    variables = start(layer)
    return variables, collect(layer, variables, PARTS), accumulated(layer, variables, PARTS)


def both_passes(layer, variables, parts):
    moments = collect(layer, variables, parts)
    return moments, apply(layer, {**variables, **moments}, parts[0], "batch_stats")[1][
        "batch_stats"
    ]


@pytest.mark.parametrize(
    ("name", "axis_type"),
    [
        *((name, AxisType.Auto) for name in LAYERS),
        ("conv", AxisType.Explicit),
        ("conv 1x1", AxisType.Explicit),
        ("channel", AxisType.Explicit),
    ],
)
def test_sharded_microbatches_under_jit_equal_one_device(name, axis_type):
    variables, *expected = one_device(name)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(axis_type,))
    with jax.set_mesh(mesh):
        parts = jax.device_put(PARTS, NamedSharding(mesh, P(None, "data")))
        replicated = jax.device_put(variables, NamedSharding(mesh, P()))
        step = jax.jit(functools.partial(both_passes, LAYERS[name]()))
        assert_close(step(replicated, parts), tuple(expected))


@pytest.mark.parametrize("name", LAYERS)
def test_moments_under_pmap_are_those_of_all_devices(name):
    variables, *expected = one_device(name)
    step = jax.pmap(
        functools.partial(both_passes, LAYERS[name](axis_name="data")),
        axis_name="data",
        in_axes=(None, 1),
    )
    result = step(variables, PARTS.reshape(3, 8, 1, 6, 6, 6))
    for device in (0, 7):
        of_device = jax.tree.map(lambda leaf, i=device: leaf[i], result)
        assert_close(of_device, tuple(expected))


@pytest.mark.parametrize("name", LAYERS)
def test_moments_under_shard_map_are_those_of_all_devices(name):
    variables, *expected = one_device(name)
    step = jax.shard_map(
        functools.partial(both_passes, LAYERS[name](axis_name="data")),
        mesh=jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,)),
        in_specs=(P(), P(None, "data")),
        out_specs=P(),
    )
    assert_close(jax.jit(step)(variables, PARTS), tuple(expected))
