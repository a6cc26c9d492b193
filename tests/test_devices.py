"""Eight devices give what one device gives: outputs, gradients and statistics of the global batch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from netdeconv_jax import ChannelDeconv, DeconvConv, DeconvDense

# 25 pixels: the sampled rows of 1x1 kernels and channel layers start elsewhere on every device.
X = jax.random.normal(jax.random.key(0), (16, 5, 5, 6)) + 1

LAYERS = {
    "conv": lambda **kw: DeconvConv(8, (3, 3), block_size=2, **kw),
    "conv of whitened channels": lambda **kw: DeconvConv(8, (3, 3), whiten="channels", **kw),
    "conv 1x1": lambda **kw: DeconvConv(8, (1, 1), block_size=3, **kw),
    "conv per group": lambda **kw: DeconvConv(8, (3, 3), block_size=2, shared_whitener=False, **kw),
    "depthwise": lambda **kw: DeconvConv(6, (3, 3), feature_group_count=6, **kw),
    "frozen": lambda **kw: DeconvConv(8, (3, 3), freeze_schedule=(1, 4), **kw),
    "conv of normalized samples": lambda **kw: DeconvConv(8, (3, 3), local_norm="layer", **kw),
    "channel": lambda **kw: ChannelDeconv(block_size=4, **kw),
    "dense": lambda **kw: DeconvDense(7, **kw),
    "dense of normalized samples": lambda **kw: DeconvDense(7, local_norm="layer", **kw),
}


def train_step(layer, variables, x, total=lambda loss: loss):
    """Output, statistics and gradients of a mean over the batch; `total` makes it that of all devices."""

    def loss(params, x):
        y, updates = layer.apply({**variables, "params": params}, x, False, mutable=["batch_stats"])
        return total(jnp.mean(jnp.sin(3 * y + 1))), (y, updates["batch_stats"])

    grads, (y, stats) = jax.grad(loss, argnums=(0, 1), has_aux=True)(variables["params"], x)
    return y, stats, grads


@functools.cache
def one_device(name):
    layer = LAYERS[name]()
    variables = {"params": {}, **layer.init(jax.random.key(1), X, True)}
    return variables, jax.jit(functools.partial(train_step, layer))(variables, X)


def assert_equal(actual, expected):
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * max(1e-3, np.abs(b).max()))


def mesh_of(axis_type):
    return jax.make_mesh((8,), ("data",), axis_types=(axis_type,))


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("name", LAYERS)
def test_a_sharded_batch_under_jit_equals_one_device(name, axis_type):
    variables, expected = one_device(name)
    mesh = mesh_of(axis_type)
    with jax.set_mesh(mesh):
        x = jax.device_put(X, NamedSharding(mesh, P("data")))
        replicated = jax.device_put(variables, NamedSharding(mesh, P()))
        step = jax.jit(functools.partial(train_step, LAYERS[name]()))
        assert_equal(step(replicated, x), expected)


@pytest.mark.parametrize("name", LAYERS)
def test_pmap_with_an_axis_name_equals_one_device(name):
    variables, expected = one_device(name)
    step = jax.pmap(
        functools.partial(train_step, LAYERS[name](axis_name="data")),
        axis_name="data",
        in_axes=(None, 0),
    )
    y, stats, (d_params, dx) = step(variables, X.reshape(8, 2, *X.shape[1:]))
    for leaf in jax.tree.leaves(stats):
        np.testing.assert_array_equal(leaf, np.broadcast_to(leaf[:1], leaf.shape))
    assert_equal(
        (
            y.reshape(expected[0].shape),
            jax.tree.map(lambda a: a[0], stats),
            # The mean of the devices' losses is the loss of the whole.
            (jax.tree.map(lambda g: g.mean(0), d_params), dx.reshape(X.shape) / 8),
        ),
        expected,
    )


@pytest.mark.parametrize("name", LAYERS)
def test_shard_map_with_an_axis_name_equals_one_device(name):
    variables, expected = one_device(name)
    step = functools.partial(
        train_step,
        LAYERS[name](axis_name="data"),
        total=lambda loss: jax.lax.pmean(loss, "data"),
    )
    sharded = jax.shard_map(
        step,
        mesh=mesh_of(AxisType.Auto),
        in_specs=(P(), P("data")),
        out_specs=(P("data"), P(), (P(), P("data"))),
    )
    assert_equal(jax.jit(sharded)(variables, X), expected)


def test_frozen_statistics_of_each_device_work_under_shard_map():
    layer = LAYERS["frozen"]()
    variables = layer.init(jax.random.key(1), X, True)

    def apply(variables, x):
        y, _ = layer.apply(variables, x, False, mutable=["batch_stats"])
        return y

    sharded = jax.shard_map(
        apply, mesh=mesh_of(AxisType.Auto), in_specs=(P(), P("data")), out_specs=P("data")
    )
    each = [apply(variables, x) for x in X.reshape(8, 2, *X.shape[1:])]
    assert_equal(jax.jit(sharded)(variables, X), np.concatenate(each))


def test_index_groups_pool_over_some_devices_only():
    halves = [[0, 2, 4, 6], [1, 3, 5, 7]]
    layer = DeconvConv(8, (1, 1), axis_name="data", axis_index_groups=halves)
    alone = DeconvConv(8, (1, 1))
    variables = alone.init(jax.random.key(1), X, True)
    parts = X.reshape(8, 2, *X.shape[1:])
    y = jax.pmap(
        lambda x: layer.apply(variables, x, False, mutable=["batch_stats"])[0], axis_name="data"
    )(parts)
    for members in halves:
        together = parts[np.array(members)].reshape(8, *X.shape[1:])
        expected, _ = alone.apply(variables, together, False, mutable=["batch_stats"])
        assert_equal(y[np.array(members)].reshape(expected.shape), expected)


def test_the_mean_of_the_devices_own_statistics_would_be_wrong():
    layer, alone = LAYERS["conv"](axis_name="data"), LAYERS["conv"]()
    variables = alone.init(jax.random.key(1), X, True)
    parts = X.reshape(8, 2, *X.shape[1:])

    def whitener(layer):
        return lambda x: layer.apply(variables, x, False, mutable=["batch_stats"])[1]["batch_stats"]

    pooled = jax.pmap(whitener(layer), axis_name="data")(parts)["whitener"][0]
    averaged = jax.pmap(whitener(alone))(parts)["whitener"].mean(0)
    assert float(jnp.abs(pooled - averaged).max()) > 1e-2
