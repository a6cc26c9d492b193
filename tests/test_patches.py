"""im2col, against lookups pixel by pixel, XLA's own patches and nn.Conv."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy_oracle as oracle
import pytest
from flax import linen as nn
from jax import lax

from netdeconv_jax import ops

# (spatial, kernel_size, strides, padding, input_dilation, kernel_dilation)
GEOMETRIES = {
    "1d same": ((7,), (3,), (1,), "SAME", (1,), (1,)),
    "1d same even kernel, stride 3": ((8,), (4,), (3,), "SAME", (1,), (1,)),
    "1d same lower": ((7,), (4,), (2,), "SAME_LOWER", (1,), (1,)),
    "1d causal": ((7,), (3,), (1,), "CAUSAL", (1,), (1,)),
    "1d causal, dilated, stride 2": ((9,), (3,), (2,), "CAUSAL", (1,), (2,)),
    "1d circular": ((5,), (4,), (1,), "CIRCULAR", (1,), (1,)),
    "1d reflect": ((6,), (4,), (1,), "REFLECT", (1,), (1,)),
    "1d input dilation": ((4,), (3,), (1,), ((2, 1),), (3,), (1,)),
    "2d same": ((5, 4), (3, 3), (1, 1), "SAME", (1, 1), (1, 1)),
    "2d same, stride 2": ((6, 5), (3, 3), (2, 2), "SAME", (1, 1), (1, 1)),
    "2d same lower, even kernel": ((6, 5), (2, 4), (2, 3), "SAME_LOWER", (1, 1), (1, 1)),
    "2d valid, strides differ": ((7, 8), (3, 2), (2, 3), "VALID", (1, 1), (1, 1)),
    "2d valid, one window": ((3, 2), (3, 2), (1, 1), "VALID", (1, 1), (1, 1)),
    "2d 1x1": ((4, 3), (1, 1), (1, 1), "SAME", (1, 1), (1, 1)),
    "2d 1x1, stride 2": ((4, 3), (1, 1), (2, 2), "SAME", (1, 1), (1, 1)),
    "2d circular, stride 2": ((5, 6), (3, 4), (2, 1), "CIRCULAR", (1, 1), (1, 1)),
    "2d circular, dilated": ((6, 7), (3, 2), (1, 2), "CIRCULAR", (1, 1), (2, 3)),
    "2d reflect, dilated": ((6, 7), (3, 2), (1, 2), "REFLECT", (1, 1), (2, 3)),
    "2d one number": ((5, 4), (3, 3), (1, 1), ((2, 2), (2, 2)), (1, 1), (1, 1)),
    "2d asymmetric pairs": ((5, 6), (3, 2), (2, 1), ((0, 2), (3, 1)), (1, 1), (1, 1)),
    "2d kernel dilation": ((7, 8), (3, 2), (1, 1), "SAME", (1, 1), (2, 3)),
    "2d input dilation": ((3, 4), (3, 2), (2, 1), ((1, 2), (0, 1)), (2, 3), (1, 1)),
    "2d both dilations": ((3, 4), (2, 3), (1, 2), ((2, 1), (2, 2)), (2, 3), (2, 2)),
    "2d cropping": ((7, 6), (3, 3), (1, 1), ((-1, 0), (1, -2)), (1, 1), (1, 1)),
    "1d windows apart": ((11,), (3,), (4,), "SAME", (1,), (1,)),
    "2d windows side by side": ((7, 8), (3, 2), (3, 2), ((1, 1), (0, 2)), (1, 1), (1, 1)),
    "2d windows apart, the last one short": ((9, 6), (3, 2), (4, 3), "VALID", (1, 1), (1, 1)),
    "2d windows apart, dilated": ((8, 9), (2, 3), (4, 6), "SAME", (1, 1), (3, 2)),
    "2d windows apart along one axis": ((7, 8), (3, 3), (3, 1), "SAME", (1, 1), (1, 1)),
    "3d windows apart": ((5, 4, 6), (2, 1, 3), (2, 2, 3), "VALID", (1, 1, 1), (1, 1, 1)),
    "3d same, stride 2": ((4, 3, 5), (3, 2, 3), (2, 1, 2), "SAME", (1, 1, 1), (1, 1, 1)),
    "3d valid, dilated": ((5, 3, 4), (2, 1, 2), (1, 1, 1), "VALID", (1, 1, 1), (3, 1, 2)),
    "3d circular": ((3, 4, 3), (3, 2, 1), (1, 1, 1), "CIRCULAR", (1, 1, 1), (1, 1, 1)),
}
BATCH, CHANNELS, FEATURES = 2, 3, 4


def geometry_of(name):
    spatial, kernel_size, strides, padding, input_dilation, kernel_dilation = GEOMETRIES[name]
    return spatial, {
        "kernel_size": kernel_size,
        "strides": strides,
        "padding": padding,
        "input_dilation": input_dilation,
        "kernel_dilation": kernel_dilation,
    }


def values(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@functools.cache
def library_patches(name):
    """One compilation for all tests of a geometry: op by op it takes ten times as long."""
    spatial, options = geometry_of(name)
    cut = jax.jit(lambda x: ops.extract_patches(x, **options))
    return cut(values((BATCH, *spatial, CHANNELS)))


def cropped(x, options):
    """The oracle knows no negative padding: take the pixels away instead."""
    if isinstance(options["padding"], str):
        return x, options
    for axis, (low, high) in enumerate(options["padding"]):
        x = np.take(x, range(max(-low, 0), x.shape[1 + axis] - max(-high, 0)), axis=1 + axis)
    pairs = tuple((max(low, 0), max(high, 0)) for low, high in options["padding"])
    return x, options | {"padding": pairs}


@pytest.mark.parametrize("name", GEOMETRIES)
def test_patches_are_the_pixels_that_a_loop_looks_up(name):
    spatial, options = geometry_of(name)
    x = values((BATCH, *spatial, CHANNELS))
    smaller, oracle_options = cropped(x, options)
    found = library_patches(name)
    expected = oracle.patches(smaller, oracle.Geometry(**oracle_options))
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("name", GEOMETRIES)
def test_patches_times_kernel_is_the_convolution_of_flax(name):
    spatial, options = geometry_of(name)
    x = values((BATCH, *spatial, CHANNELS))
    kernel = values((*options["kernel_size"], CHANNELS, FEATURES), seed=1)
    patches = np.asarray(library_patches(name), np.float64)
    ours = np.tensordot(patches, kernel.astype(np.float64), len(spatial) + 1)
    conv = nn.Conv(FEATURES, use_bias=False, precision=lax.Precision.HIGHEST, **options)
    theirs = jax.jit(conv.apply)({"params": {"kernel": kernel}}, x)
    assert ours.shape == theirs.shape
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", GEOMETRIES)
def test_the_window_convolves_as_it_cuts_patches(name):
    spatial, options = geometry_of(name)
    x = values((BATCH, *spatial, CHANNELS))
    kernel = values((*options["kernel_size"], CHANNELS, FEATURES), seed=1)
    patches = np.asarray(library_patches(name), np.float64)
    convolve = functools.partial(ops.window(**options).convolve, precision=lax.Precision.HIGHEST)
    ours = jax.jit(convolve)(x, kernel)
    expected = np.tensordot(patches, kernel.astype(np.float64), len(spatial) + 1)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5)


def test_the_window_convolves_feature_groups_apart():
    x, kernel = map(jnp.asarray, (values((2, 5, 5, 4)), values((3, 3, 2, 6), seed=1)))
    ours = ops.window((3, 3)).convolve(x, kernel, feature_group_count=2)
    halves = [
        ops.window((3, 3)).convolve(x[..., 2 * g : 2 * g + 2], kernel[..., 3 * g : 3 * g + 3])
        for g in range(2)
    ]
    np.testing.assert_allclose(ours, jnp.concatenate(halves, -1), rtol=0, atol=1e-5)


def test_the_window_runs_the_convolution_that_it_is_given():
    def negated(*args, **options):
        return -lax.conv_general_dilated(*args, **options)

    x, kernel = map(jnp.asarray, (values((2, 5, 5, 4)), values((3, 3, 4, 6), seed=1)))
    plain = ops.window((3, 3)).convolve(x, kernel)
    ours = ops.window((3, 3)).convolve(x, kernel, conv_general_dilated=negated)
    np.testing.assert_array_equal(ours, -plain)


# Where XLA's patches know the padding by name, or it is explicit.
XLA_KNOWS = [
    name
    for name, (*_, padding, input_dilation, _) in GEOMETRIES.items()
    if not isinstance(padding, str) or (padding in ("SAME", "VALID") and set(input_dilation) == {1})
]


@pytest.mark.parametrize("name", XLA_KNOWS)
def test_patches_are_those_of_xla_in_another_order(name):
    spatial, options = geometry_of(name)
    ndim = len(spatial)
    x = jnp.asarray(values((BATCH, *spatial, CHANNELS)))
    letters = "DHW"[3 - ndim :]
    cut = functools.partial(
        lax.conv_general_dilated_patches,
        filter_shape=options["kernel_size"],
        window_strides=options["strides"],
        padding=options["padding"],
        lhs_dilation=options["input_dilation"],
        rhs_dilation=options["kernel_dilation"],
        dimension_numbers=(f"N{letters}C", f"{letters}IO", f"N{letters}C"),
        precision=lax.Precision.HIGHEST,
    )
    theirs = np.asarray(jax.jit(cut)(x))
    out = theirs.shape[:-1]  # then (channel, tap)
    theirs = np.moveaxis(theirs.reshape(*out, CHANNELS, *options["kernel_size"]), 1 + ndim, -1)
    np.testing.assert_array_equal(library_patches(name), theirs)


def test_same_padding_with_input_dilation_pads_the_dilated_input():
    # nn.Conv refuses the combination, so that only the definition is left.
    x = values((2, 4, 3, 2))
    options = {
        "kernel_size": (3, 2),
        "strides": (2, 1),
        "padding": "SAME",
        "input_dilation": (2, 3),
    }
    ours = ops.extract_patches(jnp.asarray(x), **options)
    np.testing.assert_array_equal(ours, oracle.patches(x, oracle.Geometry(**options)))


def test_an_int_stands_for_itself_along_every_axis():
    x = jnp.asarray(values((2, 9, 9, 2)))
    short = ops.extract_patches(x, (3, 3), strides=2, padding=1, kernel_dilation=2)
    long = ops.extract_patches(
        x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)), kernel_dilation=(2, 2)
    )
    mixed = ops.extract_patches(x, (3, 3), strides=2, padding=(1, (1, 1)), kernel_dilation=2)
    assert short.shape == (2, 4, 4, 3, 3, 2)
    np.testing.assert_array_equal(short, long)
    np.testing.assert_array_equal(mixed, long)


def test_a_kernel_size_of_one_int_is_one_dimensional_as_in_flax():
    x = jnp.asarray(values((2, 9, 2)))
    np.testing.assert_array_equal(ops.extract_patches(x, 3), ops.extract_patches(x, (3,)))


def test_padding_names_may_be_in_lower_case():
    x = jnp.asarray(values((2, 6, 2)))
    lower, upper = (ops.extract_patches(x, (3,), padding=p) for p in ("valid", "VALID"))
    np.testing.assert_array_equal(lower, upper)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32, jnp.int32, jnp.uint8])
@pytest.mark.parametrize("strides", [1, 3])
@pytest.mark.parametrize("padding", ["SAME", "CIRCULAR", "REFLECT"])
def test_the_dtype_is_that_of_the_input_and_every_value_is_exact(dtype, padding, strides):
    x = np.random.default_rng(0).integers(0, 200, (1, 4, 4, 2))
    cut = jax.jit(lambda x: ops.extract_patches(x, (3, 3), padding=padding, strides=strides))
    found = cut(jnp.asarray(x, dtype))
    expected = oracle.patches(x, oracle.Geometry((3, 3), (strides,) * 2, padding))
    assert found.dtype == dtype
    np.testing.assert_array_equal(found.astype(jnp.int32), expected)


@pytest.mark.parametrize("strides", [1, 3])
def test_float64_stays_float64(x64, strides):
    x = jnp.ones((1, 4, 2), jnp.float64)
    assert ops.extract_patches(x, (3,), strides=strides).dtype == jnp.float64


@pytest.mark.parametrize("strides", [2, (3, 2)])
def test_patches_are_the_same_under_jit_and_vmap(strides):
    x = jnp.asarray(values((3, 2, 7, 5, 2)))

    def cut(x):
        return ops.extract_patches(x, (3, 2), strides=strides, padding="CIRCULAR")

    np.testing.assert_array_equal(jax.jit(jax.vmap(cut))(x), [cut(part) for part in x])


def test_the_gradient_counts_the_windows_over_each_pixel():
    grad = jax.grad(lambda x: ops.extract_patches(x, (3,), padding="SAME").sum())
    np.testing.assert_array_equal(grad(jnp.ones((1, 5, 1)))[0, :, 0], [2, 3, 3, 3, 2])


@pytest.mark.parametrize(
    ("strides", "seen"),
    [(3, [0, 1, 1, 0, 1, 1, 0, 1]), (4, [0, 1, 0, 1, 0, 1, 0, 0]), (9, [0, 1, 0, 0, 0, 0, 0, 0])],
)
def test_the_gradient_counts_windows_that_do_not_overlap(strides, seen):
    def total(x):  # windows start one pixel before the input and see every other pixel
        options: Any = {"padding": ((1, 0),), "strides": strides, "kernel_dilation": 2}
        return ops.extract_patches(x, (2,), **options).sum()

    grad = jax.grad(total)(jnp.ones((1, 8, 1)))
    np.testing.assert_array_equal(grad[0, :, 0], seen)


X4 = (2, 4, 4, 3)


@pytest.mark.parametrize(
    ("shape", "kernel_size", "options", "words"),
    [
        (X4, (5, 3), {"padding": "VALID"}, ["`x`", "(4, 4)", "(5, 3)", "VALID"]),
        (X4, (3, 3), {"padding": "VALID", "kernel_dilation": 2}, ["`x`", "(4, 4)", "(2, 2)"]),
        (X4, (3,), {}, ["`x`", "1 spatial", "(2, 4, 4, 3)"]),
        ((4, 4, 3), (3, 3), {}, ["`x`", "2 spatial", "(4, 4, 3)"]),
        (X4, (), {}, ["`kernel_size`", "()"]),
        (X4, (3, 0), {}, ["`kernel_size`", "(3, 0)"]),
        (X4, (3, 2.5), {}, ["`kernel_size`", "2.5"]),
        (X4, (3, 3), {"strides": 0}, ["`strides`", "0"]),
        (X4, (3, 3), {"strides": (1, 2, 3)}, ["`strides`", "(1, 2, 3)", "2 entries"]),
        (X4, (3, 3), {"kernel_dilation": -1}, ["`kernel_dilation`", "-1"]),
        (X4, (3, 3), {"input_dilation": (0, 1)}, ["`input_dilation`", "(0, 1)"]),
        (X4, (3, 3), {"padding": "FULL"}, ["`padding`", "FULL", "SAME"]),
        (X4, (3, 3), {"padding": "CAUSAL"}, ["`padding`", "CAUSAL", "one spatial axis"]),
        (X4, (3, 3), {"padding": ((1, 1),)}, ["`padding`", "((1, 1),)", "2 entries"]),
        (X4, (3, 3), {"padding": ((1, 1, 1), 2)}, ["`padding`", "(1, 1, 1)"]),
    ],
)
def test_bad_input_names_the_argument_and_its_value(shape, kernel_size, options, words):
    with pytest.raises(ValueError, match=re.escape(words[0])) as raised:
        ops.extract_patches(jnp.ones(shape), kernel_size, **options)
    for word in words:
        assert word in str(raised.value)
