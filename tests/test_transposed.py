"""The transposed convolution whitens, at every output pixel, the pixels that it sees."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax.extend.core import jaxprs_in_params
from nnx_twins import compare

from netdeconv_jax import DeconvConv, DeconvConvTranspose, ops
from netdeconv_jax import nnx as dnnx
from netdeconv_jax.interop import accumulate, recalibrate

LAYER: Any = DeconvConvTranspose  # for settings that a type checker cannot follow


def normal(shape, seed=0, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def start(layer, x) -> Any:
    return layer.init(jax.random.key(1), x, True)


def train(layer, variables, x, **kwargs) -> Any:
    return layer.apply(variables, x, False, mutable=["batch_stats"], **kwargs)


# kernel, strides, padding, kernel dilation, transposed, spatial shape
PLAIN = [
    ((3, 3), 2, "SAME", 1, False, (5, 4)),
    ((4, 4), 2, "SAME", 1, True, (5, 4)),
    ((4, 3), (2, 3), "VALID", 1, False, (5, 4)),
    ((2, 1), 3, "VALID", 1, True, (3, 4)),
    ((3, 2), (2, 1), ((2, 1), (0, 1)), 1, False, (5, 4)),
    ((3, 3), 2, 2, (2, 1), True, (5, 4)),
    ((5,), 3, "CIRCULAR", 1, False, (4,)),
    ((4, 2), 2, "CIRCULAR", 1, True, (5, 4)),
    ((6,), 4, "SAME", 2, False, (5,)),
    ((2, 2, 3), (2, 1, 2), "SAME", 1, False, (3, 2, 3)),
]
MORE = [
    ((k,), s, padding, d, transpose, (n,))
    for k, s, padding, d, transpose, n in itertools.product(
        (1, 2, 3, 4, 5),
        (1, 2, 3, 4),
        ("SAME", "VALID", "CIRCULAR", ((3, 1),)),
        (1, 2),
        (0, 1),
        (1, 5),
    )
]


@pytest.mark.parametrize(
    "case", [*PLAIN, *(pytest.param(case, marks=pytest.mark.slow) for case in MORE)], ids=str
)
def test_without_statistics_it_is_nn_conv_transpose(case):
    kernel, strides, padding, dilation, transpose, spatial = case
    if isinstance(strides, int):
        strides = (strides,) * len(kernel)
    arguments: Any = {
        "strides": strides,
        "padding": padding,
        "kernel_dilation": dilation,
        "transpose_kernel": bool(transpose),
        "bias_init": nn.initializers.normal(),
    }
    x = normal((2, *spatial, 3))
    plain, layer = nn.ConvTranspose(4, kernel, **arguments), LAYER(4, kernel, **arguments)
    y, variables = plain.init_with_output(jax.random.key(1), x)
    params = variables["params"]
    if not y.size:  # not one window fits; `nn.ConvTranspose` answers nothing
        with pytest.raises(ValueError, match="`x` is smaller than the kernel"):
            start(layer, x)
        return
    variables = start(layer, x)
    assert jax.tree.map(jnp.shape, variables["params"]) == jax.tree.map(jnp.shape, params)
    expected: Any = plain.apply({"params": variables["params"]}, x)
    np.testing.assert_allclose(layer.apply(variables, x, True), expected, rtol=0, atol=1e-5)


def test_batch_axes_are_those_of_nn_conv_transpose():
    layer = LAYER(4, (3, 3), 2)
    x = normal((2, 3, 5, 4, 3))
    variables = start(layer, x)
    y, _ = train(layer, variables, x)
    flat, _ = train(layer, variables, x.reshape(6, 5, 4, 3))
    np.testing.assert_array_equal(y.reshape(flat.shape), flat)
    alone: Any = layer.apply(variables, x[0, 0], True)
    plain: Any = nn.ConvTranspose(4, (3, 3), (2, 2)).apply({"params": variables["params"]}, x[0, 0])
    np.testing.assert_allclose(alone, plain, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("padding", "spatial"), [("SAME", (8, 8)), ("VALID", (9, 8))])
def test_its_linear_map_is_the_adjoint_of_the_convolution(padding, spatial):
    kernel = normal((3, 4, 5, 2))  # of a convolution from 5 channels to 2
    image = jax.ShapeDtypeStruct((2, *spatial, 5), jnp.float32)

    def convolution(image):
        return ops.window((3, 4), 2, padding).convolve(image, kernel)

    out = normal(jax.eval_shape(convolution, image).shape)
    layer = LAYER(5, (3, 4), 2, padding=padding, transpose_kernel=True)
    variables = start(layer, out)
    variables["params"]["kernel"] = kernel
    (expected,) = jax.linear_transpose(convolution, image)(out)
    np.testing.assert_allclose(layer.apply(variables, out, True), expected, rtol=0, atol=1e-4)


def explicitly(x, kernel, bias, geometry, whiten=True):
    """Phase by phase on patches gathered pixel by pixel: (X - mu) D w + b, all in NumPy but the root."""
    full = geometry.window(x.shape[1:-1])
    lows = [low for low, _ in full.padding]
    out = full.out_shape(x.shape[1:-1], full.strides)
    phases: dict[Any, list[Any]] = {}
    for o in np.ndindex(*out):
        taps, pixels = [], []
        for tap in np.ndindex(*geometry.kernel_size):
            at = [
                a + t * d - low
                for a, t, d, low in zip(o, tap, geometry.kernel_dilation, lows, strict=True)
            ]
            if any(a % s for a, s in zip(at, geometry.strides, strict=True)):
                continue  # a zero between pixels
            at = tuple(a // s for a, s in zip(at, geometry.strides, strict=True))
            taps.append(tap)
            inside = all(0 <= a < n for a, n in zip(at, x.shape[1:-1], strict=True))
            pixels.append(
                x[(slice(None), *at)] if inside else 0 * x[(slice(None), *(0,) * len(at))]
            )
        phases.setdefault(tuple(taps), []).append((o, np.stack(pixels, 1) if taps else None))
    y = np.zeros((len(x), *out, kernel.shape[-1])) + bias
    for taps, seen in phases.items():
        if not taps:
            continue
        rows = np.concatenate([patch.reshape(len(x), -1) for _, patch in seen])
        # One tap: samples are the pixels, as under every 1x1 kernel.
        samples = x.reshape(-1, x.shape[-1]) if len(taps) == 1 else rows
        mean = samples.mean(0)
        cov = (samples - mean).T @ (samples - mean) / len(samples)
        root = np.asarray(ops.inverse_sqrt(jnp.asarray(cov + 1e-5 * np.eye(len(cov)))))
        weights = np.stack([kernel[tap] for tap in taps]).reshape(rows.shape[1], -1)
        values = (rows - mean) @ root @ weights
        for (o, _), value in zip(seen, np.split(values, len(seen)), strict=True):
            y[(slice(None), *o)] += value
    return y


EXPLICIT = {
    "uneven phases": ((3, 3), (2, 2), "SAME", 1, (5, 4)),
    "even phases": ((4, 4), (2, 2), "SAME", 1, (5, 4)),
    "one tap each": ((2, 2), (2, 2), "VALID", 1, (5, 4)),
    "phases without taps": ((2, 2), (3, 1), "SAME", 1, (5, 4)),
    "dilated": ((3, 3), (2, 2), "VALID", (3, 2), (5, 4)),
    "strides of three": ((5, 4), (3, 2), ((4, 3), (2, 2)), 1, (5, 4)),
}


@pytest.mark.parametrize("name", EXPLICIT)
def test_it_equals_whitening_the_patches_of_every_phase_by_hand(x64, name):
    kernel, strides, padding, dilation, spatial = EXPLICIT[name]
    x = 3 + normal((6, *spatial, 2), dtype=jnp.float64)
    layer = LAYER(
        3,
        kernel,
        strides,
        padding=padding,
        kernel_dilation=dilation,
        sampling_stride=1,
        param_dtype=jnp.float64,
        bias_init=nn.initializers.normal(),
    )
    variables = start(layer, x)
    y, updates = train(layer, variables, x)
    params = variables["params"]
    geometry = ops.transposed(kernel, strides, padding, dilation)
    expected = explicitly(
        np.asarray(x), np.asarray(params["kernel"]), np.asarray(params["bias"]), geometry
    )
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-8 * np.abs(expected).max())
    once = LAYER(
        3,
        kernel,
        strides,
        padding=padding,
        kernel_dilation=dilation,
        param_dtype=jnp.float64,
        momentum=0.0,
        sampling_stride=1,
    )
    _, updates = train(once, variables, x)  # with a momentum of 0 evaluation is the same
    evaluated = once.apply({**variables, **updates}, x, True)
    np.testing.assert_allclose(evaluated, y, rtol=0, atol=1e-10 * np.abs(expected).max())


def test_the_mean_of_the_input_leaves_no_pattern_in_the_output():
    x = 5 + normal((16, 6, 6, 3))
    layer = LAYER(4, (4, 4), 2, padding=0, sampling_stride=1)
    variables = start(layer, x)
    y, _ = train(layer, variables, x)
    plain: Any = nn.ConvTranspose(4, (4, 4), (2, 2), padding=0).apply(
        {"params": variables["params"]}, x
    )

    def pattern(y):  # the spread of the four phases' means
        means = [y[:, i::2, j::2].mean((0, 1, 2)) for i in (0, 1) for j in (0, 1)]
        return float(jnp.std(jnp.stack(means), axis=0).max() / y.std())

    assert pattern(y) < 1e-5
    assert pattern(plain) > 0.1


@pytest.mark.parametrize("whiten", ["patches", "channels"])
@pytest.mark.parametrize("grouping", ["interleaved", "contiguous"])
@pytest.mark.parametrize("shared", [True, False])
def test_with_strides_of_one_it_is_a_deconv_conv(whiten, grouping, shared):
    settings = {
        "whiten": whiten,
        "grouping": grouping,
        "shared_whitener": shared,
        "block_size": 2,
        "sampling_stride": 2,
    }
    x = 1 + normal((3, 7, 6, 4))
    ours, theirs = LAYER(5, (3, 3), **settings), DeconvConv(5, (3, 3), **settings)
    variables, expected_variables = start(ours, x), start(theirs, x)
    mask = jnp.ones((3, 1, 1, 1)).at[0].set(0)
    y, updates = train(ours, variables, x, mask=mask)
    expected, expected_updates = train(theirs, expected_variables, x, mask=mask)
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-5)
    for name, value in updates["batch_stats"].items():
        have = expected_updates["batch_stats"][name]
        np.testing.assert_allclose(value.reshape(have.shape), have, rtol=0, atol=1e-6)


def test_whitened_channels_share_one_whitener_among_all_phases():
    x = 3 + normal((8, 5, 4, 4))
    layer = LAYER(4, (3, 3), 2, whiten="channels", momentum=0.0, sampling_stride=1)
    variables = start(layer, x)
    y, updates = train(layer, variables, x)
    mean, whitener = (updates["batch_stats"][name] for name in ("mean", "whitener"))
    assert (mean.shape, whitener.shape) == ((4,), (4, 4))
    np.testing.assert_allclose(mean, x.mean((0, 1, 2)), rtol=1e-5)
    plain: Any = nn.ConvTranspose(4, (3, 3), (2, 2))
    white = (x - mean.reshape(1, 1, 1, 4)) @ whitener
    inside = plain.apply({"params": variables["params"]}, white)[:, 1:-1, 1:-1]
    np.testing.assert_allclose(y[:, 1:-1, 1:-1], inside, rtol=0, atol=1e-4)


@pytest.mark.parametrize("transpose", [False, True])
def test_the_nnx_layer_is_its_twin_array_for_array(transpose):
    settings = {"transpose_kernel": transpose, "block_size": 2, "sampling_stride": 1}
    layer = dnnx.DeconvConvTranspose(4, 6, (3, 3), 2, rngs=nnx.Rngs(0), **settings)
    mask = jnp.ones((3, 1, 1, 1)).at[0].set(0)
    compare(layer, LAYER(6, (3, 3), 2, **settings), normal((3, 5, 4, 4)) + 1, mask)


def test_microbatches_and_recalibration_know_the_layer():
    x = 1 + normal((8, 5, 4, 3))
    layer = LAYER(4, (3, 3), 2, sampling_stride=1, use_running_average=False)
    variables = layer.init(jax.random.key(1), x)

    def loss_fn(variables, x, mutable):
        y, updates = layer.apply(variables, x, mutable=mutable)
        return jnp.mean(y**2), (updates, None)

    _, _, stats = accumulate(loss_fn, variables, x.reshape(2, 4, 5, 4, 3))
    _, updates = layer.apply(variables, x, mutable=["batch_stats"])
    for name, value in updates["batch_stats"].items():
        np.testing.assert_allclose(stats[name], value, rtol=0, atol=1e-5)
    free = LAYER(4, (3, 3), 2, sampling_stride=1)
    flags = {"use_running_average": False}
    again = recalibrate(free, variables, [x], apply_kwargs=flags)["batch_stats"]
    np.testing.assert_allclose(0.1 * again["mean"], updates["batch_stats"]["mean"], atol=1e-6)


def test_in_bfloat16_statistics_are_float32_and_evaluation_is_one_convolution():
    x = (30 + normal((4, 6, 6, 4))).astype(jnp.bfloat16)
    layer, exact = (LAYER(8, (4, 4), 2, dtype=d) for d in (jnp.bfloat16, None))
    variables = start(layer, x)
    y, updates = train(layer, variables, x)
    expected, _ = train(exact, variables, x)
    assert y.dtype == jnp.bfloat16
    assert {a.dtype for a in jax.tree.leaves(updates)} == {jnp.dtype(jnp.float32)}
    assert np.abs((y - expected).mean((0, 1, 2))).max() < 0.05
    wide = LAYER(8, (4, 4), 2, dtype=jnp.bfloat16, preferred_element_type=jnp.float32)
    assert train(wide, variables, x)[0].dtype == jnp.float32

    def convolutions(jaxpr):
        for eqn in jaxpr.eqns:
            yield from [eqn] if eqn.primitive.name == "conv_general_dilated" else []
            for inner in jaxprs_in_params(eqn.params):
                yield from convolutions(inner)

    for evaluating in (True, False):
        jaxpr = jax.make_jaxpr(
            lambda x, e=evaluating: layer.apply(variables, x, e, mutable=["batch_stats"])
        )(x)
        assert len(list(convolutions(jaxpr.jaxpr))) == 1


def test_gradients_are_finite_where_statistics_are_degenerate():
    layer = LAYER(4, (3, 3), 2)
    for x in (jnp.zeros((2, 4, 4, 3)), jnp.ones((1, 1, 1, 3)), 1e4 * normal((2, 4, 4, 3))):
        variables = start(layer, x)

        def loss(params, x, variables=variables):
            return jnp.sum(jnp.cos(train(layer, {**variables, "params": params}, x)[0]))

        for leaf in jax.tree.leaves(jax.grad(loss, argnums=(0, 1))(variables["params"], x)):
            assert np.isfinite(leaf).all()


@pytest.mark.parametrize(
    ("message", "settings"),
    [
        (r"`padding` of a transposed .* got 'CAUSAL'", {"padding": "CAUSAL"}),
        (r"`strides` .* \(2, 0\)", {"strides": (2, 0)}),
        (r"`kernel_dilation` .* 0", {"kernel_dilation": 0}),
    ],
)
def test_a_bad_setting_is_refused(message, settings):
    kernel = (3,) if "padding" in settings else (3, 3)
    with pytest.raises(ValueError, match=message):
        start(LAYER(4, kernel, **settings), normal((2, *(5,) * len(kernel), 3)))
    with pytest.raises(ValueError, match=message):
        dnnx.DeconvConvTranspose(3, 4, kernel, rngs=nnx.Rngs(0), **settings)


@pytest.mark.parametrize("transpose", [False, True])
def test_other_channels_are_refused(transpose):
    layer = LAYER(5, (3, 3), 2, transpose_kernel=transpose)
    variables = start(layer, normal((2, 5, 5, 4)))
    with pytest.raises(ValueError, match=r"`x` has 3 input channels .* initialized for 4"):
        layer.apply(variables, normal((2, 5, 5, 3)), True)
