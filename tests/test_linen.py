"""The Linen layers as users meet them: the manners of nn.Conv, nn.Dense and nn.BatchNorm."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.extend.core import jaxprs_in_params

from netdeconv_jax import ChannelDeconv, DeconvConv, DeconvDense, WhiteningSpec, ops
from netdeconv_jax.whitening import (
    Budget,
    Chebyshev,
    Contiguous,
    Eigh,
    Freeze,
    Interleaved,
    NewtonSchulz,
    Stride,
)


def normal(shape, seed=0, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32).astype(dtype)


def train(layer, variables, x, **kwargs) -> Any:
    return layer.apply(variables, x, False, mutable=["batch_stats"], **kwargs)


def evaluate(layer, variables, x) -> Any:
    return layer.apply(variables, x, True)


def dot(a, b):
    return sum(jax.tree.leaves(jax.tree.map(jnp.vdot, a, b)))


def start(layer, x) -> Any:
    variables = layer.init(jax.random.key(1), x, True)
    return variables if "params" in variables else {"params": {}, **variables}


# Before any statistics exist, evaluation is the plain layer: mean 0, identity.

CONVOLUTIONS = {
    "1d causal": ((2, 9, 4), {"kernel_size": (3,), "padding": "CAUSAL"}),
    "1d int kernel": ((2, 9, 4), {"kernel_size": 3}),
    "2d same": ((2, 7, 6, 4), {"kernel_size": (3, 3)}),
    "2d valid": ((2, 9, 8, 4), {"kernel_size": (3, 2), "strides": (2, 1), "padding": "VALID"}),
    "2d circular": ((2, 7, 6, 4), {"kernel_size": (3, 3), "padding": "CIRCULAR"}),
    "2d reflect": ((2, 7, 6, 4), {"kernel_size": (3, 3), "padding": "REFLECT"}),
    "2d int padding": ((2, 7, 6, 4), {"kernel_size": (3, 3), "padding": 2}),
    "2d pairs": ((2, 7, 6, 4), {"kernel_size": (3, 3), "padding": ((0, 1), (2, 1))}),
    "2d dilated": ((2, 9, 9, 4), {"kernel_size": (3, 3), "kernel_dilation": 2}),
    "2d input dilation": ((2, 5, 5, 4), {"kernel_size": (3, 3), "input_dilation": 2, "padding": 1}),
    "2d groups": ((2, 7, 6, 4), {"kernel_size": (3, 3), "feature_group_count": 2}),
    "2d depthwise": ((2, 7, 6, 4), {"kernel_size": (3, 3), "feature_group_count": 4}),
    "2d pointwise": ((2, 7, 6, 4), {"kernel_size": (1, 1)}),
    "2d no bias": ((2, 7, 6, 4), {"kernel_size": (3, 3), "use_bias": False}),
    "2d no batch": ((7, 6, 4), {"kernel_size": (3, 3)}),
    "2d two batch axes": ((2, 3, 7, 6, 4), {"kernel_size": (3, 3)}),
    "3d": ((2, 4, 5, 6, 4), {"kernel_size": (2, 3, 1)}),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_without_statistics_a_deconv_conv_is_nn_conv(name):
    shape, options = CONVOLUTIONS[name]
    x = normal(shape)
    plain, layer = nn.Conv(8, **options), DeconvConv(8, **options)
    variables = start(layer, x)
    expected: Any = plain.apply({"params": variables["params"]}, x)
    np.testing.assert_allclose(evaluate(layer, variables, x), expected, rtol=0, atol=1e-5)
    assert jax.tree.map(jnp.shape, variables["params"]) == jax.tree.map(
        jnp.shape, plain.init(jax.random.key(1), x)["params"]
    )


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_deconv_conv_equals_whitening_its_patches_by_hand(name):
    shape, options = CONVOLUTIONS[name]
    x = 2 * normal(shape) + 3
    layer = DeconvConv(8, **options, block_size=2, sampling_stride=1, grouping="contiguous")
    variables = start(layer, x)
    y, updates = train(layer, variables, x)
    stats = updates["batch_stats"]

    kernel = variables["params"]["kernel"]
    flat = x.reshape(-1, *x.shape[-kernel.ndim + 1 :])
    window = {k: options[k] for k in options if "size" in k or "dilation" in k or k == "strides"}
    if options.get("padding") == "CAUSAL":
        window["padding"] = ((2, 0),)
    elif "padding" in options:
        window["padding"] = options["padding"]
    if window.get("padding") in ("CIRCULAR", "REFLECT"):
        mode = {"CIRCULAR": "wrap", "REFLECT": "reflect"}[window.pop("padding")]
        flat = jnp.pad(flat, ((0, 0), (1, 1), (1, 1), (0, 0)), mode=mode)
        window["padding"] = "VALID"
    patches = np.asarray(ops.extract_patches(flat, **window), np.float64)
    groups = options.get("feature_group_count", 1)
    out = patches.shape[: kernel.ndim - 1]
    channels = x.shape[-1] // groups
    per_group = 8 // groups
    block = channels if groups > 1 else 2
    # [rows, channels, taps], then every `block` channels as one group: pooled unless feature groups.
    columns = np.moveaxis(patches.reshape(int(np.prod(out)), -1, x.shape[-1]), 1, 2)
    weights = np.moveaxis(np.asarray(kernel, np.float64).reshape(-1, channels, 8), 0, 1)
    expected = np.zeros((len(columns), 8))
    pieces = [
        columns[:, c : c + block].reshape(len(columns), -1) for c in range(0, x.shape[-1], block)
    ]
    means, whiteners = [], []
    for samples in pieces if groups > 1 else [np.concatenate(pieces)]:
        mean = samples.mean(0)
        cov = (samples - mean).T @ (samples - mean) / len(samples)
        means.append(mean)
        whiteners.append(np.asarray(ops.inverse_sqrt(cov + 1e-5 * np.eye(len(cov)))))
    for i, samples in enumerate(pieces):
        mean, whitener = (means[i], whiteners[i]) if groups > 1 else (means[0], whiteners[0])
        first = 0 if groups > 1 else i * block
        features = slice(i * per_group, (i + 1) * per_group) if groups > 1 else slice(None)
        w = weights[first : first + block, :, features].reshape(samples.shape[1], -1)
        expected[:, features] += (samples - mean) @ whitener @ w
    expected = expected.reshape(y.shape)
    np.testing.assert_allclose(y, expected, rtol=0, atol=2e-4 * np.abs(expected).max())
    ours = np.asarray(stats["mean"]).reshape(len(means), -1)
    np.testing.assert_allclose(ours, 0.1 * np.stack(means), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(12, 6), (3, 4, 6), (6,)])
def test_without_statistics_a_deconv_dense_is_nn_dense(shape):
    x = normal(shape)
    layer = DeconvDense(5)
    variables = start(layer, x)
    expected: Any = nn.Dense(5).apply({"params": variables["params"]}, x)
    np.testing.assert_allclose(evaluate(layer, variables, x), expected, rtol=0, atol=1e-6)


def test_a_dense_layer_sees_every_leading_axis_as_samples():
    x = normal((4, 5, 6))
    layer = DeconvDense(3)
    variables = start(layer, x)
    y, updates = train(layer, variables, x)
    y_flat, updates_flat = train(layer, variables, x.reshape(20, 6))
    np.testing.assert_allclose(y.reshape(20, 3), y_flat, rtol=1e-5, atol=1e-6)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), updates, updates_flat
    )


LAYERS = {
    "conv": (lambda **kw: DeconvConv(8, (3, 3), **kw), (4, 6, 6, 4)),
    "conv_pointwise": (lambda **kw: DeconvConv(8, (1, 1), **kw), (4, 6, 6, 4)),
    "dense": (lambda **kw: DeconvDense(8, **kw), (16, 4)),
    "channel": (lambda **kw: ChannelDeconv(block_size=3, **kw), (4, 6, 6, 4)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_statistics_are_stored_in_training_only_and_not_while_initializing(name):
    make, shape = LAYERS[name]
    x = 2 * normal(shape) + 1
    layer = make(use_running_average=False)
    variables = layer.init(jax.random.key(0), x)
    fresh = make().init(jax.random.key(0), x, True)
    jax.tree.map(np.testing.assert_array_equal, variables, fresh)
    stats = variables["batch_stats"]
    width = stats["mean"].shape[-1]
    np.testing.assert_array_equal(stats["mean"], np.zeros(width))
    np.testing.assert_array_equal(stats["whitener"], np.eye(width))
    _, updates = layer.apply(variables, x, mutable=["batch_stats"])
    assert np.abs(updates["batch_stats"]["mean"]).max() > 0.05
    _, untouched = make().apply(variables, x, True, mutable=["batch_stats"])
    jax.tree.map(np.testing.assert_array_equal, untouched["batch_stats"], stats)


def test_momentum_is_the_share_of_the_old_average():
    x = normal((64, 4)) + 5
    layer = DeconvDense(2, momentum=0.75)
    variables = start(layer, x)
    _, updates = train(layer, variables, x)
    np.testing.assert_allclose(updates["batch_stats"]["mean"], 0.25 * x.mean(0), rtol=1e-5)


def test_channel_deconv_starts_its_averages_at_the_first_batch():
    x = normal((8, 6, 6, 5)) + 5
    layer = ChannelDeconv(block_size=4, sampling_stride=1)
    variables = start(layer, x)
    _, first = train(layer, variables, x)
    np.testing.assert_allclose(first["batch_stats"]["mean"], x[..., :4].mean((0, 1, 2)), rtol=1e-5)
    np.testing.assert_allclose(
        first["batch_stats"]["rest_var"], np.var(np.asarray(x[..., 4]), ddof=1), rtol=1e-5
    )
    _, second = train(layer, {**variables, **first}, x + 1)
    np.testing.assert_allclose(
        second["batch_stats"]["mean"] - first["batch_stats"]["mean"], 0.1 * np.ones(4), rtol=1e-3
    )


def test_channel_deconv_with_more_block_than_channels_whitens_them_all():
    x = normal((8, 6, 6, 3)) @ jnp.array([[2.0, 1, 0], [0, 1, 1], [0, 0, 0.5]])
    layer = ChannelDeconv(block_size=64, method="eigh", eps=1e-6, sampling_stride=1)
    y, _ = train(layer, start(layer, x), x)
    flat = np.asarray(y, np.float64).reshape(-1, 3)
    np.testing.assert_allclose(np.cov(flat.T, bias=True), np.eye(3), atol=1e-3)


@pytest.mark.parametrize("dtype", [None, jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("name", LAYERS)
def test_statistics_stay_float32_whatever_the_compute_dtype(name, dtype):
    make, shape = LAYERS[name]
    x = normal(shape, dtype=dtype or jnp.bfloat16) + 1
    layer = make(dtype=dtype)
    variables = start(layer, x)
    y, updates = train(layer, variables, x)
    assert y.dtype == (dtype or jnp.float32)  # bfloat16 input, float32 parameters
    stats = {a.dtype for a in jax.tree.leaves(updates)}
    assert stats <= {jnp.dtype(jnp.float32), jnp.dtype(jnp.int32)}
    assert layer.apply({**variables, **updates}, x, True).dtype == y.dtype
    oracle = make(dtype=jnp.float32)
    expected, oracle_updates = train(oracle, variables, x.astype(jnp.float32))
    tolerance = 2e-6 if dtype in (None, jnp.float32) else 0.05
    np.testing.assert_allclose(y.astype(jnp.float32), expected, rtol=0, atol=tolerance * 3)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-5), updates, oracle_updates
    )


def test_float64_parameters_keep_float64_statistics():
    with jax.enable_x64():
        x = jnp.asarray(normal((4, 6, 6, 4)), jnp.float64)
        layer = DeconvConv(8, (3, 3), param_dtype=jnp.float64)
        y, updates = train(layer, start(layer, x), x)
        assert {a.dtype for a in jax.tree.leaves((y, updates))} == {jnp.dtype(jnp.float64)}


@pytest.mark.parametrize("name", ["conv", "dense"])
def test_in_bfloat16_no_feature_is_shifted_by_a_large_mean(name):
    _, shape = LAYERS[name]
    x = normal((64, *shape[1:-1], 32)) + 30
    if name == "conv":
        layer, exact = (
            DeconvConv(16, (3, 3), padding="VALID", dtype=d) for d in (jnp.bfloat16, None)
        )
    else:
        layer, exact = (DeconvDense(16, dtype=d) for d in (jnp.bfloat16, None))
    x = x.astype(jnp.bfloat16)
    variables = start(exact, x)
    error = np.asarray(
        train(layer, variables, x)[0].astype(jnp.float32) - train(exact, variables, x)[0]
    ).reshape(-1, 16)
    rounding = np.sqrt(np.mean(error**2))
    assert np.abs(error.mean(0)).max() < (0.006 if name == "dense" else 0.02)
    assert rounding < (0.006 if name == "dense" else 0.1)


# Masks


@pytest.mark.parametrize("name", ["conv", "dense", "channel"])
def test_masked_samples_leave_no_trace_in_the_statistics(name):
    make, shape = LAYERS[name]
    x = normal(shape) + 1
    x = x.at[-1].set(1e30)
    mask = jnp.ones((shape[0],) + (1,) * (len(shape) - 1)).at[-1].set(0)
    layer = make() if name == "dense" else make(sampling_stride=1)
    variables = start(layer, x)
    y, updates = train(layer, variables, x, mask=mask)
    y_kept, expected = train(layer, variables, x[:-1])
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), updates, expected
    )
    np.testing.assert_allclose(y[:-1], y_kept, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", LAYERS)
def test_a_batch_that_is_masked_out_altogether_changes_nothing(name):
    make, shape = LAYERS[name]
    x = normal(shape)
    layer = make()
    variables = start(layer, x)
    _, before = train(layer, variables, x)
    y, after = train(
        layer, {**variables, **before}, x, mask=jnp.zeros((shape[0],) + (1,) * (len(shape) - 1))
    )
    jax.tree.map(np.testing.assert_array_equal, before, after)
    np.testing.assert_allclose(y, evaluate(layer, {**variables, **before}, x), atol=1e-5)


# The freeze schedule


def test_the_freeze_schedule_computes_then_keeps_statistics():
    layer = DeconvConv(4, (3, 3), freeze_schedule=Freeze(active_steps=2, period=4))
    x = normal((4, 6, 6, 3))
    variables = start(layer, x)
    step = jax.jit(lambda v, x: train(layer, v, x))
    changed = []
    for i in range(8):
        y, updates = step(variables, x * (i + 1))
        before, after = variables["batch_stats"], updates["batch_stats"]
        assert after["step"] == i + 1
        changed.append(bool((before["whitener"] != after["whitener"]).any()))
        frozen_output = evaluate(layer, variables, x * (i + 1))
        assert bool(jnp.allclose(y, frozen_output, atol=1e-5)) == (not changed[-1])
        variables = {**variables, **updates}
    assert changed == [True, True, False, False] * 2


def test_frozen_statistics_take_no_gradient():
    layer = DeconvConv(4, (3, 3), freeze_schedule=(1, 100))
    x = normal((4, 6, 6, 3))
    variables = start(layer, x)
    _, updates = train(layer, variables, x)

    def loss(stats):
        return jnp.sum(train(layer, {**variables, "batch_stats": stats}, x)[0] ** 2)

    grads = jax.grad(loss, allow_int=True)(updates["batch_stats"])
    assert not np.any(grads["whitener"])
    assert not np.any(grads["mean"])


def test_the_original_schedule_is_the_default():
    assert Freeze() == Freeze(101, 1000)


def test_statistics_without_a_count_can_be_evaluated_under_a_freeze_schedule():
    x = normal((4, 6, 6, 3))
    variables = start(DeconvConv(4, (3, 3)), x)
    frozen = DeconvConv(4, (3, 3), freeze_schedule=Freeze())
    assert "step" not in variables["batch_stats"]
    np.testing.assert_array_equal(
        evaluate(frozen, variables, x), evaluate(DeconvConv(4, (3, 3)), variables, x)
    )


# Settings


def test_the_layers_can_be_tabulated_and_intercepted_as_others_can():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = DeconvConv(4, (3, 3), use_running_average=True)(x)
            x = ChannelDeconv(block_size=4, use_running_average=True)(x)
            return DeconvDense(2, use_running_average=True)(x)

    wide = {"width": 240, "force_terminal": False}
    table = Net().tabulate(jax.random.key(0), normal((2, 6, 6, 3)), console_kwargs=wide)
    assert all(name in table for name in ("DeconvConv_0", "ChannelDeconv_0", "DeconvDense_0"))
    seen = []

    def spy(call, args, kwargs, context):
        seen.append((type(context.module).__name__, context.method_name))
        return call(*args, **kwargs)

    with nn.intercept_methods(spy):
        Net().init(jax.random.key(0), normal((2, 6, 6, 3)))
    layers = ["Net", "DeconvConv", "ChannelDeconv", "DeconvDense"]
    assert seen == [(name, "__call__") for name in layers]


def test_a_method_keeps_the_number_of_iterations_where_it_has_one():
    spec = WhiteningSpec(num_iters=15)
    assert spec.replace(method="chebyshev").root == Chebyshev(num_iters=15)
    assert spec.replace(method="chebyshev").replace(method="newton_schulz") == spec
    assert DeconvConv(8, 3, method="eigh", num_iters=5).resolved_spec().root == Eigh()
    assert DeconvConv(8, 3, method="chebyshev", num_iters=3).resolved_spec().root == Chebyshev(
        num_iters=3
    )
    ridged = WhiteningSpec(root=Eigh(ridge=0.01))
    assert ridged.replace(method="eigh", num_iters=5) == ridged
    assert ridged.replace(method="newton_schulz", num_iters=7).root == NewtonSchulz(7)


def test_keywords_override_the_spec_and_both_spellings_of_eps_are_known():
    spec = WhiteningSpec(block_size=16, num_iters=3)
    layer = DeconvConv(8, (3, 3), spec=spec, num_iters=7, epsilon=1e-3)
    assert layer.resolved_spec() == spec.replace(root=NewtonSchulz(7), eps=1e-3)
    assert layer.effective_block(24) == 8
    assert DeconvConv(8, (3, 3)).resolved_spec() == WhiteningSpec()
    assert DeconvDense(8).effective_block(784) == 16
    assert ChannelDeconv(block_size=4).resolved_spec().eps == 1e-2
    assert DeconvConv(8, (3, 3), feature_group_count=4).effective_block(24) == 6


def test_a_spec_is_frozen_hashable_and_flat_keywords_are_shorthand():
    spec = WhiteningSpec()
    assert (spec.root, spec.sampling, spec.grouping) == (
        NewtonSchulz(5),
        Stride(3),
        Interleaved(64),
    )
    assert (spec.eps, spec.momentum, spec.whiten, spec.freeze) == (1e-5, 0.9, "patches", None)
    assert hash(spec) == hash(WhiteningSpec(block_size=64))
    assert spec.replace(grouping="contiguous", shared_whitener=False) == WhiteningSpec(
        grouping=Contiguous(64, shared=False)
    )
    assert spec.replace(method="eigh").root == Eigh()
    assert spec.replace(method="eigh").replace(method="newton_schulz", num_iters=2).root == (
        NewtonSchulz(2)
    )
    centred = spec.replace(sampling_centred=True)
    assert centred == WhiteningSpec(sampling=Stride(3, centred=True))
    assert centred.replace(sampling_stride=2).sampling == Stride(2, centred=True)
    fast = WhiteningSpec.fast()
    assert fast.replace(sampling_centred=False).sampling == Budget(centred=False)
    assert fast.replace(sampling_stride=2).sampling == Stride(2, centred=True)
    with pytest.raises(AttributeError):
        spec.eps = 1.0  # pyright: ignore[reportAttributeAccessIssue]


def test_strides_are_the_last_positional_so_that_factories_work():
    layer = DeconvConv(8, (3, 3), (2, 2))
    assert layer.strides == (2, 2)
    with pytest.raises(TypeError):
        DeconvConv(8, (3, 3), (2, 2), "SAME")  # pyright: ignore[reportCallIssue]


@pytest.mark.parametrize("grouping", ["interleaved", "contiguous"])
@pytest.mark.parametrize("whiten", ["patches", "channels"])
def test_every_group_can_have_a_whitener_of_its_own(grouping, whiten):
    x = normal((8, 6, 6, 6)) * jnp.arange(1, 7).reshape(1, 1, 1, 6)
    layer = DeconvConv(
        4, (3, 3), block_size=2, grouping=grouping, whiten=whiten, shared_whitener=False
    )
    variables = start(layer, x)
    width = 2 * (9 if whiten == "patches" else 1)
    assert variables["batch_stats"]["whitener"].shape == (3, width, width)
    y, updates = train(layer, variables, x)
    assert np.isfinite(y).all()
    evaluated = evaluate(layer, {**variables, **updates}, x)
    assert evaluated.shape == y.shape


def test_whitened_channels_of_a_1x1_kernel_are_its_patches():
    x = normal((4, 6, 6, 8)) + 1
    patches, channels = (
        DeconvConv(4, (1, 1), block_size=4, whiten=w) for w in ("patches", "channels")
    )
    variables = start(patches, x)
    for a, b in zip(
        jax.tree.leaves(train(patches, variables, x)),
        jax.tree.leaves(train(channels, variables, x)),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


def test_a_custom_convolution_is_called_like_nn_convs():
    calls = []

    def spy(*args, **kwargs):
        calls.append(kwargs["feature_group_count"])
        return jax.lax.conv_general_dilated(*args, **kwargs)

    x = normal((2, 6, 6, 4))
    layer = DeconvConv(4, (3, 3), feature_group_count=2, conv_general_dilated=spy)
    layer.apply(start(layer, x), x, True)
    assert calls == [2, 2]  # initialization, application


# Differentiation and transformation


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_agree_with_finite_differences_to_second_order(name):
    make, shape = LAYERS[name]
    with jax.enable_x64():
        x = jax.random.normal(jax.random.key(0), (*shape[:-1], 3), jnp.float64)
        layer = make(param_dtype=jnp.float64, eps=0.1, num_iters=2)
        variables = start(layer, x)

        def forward(params, x):
            return jnp.sum(jnp.sin(train(layer, {**variables, "params": params}, x)[0]))

        point = (variables["params"], x)
        keys = iter(jax.random.split(jax.random.key(2), 8))
        along = jax.tree.map(lambda a: jax.random.normal(next(keys), a.shape, a.dtype), point)
        gradient = jax.jit(jax.grad(forward, argnums=(0, 1)))

        @jax.jit
        def derivatives(point, along):
            slope = jax.jvp(forward, point, along)[1]
            forward_over_reverse = jax.jvp(jax.grad(forward, (0, 1)), point, along)[1]
            reverse_over_reverse = jax.grad(
                lambda point: dot(jax.grad(forward, (0, 1))(*point), along)
            )(point)
            return slope, forward_over_reverse, reverse_over_reverse

        step = 1e-5
        ahead, behind = (
            jax.tree.map(lambda a, b, h=h: a + h * b, point, along) for h in (step, -step)
        )
        slope, *hessian_rows = derivatives(point, along)
        value = jax.jit(forward)
        finite = (value(*ahead) - value(*behind)) / (2 * step)
        np.testing.assert_allclose(slope, finite, rtol=1e-6)
        np.testing.assert_allclose(dot(gradient(*point), along), finite, rtol=1e-6)
        for row in hessian_rows:
            for ours, g1, g0 in zip(
                jax.tree.leaves(row),
                jax.tree.leaves(gradient(*ahead)),
                jax.tree.leaves(gradient(*behind)),
                strict=True,
            ):
                finite = (g1 - g0) / (2 * step)
                np.testing.assert_allclose(ours, finite, atol=1e-6 * np.abs(finite).max())


DEGENERATE = {
    "constant channel": lambda x: x.at[..., 0].set(3.0),
    "all zeros": lambda x: 0 * x,
    "values of 1e4": lambda x: 1e4 * x,
    "values of 1e-6": lambda x: 1e-6 * x,
    "few rows": lambda x: x[:2],
    "one sample": lambda x: x[:1, :1, :1] if x.ndim == 4 else x[:1],
}


@pytest.mark.parametrize("method", ["newton_schulz", "eigh"])
@pytest.mark.parametrize("name", LAYERS)
def test_degenerate_input_gives_finite_outputs_and_gradients(name, method):
    make, shape = LAYERS[name]
    layer = make(method=method)
    variables = start(layer, normal(shape))

    @jax.jit
    def run(params, x):
        def loss(params, x):
            y, updates = train(layer, {**variables, "params": params}, x)
            return jnp.mean(jnp.cos(y)), (y, updates)

        return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, x)

    for kind, degenerate in DEGENERATE.items():
        for leaf in jax.tree.leaves(run(variables["params"], degenerate(normal(shape)))):
            assert np.isfinite(leaf).all(), kind


def test_the_layers_work_under_vmap_scan_and_remat():
    x = normal((3, 4, 6, 6, 4))
    layer = DeconvConv(4, (3, 3))
    variables = start(layer, x[0])
    each = [train(layer, variables, xi)[0] for xi in x]
    mapped, _ = jax.vmap(lambda xi: train(layer, variables, xi))(x)
    np.testing.assert_allclose(mapped, np.stack(each), rtol=1e-4, atol=1e-5)

    def body(carry, _):
        y, updates = train(
            layer, {"params": variables["params"], "batch_stats": carry[1]}, carry[0]
        )
        return (y, updates["batch_stats"]), None

    (scanned, _), _ = jax.lax.scan(body, (x[0], variables["batch_stats"]), None, length=2)
    once, updates = train(layer, variables, x[0])
    twice, _ = train(layer, {**variables, **updates}, once)
    np.testing.assert_allclose(scanned, twice, rtol=1e-4, atol=1e-4)

    remat = nn.remat(DeconvConv)(4, (3, 3), use_running_average=False)
    y, _ = remat.apply(variables, x[0], mutable=["batch_stats"])
    np.testing.assert_allclose(y, each[0], rtol=1e-5, atol=1e-5)


def test_covariance_and_root_run_at_highest_precision_whatever_the_layers():
    x = normal((4, 6, 6, 8))
    layer = DeconvConv(4, (3, 3), block_size=4, precision="default")
    variables = start(layer, x)
    jaxpr = jax.make_jaxpr(lambda x: train(layer, variables, x))(x)

    def dots(jaxpr):
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == "dot_general":
                yield eqn.params["precision"]
            for sub in jaxprs_in_params(eqn.params):
                yield from dots(sub)

    found = list(dots(jaxpr.jaxpr))
    highest = jax.lax.Precision.HIGHEST
    assert len(found) == 1 + 12 + 2  # covariance, five iterations, fold
    assert set(found) == {(highest, highest)}


# Cheaper statistics


@pytest.mark.parametrize(
    ("rows_per_dim", "finer_below", "stride"),
    # 36 dimensions and 8 images: strides of 1 to 7 give 128, 32, 14.2, 8, 5.6, 3.6 and 2 rows each.
    [
        (16, 15, 2),
        (16, 14, 3),
        (16, 200, 2),
        (14, 8, 3),
        (8, 8, 4),
        (6, 8, 4),
        (5, 8, 5),
        (200, 8, 3),
    ],
)
def test_a_budget_takes_the_coarsest_grid_that_is_fine_enough(rows_per_dim, finer_below, stride):
    x, spec = normal((8, 24, 24, 4)), WhiteningSpec(sampling=Budget(rows_per_dim, finer_below))
    groups = ops.column_groups(4, 9, 64)
    expected = ops.patch_moments(
        x, ops.window((3, 3)), groups, sampling_stride=stride, centred=True
    )
    layer = DeconvConv(4, (3, 3), spec=spec, momentum=0.0)
    _, updated = train(layer, start(layer, x), x)
    np.testing.assert_allclose(updated["batch_stats"]["mean"], expected.mean, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("sampling", "stride"),
    [
        (Stride(3), 3),
        (Stride(3, centred=True), 3),
        # 72 samples at least, nine of each image: so have strides 8 to 11 from the corner, 7 to 9 centred.
        (Budget(2, centred=False), 9),
        (Budget(2), 8),
    ],
)
def test_a_grid_begins_where_its_sampling_says(sampling, stride):
    x = normal((8, 24, 24, 4))
    expected = ops.patch_moments(
        x,
        ops.window((3, 3)),
        ops.column_groups(4, 9, 64),
        sampling_stride=stride,
        centred=sampling.centred,
    )
    layer = DeconvConv(4, (3, 3), spec=WhiteningSpec(sampling=sampling), momentum=0.0)
    _, updated = train(layer, start(layer, x), x)
    np.testing.assert_allclose(updated["batch_stats"]["mean"], expected.mean, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("side", "rows"), [(1, 128), (2, 128)])
def test_a_budget_thins_no_images(side, rows):
    # Of a map that is smaller than the default's stride: each image is in the statistics.
    x = normal((128, side, side, 16))
    layer = DeconvConv(4, (1, 1), spec=WhiteningSpec.fast(), momentum=0.0)
    variables = start(layer, x)

    def mean(x):
        return train(layer, variables, x)[1]["batch_stats"]["mean"].sum()

    seen = np.abs(jax.grad(mean)(x)).sum((1, 2, 3)) > 0
    assert seen.sum() == rows


def test_a_budget_that_is_not_there_takes_all_of_it():
    x = normal((1, 6, 6, 4))
    spec = WhiteningSpec(sampling=Budget(16, finer_below=16))
    few, all_of_it = DeconvConv(4, (3, 3), spec=spec), DeconvConv(4, (3, 3), sampling_stride=1)
    variables = start(few, x)
    jax.tree.map(
        np.testing.assert_array_equal, train(few, variables, x), train(all_of_it, variables, x)
    )


def test_the_fast_spec_is_what_its_docstring_says():
    root = Chebyshev(tol=6e-3, num_iters=3)
    assert WhiteningSpec.fast() == WhiteningSpec(root=root, sampling=Budget(16), block_size=16)


@pytest.mark.parametrize(("tol", "bound"), [(6e-3, 5e-3), (1e-4, 3e-4)])
def test_the_fast_spec_trains_and_its_root_is_the_papers_to_its_tolerance(tol, bound):
    spec = WhiteningSpec.fast().replace(root=Chebyshev(tol=tol, num_iters=3))
    x = normal((8, 12, 12, 32))
    fast = DeconvConv(4, (3, 3), spec=spec)
    slow = DeconvConv(4, (3, 3), spec=spec, method="newton_schulz")
    variables = start(fast, x)
    y, _ = train(fast, variables, x)
    expected, _ = train(slow, variables, x)
    np.testing.assert_allclose(y, expected, rtol=0, atol=bound * np.abs(expected).max())
