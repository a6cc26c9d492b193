"""The NNX layers are the Linen layers, array for array, with the manners of nnx.Conv and nnx.BatchNorm."""

import itertools
import random
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from nnx_twins import compare, equal, variables_of

import netdeconv_jax
from netdeconv_jax import WhiteningSpec
from netdeconv_jax import nnx as dnnx

X = jnp.ones((2, 8, 8, 4))


def normal(shape, seed=0, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32).astype(dtype)


# dtype, kernel, strides, feature groups, padding, whiten, grouping, bias, mask
AXES = (
    (None, jnp.bfloat16),
    ((1, 1), (3, 3), (3, 2), (3,)),
    (1, 2),
    (1, 2),
    ("SAME", "VALID", "CIRCULAR", ((1, 2), (0, 1))),
    ("patches", "channels"),
    ("interleaved", "contiguous"),
    (True, False),
    (True, False),
)
NAMES = ("dtype", "kernel", "strides", "groups", "padding", "whiten", "grouping", "bias", "mask")
ALL = [c for c in itertools.product(*AXES) if len(c[1]) == 2 or isinstance(c[4], str)]


def few(count, seed):
    """Cases in which every value of every axis occurs."""
    chosen = random.Random(seed).sample(ALL, count)
    for i, values in enumerate(AXES):
        assert {case[i] for case in chosen} == set(values), NAMES[i]
    return chosen


CASES = [
    *few(6, seed=3),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in few(60, seed=4)),
]


@pytest.mark.parametrize(NAMES, CASES)
def test_a_convolution_is_its_linen_twin_array_for_array(
    dtype, kernel, strides, groups, padding, whiten, grouping, bias, mask
):
    settings = {
        "padding": padding,
        "feature_group_count": groups,
        "use_bias": bias,
        "dtype": dtype,
        "whiten": whiten,
        "grouping": grouping,
        "block_size": 2,
        "sampling_stride": 2,
    }
    layer = dnnx.DeconvConv(4, 6, kernel, strides, rngs=nnx.Rngs(0), **settings)
    twin = netdeconv_jax.DeconvConv(6, kernel, strides, **settings)
    x = normal((3, *(7, 6)[: len(kernel)], 4)) + 1
    weights = jnp.ones((3,) + (1,) * (x.ndim - 1)).at[-1].set(0) if mask else None
    compare(layer, twin, x, weights)


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_bias": False, "block_size": 2, "shared_whitener": False},
        {"dtype": jnp.bfloat16, "freeze_schedule": (1, 2)},
        {"method": "eigh", "spec": WhiteningSpec(eps=0.1), "momentum": 0.5},
    ],
)
def test_a_dense_layer_is_its_linen_twin_array_for_array(settings, mask):
    layer = dnnx.DeconvLinear(6, 5, rngs=nnx.Rngs(0), **settings)
    assert type(layer) is dnnx.DeconvDense
    weights = jnp.ones((3, 1, 1)).at[0].set(0) if mask else None
    compare(layer, netdeconv_jax.DeconvDense(5, **settings), normal((3, 8, 6)) + 1, weights)


@pytest.mark.parametrize(
    "settings",
    [
        {"block_size": 2},
        {"block_size": 3, "dtype": jnp.bfloat16, "momentum": 0.5},
        {"block_size": 9, "epsilon": 0.1, "sampling_stride": 1},
    ],
)
def test_a_channel_layer_is_its_linen_twin_array_for_array(settings):
    layer = dnnx.ChannelDeconv(4, rngs=nnx.Rngs(0), **settings)
    mask = jnp.ones((3, 1, 1, 1)).at[0].set(0)
    compare(layer, netdeconv_jax.ChannelDeconv(**settings), normal((3, 7, 6, 4)) + 1, mask)


def test_a_freeze_schedule_counts_and_keeps_as_in_linen():
    settings = {"freeze_schedule": (2, 3), "block_size": 2}
    layer = dnnx.DeconvConv(4, 6, (3, 3), rngs=nnx.Rngs(0), **settings)
    compare(layer, netdeconv_jax.DeconvConv(6, (3, 3), **settings), normal((3, 7, 6, 4)), steps=5)
    assert layer.step is not None
    assert layer.step[...] == 5


def test_float64_stays_in_its_scope():
    with jax.enable_x64():
        x = jnp.asarray(normal((3, 7, 6, 4)), jnp.float64)
        layer = dnnx.DeconvConv(4, 6, (3, 3), param_dtype=jnp.float64, rngs=nnx.Rngs(0))
        compare(layer, netdeconv_jax.DeconvConv(6, (3, 3), param_dtype=jnp.float64), x)
        assert {leaf.dtype for leaf in jax.tree.leaves((layer(x), variables_of(layer)))} == {
            jnp.dtype(jnp.float64)
        }
    assert dnnx.DeconvConv(4, 6, (3, 3), rngs=nnx.Rngs(0))(X).dtype == jnp.float32


# The manners of nnx


class Net(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs, **whitening):
        self.conv = dnnx.DeconvConv(3, 8, (3, 3), 2, rngs=rngs, **whitening)
        self.norm = dnnx.ChannelDeconv(8, block_size=4, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, deterministic=True, rngs=rngs)
        self.head = dnnx.DeconvDense(8, 2, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.conv(x)))
        return self.head(self.dropout(x.mean((1, 2))))


def test_train_eval_and_view_set_which_statistics_are_used():
    net, x = Net(rngs=nnx.Rngs(0)), normal((4, 8, 8, 3))
    layers = (net.conv, net.norm, net.head)
    assert not any(layer.use_running_average for layer in layers)  # as nnx.BatchNorm: training
    net.eval()
    before = variables_of(net)
    evaluated = net(x)
    equal(variables_of(net), before)
    net.train()
    net.dropout.deterministic = True
    trained = net(x)
    assert np.abs(trained - evaluated).max() > 0.1
    changed = variables_of(net)["batch_stats"]
    for name in ("conv", "norm", "head"):
        assert np.abs(changed[name]["mean"] - before["batch_stats"][name]["mean"]).max() > 1e-3
    net.set_attributes(use_running_average=True)
    view = nnx.view(net, use_running_average=False)
    assert all(layer.use_running_average for layer in layers)
    assert not any(layer.use_running_average for layer in (view.conv, view.norm, view.head))


def test_the_calls_argument_goes_before_the_constructors():
    x = normal((2, 8, 8, 4))
    for layer in (
        dnnx.DeconvConv(4, 4, (3, 3), use_running_average=True, rngs=nnx.Rngs(0)),
        dnnx.DeconvDense(4, 4, use_running_average=True, rngs=nnx.Rngs(0)),
        dnnx.ChannelDeconv(4, block_size=4, use_running_average=True),
    ):
        fresh = variables_of(layer)["batch_stats"]
        layer(x)
        equal(variables_of(layer)["batch_stats"], fresh)
        layer(x, use_running_average=False)
        moved = variables_of(layer)["batch_stats"]
        assert np.abs(moved["whitener"] - fresh["whitener"]).max() > 1e-3


def test_split_merge_and_a_restored_state_give_the_same_layer():
    net, x = Net(rngs=nnx.Rngs(0), freeze_schedule=(1, 10)), normal((4, 8, 8, 3))
    net(x)
    net.eval()
    expected = net(x)
    graph, params, stats, rest = nnx.split(net, nnx.Param, dnnx.WhiteningStat, ...)
    assert len(jax.tree.leaves(stats)) == 3 + 5 + 2
    merged = nnx.merge(graph, params, stats, rest)
    np.testing.assert_array_equal(merged(x), expected)
    other = Net(rngs=nnx.Rngs(1), freeze_schedule=(1, 10))
    other.eval()
    assert np.abs(other(x) - expected).max() > 0.1
    nnx.update(other, nnx.state(net))
    np.testing.assert_array_equal(other(x), expected)


def test_kernel_and_bias_carry_their_metadata():
    layer = dnnx.DeconvConv(
        4,
        8,
        (3, 3),
        rngs=nnx.Rngs(0),
        kernel_metadata={"note": "whitened"},
        bias_metadata={"note": "shifted"},
    )
    assert layer.bias is not None
    assert (layer.kernel.note, layer.bias.note) == ("whitened", "shifted")
    mesh = jax.make_mesh((8,), ("model",), axis_types=(AxisType.Auto,))
    with jax.set_mesh(mesh):
        for sharded in (
            dnnx.DeconvDense(
                4, 16, rngs=nnx.Rngs(0), kernel_metadata={"out_sharding": (None, "model")}
            ),
            dnnx.DeconvDense(
                4,
                16,
                rngs=nnx.Rngs(0),
                kernel_init=nnx.with_partitioning(nnx.initializers.lecun_normal(), (None, "model")),
            ),
        ):
            assert sharded.kernel[...].sharding.spec == P(None, "model")
            plain = dnnx.DeconvDense(4, 16, rngs=nnx.Rngs(0))
            x = jax.random.normal(jax.random.key(0), X.shape)
            np.testing.assert_allclose(sharded(x), plain(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(2, 8, 8, 4), (2, 3, 8, 8, 4), (8, 8, 4)])
def test_without_statistics_a_convolution_is_nnx_conv(shape):
    x = normal(shape)
    plain = nnx.Conv(4, 6, (3, 3), 2, rngs=nnx.Rngs(0))
    layer = dnnx.DeconvConv(4, 6, (3, 3), 2, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(layer(x, use_running_average=True), plain(x), rtol=0, atol=1e-5)
    linear = nnx.Linear(4, 6, rngs=nnx.Rngs(0))
    dense = dnnx.DeconvLinear(4, 6, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(dense(x, use_running_average=True), linear(x), rtol=0, atol=1e-5)


def test_the_preferred_element_type_is_that_of_the_result():
    x = normal((2, 8, 8, 4), dtype=jnp.bfloat16)
    options: Any = {"dtype": jnp.bfloat16, "rngs": nnx.Rngs(0)}
    for make in (
        lambda **kw: dnnx.DeconvConv(4, 6, (3, 3), **options, **kw),
        lambda **kw: dnnx.DeconvDense(4, 6, **options, **kw),
        lambda **kw: dnnx.DeconvDense(4, 6, **options, dot_general=jax.lax.dot_general, **kw),
    ):
        assert make()(x).dtype == jnp.bfloat16
        wide = make(preferred_element_type=jnp.float32)
        y = wide(x, use_running_average=True)
        assert y.dtype == jnp.float32
        assert np.any(y != y.astype(jnp.bfloat16).astype(jnp.float32))


def test_training_with_nnx_optimizer_lowers_the_loss_of_all_layers():
    x = normal((32, 8, 8, 3)) + 2
    labels = (x[:, 0, 0, 0] > 2).astype(jnp.int32)
    net = Net(rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(net, optax.adam(0.02), wrt=nnx.Param)

    @nnx.jit
    def step(net, optimizer, x, labels):
        def loss_fn(net):
            return optax.softmax_cross_entropy_with_integer_labels(net(x), labels).mean()

        loss, grads = nnx.value_and_grad(loss_fn)(net)
        optimizer.update(net, grads)
        return loss

    losses = [float(step(net, optimizer, x, labels)) for _ in range(40)]
    assert losses[-1] < 0.2 < 0.6 < losses[0]
    assert net.norm.step[...] == 40


def test_a_sharded_batch_gives_the_statistics_of_the_whole():
    x = normal((16, 8, 8, 3)) + jnp.arange(16.0).reshape(16, 1, 1, 1)
    one, eight = Net(rngs=nnx.Rngs(0)), Net(rngs=nnx.Rngs(0))
    step = nnx.jit(lambda net, x: net(x))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    sharded = jax.device_put(x, NamedSharding(mesh, P("data")))
    np.testing.assert_allclose(step(eight, sharded), step(one, x), rtol=0, atol=2e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
        variables_of(eight),
        variables_of(one),
    )


def test_a_mapped_axis_pools_the_statistics():
    x = normal((8, 2, 8, 8, 3)) + jnp.arange(8.0).reshape(8, 1, 1, 1, 1)
    groups = [[0, 1, 2, 3], [4, 5, 6, 7]]

    def layer(**kw):
        return dnnx.DeconvConv(3, 4, (3, 3), rngs=nnx.Rngs(0), **kw)

    graph, state = nnx.split(layer(axis_name="data", axis_index_groups=groups))
    hash(graph)

    def step(state, x):
        mapped = nnx.merge(graph, state)
        y = mapped(x)
        return y, mapped.mean[...]

    y, means = jax.pmap(step, axis_name="data", in_axes=(None, 0))(state, x)
    for half in (0, 1):
        whole = layer()
        expected = whole(x[4 * half : 4 * half + 4].reshape(8, 8, 8, 3))
        np.testing.assert_allclose(
            y[4 * half : 4 * half + 4].reshape(expected.shape), expected, rtol=0, atol=1e-4
        )
        np.testing.assert_allclose(means[4 * half], whole.mean[...], rtol=1e-5)


# Errors are those of the Linen layers.

CONV: Any = dnnx.DeconvConv
DENSE: Any = dnnx.DeconvDense

BAD_SETTINGS = {
    "block size 0": (ValueError, r"`block_size` .* got 0\.", {"block_size": 0}),
    "unknown whiten": (ValueError, r"`whiten` .* 'pixels'", {"whiten": "pixels"}),
    "eps twice": (ValueError, r"`epsilon` .* 0\.1 and 0\.2", {"eps": 0.2, "epsilon": 0.1}),
    "spec string": (TypeError, r"`spec` must be a WhiteningSpec, got 'fast'", {"spec": "fast"}),
    "feature groups": (
        ValueError,
        r"`feature_group_count` must divide the 4 input channels, got 3",
        {"feature_group_count": 3},
    ),
    "padding": (ValueError, r"`padding` .* 'FULL'", {"padding": "FULL"}),
    "strides": (ValueError, r"`strides` .* \(1, 0\)", {"strides": (1, 0)}),
}

BAD_FIELDS = {
    "dtype": (
        TypeError,
        r"`dtype` must be a floating point dtype, got .*int32",
        {"dtype": jnp.int32},
    ),
    "param_dtype": (TypeError, r"`param_dtype` must be .* 'int32'", {"param_dtype": "int32"}),
    "average": (
        TypeError,
        r"`use_running_average` must be True, False or None, got 'x'",
        {"use_running_average": "x"},
    ),
}

LAYERS: dict[str, Any] = {
    "conv": lambda **k: CONV(4, 6, (3, 3), rngs=nnx.Rngs(0), **k),
    "transposed": lambda **k: dnnx.DeconvConvTranspose(4, 6, (3, 3), rngs=nnx.Rngs(0), **k),
    "dense": lambda **k: DENSE(4, 6, rngs=nnx.Rngs(0), **k),
    "channel": lambda **k: dnnx.ChannelDeconv(4, block_size=2, **k),
}


@pytest.mark.parametrize("name", BAD_SETTINGS)
def test_a_bad_setting_is_refused_when_the_layer_is_made(name):
    error, message, settings = BAD_SETTINGS[name]
    with pytest.raises(error, match=message):
        CONV(4, 6, (3, 3), rngs=nnx.Rngs(0), **settings)


@pytest.mark.parametrize("name", BAD_FIELDS)
@pytest.mark.parametrize("layer", LAYERS)
def test_a_bad_field_is_refused_when_any_layer_is_made(layer, name):
    error, message, settings = BAD_FIELDS[name]
    with pytest.raises(error, match=message):
        LAYERS[layer](**settings)


@pytest.mark.parametrize("layer", LAYERS)
def test_a_call_refuses_flags_that_are_no_bools(layer):
    made = LAYERS[layer]()
    for name in ("use_running_average", "update_whitener"):
        wrong: Any = {name: "x"}
        message = f"`{name}` must be True, False or None, got 'x'"
        with pytest.raises(TypeError, match=message):
            made(X, **wrong)
        with pytest.raises(TypeError, match=message):
            nnx.view(made, **wrong)(X)


@pytest.mark.parametrize("layer", LAYERS)
def test_fields_may_be_numpys_and_dtypes_names(layer):
    made = LAYERS[layer](dtype="bfloat16", param_dtype=np.dtype("float32"))
    assert made(X, np.True_, update_whitener=np.False_).dtype == jnp.bfloat16


BAD_CALLS = {
    "channels": (
        ValueError,
        r"`x` has 3 input channels .* initialized for 4",
        lambda: CONV(4, 6, (3, 3), rngs=nnx.Rngs(0))(X[..., :3]),
    ),
    "features": (
        ValueError,
        r"`x` has 3 input channels .* initialized for 4",
        lambda: DENSE(4, 6, rngs=nnx.Rngs(0))(X[..., :3]),
    ),
    "num_features": (
        ValueError,
        r"`x` has 3 channels, .* `num_features` 4",
        lambda: dnnx.ChannelDeconv(4, block_size=2)(X[..., :3]),
    ),
    "rank": (
        ValueError,
        r"`x` .*\(8, 4\)",
        lambda: CONV(4, 6, (3, 3), rngs=nnx.Rngs(0))(X[0, 0]),
    ),
    "integers": (
        TypeError,
        "`x` must be floating point, got int32",
        lambda: CONV(4, 6, (3, 3), rngs=nnx.Rngs(0))(X.astype("int32")),
    ),
    "nowhere": (
        ValueError,
        r"`use_running_average` .* neither; got None there and None",
        lambda: CONV(4, 6, (3, 3), use_running_average=None, rngs=nnx.Rngs(0))(X),
    ),
    "mask": (
        ValueError,
        r"`mask` must be broadcastable to \(2, 8, 8, 1\)",
        lambda: CONV(4, 6, (3, 3), rngs=nnx.Rngs(0))(X, mask=jnp.ones((3, 1, 1, 1))),
    ),
    "no features": (
        ValueError,
        r"`out_features` .* got 0",
        lambda: CONV(4, 0, (3, 3), rngs=nnx.Rngs(0)),
    ),
    "no inputs": (ValueError, r"`in_features` .* got 0", lambda: DENSE(0, 4, rngs=nnx.Rngs(0))),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_a_bad_call_is_refused_with_the_argument_and_its_value(name):
    error, message, call = BAD_CALLS[name]
    with pytest.raises(error, match=message):
        call()


def test_statistics_of_another_grouping_are_refused():
    layer = CONV(4, 6, (3, 3), rngs=nnx.Rngs(0))
    other = CONV(4, 6, (3, 3), block_size=2, rngs=nnx.Rngs(0))
    layer.mean.set_value(other.mean[...])
    with pytest.raises(ValueError, match=r"`batch_stats` hold a mean of shape \(18,\)"):
        layer(X)


def test_the_effective_block_can_be_read():
    assert CONV(96, 6, (3, 3), rngs=nnx.Rngs(0)).effective_block == 32
    assert DENSE(784, 6, rngs=nnx.Rngs(0)).effective_block == 16
    assert dnnx.ChannelDeconv(4, block_size=9).effective_block == 4


def test_the_submodule_is_loaded_when_it_is_asked_for():
    assert netdeconv_jax.nnx is dnnx
    with pytest.raises(AttributeError, match="no attribute 'nnxx'"):
        netdeconv_jax.nnxx  # noqa: B018
