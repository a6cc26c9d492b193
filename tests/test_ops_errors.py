"""What the pure functions refuse: one line that names the argument and what it was."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from netdeconv_jax import ops as typed

ops: Any = typed  # what is given here is wrong on purpose
WINDOW = ops.window((3, 3))
GROUPS = ops.column_groups(channels=2, taps=9, block_size=2)
POINTS = ops.column_groups(channels=2, taps=1, block_size=2)
X = np.ones((4, 5, 5, 2), np.float32)
EYE = np.eye(2, dtype=np.float32)


def fold(kernel=None, bias=None, groups=POINTS, **more):
    kernel = np.ones((1, 1, 2, 3), np.float32) if kernel is None else kernel
    return ops.fold(kernel, bias, np.zeros(2, np.float32), EYE, groups, **more)


TYPES = {
    "`kernel` must be floating point, got int32": lambda: fold(np.ones((1, 1, 2, 3), np.int32)),
    "`groups` must be a ColumnGroups, got None": lambda: fold(groups=None),
    "`dtype` must be a floating point dtype, got <class 'int'>": lambda: fold(dtype=int),
    "`dtype` must be a floating point dtype, got 'int8'": lambda: ops.moments(EYE, dtype="int8"),
    "`axes` must be a sequence of ints, got 0": lambda: ops.moments(EYE, axes=0),
    "`axes` must be a sequence of ints, got '0'": lambda: ops.moments(EYE, axes="0"),
    "`x` must be floating point, got int8": lambda: ops.local_norm(
        np.ones((1, 2), np.int8), axes=(1,)
    ),
    "`eps` must be a number, got '1'": lambda: ops.local_norm(EYE, axes=(1,), eps="1"),
    "`dtype` must be a floating point dtype, got <class 'int'>; patches": lambda: ops.patch_moments(
        X, WINDOW, GROUPS, dtype=int
    ),
    "`shared` must be True or False, got 'no'": lambda: ops.column_groups(4, 9, 2, shared="no"),
    "`channels` must be an int, got '4'": lambda: ops.column_groups("4", 9, 2),
    "`sampling_stride` must be an int, got 1.0": lambda: ops.sampled_rows(
        X.shape, WINDOW, GROUPS, 1.0
    ),
    "`centred` must be a bool, got 1": lambda: ops.sampled_rows(
        X.shape, WINDOW, GROUPS, 1, centred=1
    ),
    "`ridge` must be a number, got 'a'": lambda: ops.eigh(EYE, ridge="a"),
    "`ridge` must be a number, got True": lambda: ops.chebyshev_ridge(EYE, ridge=True),
    "`tol` must be a number, got 'x'": lambda: ops.chebyshev(EYE, tol="x"),
    "`geometry` must be a Window, got None": lambda: ops.patch_moments(X, None, GROUPS),
    "`groups` must be a ColumnGroups, got None; patches": lambda: ops.patch_moments(
        X, WINDOW, None
    ),
    "`num_iters` must be a static int, got 1.5": lambda: ops.inverse_sqrt(
        EYE, method="eigh", num_iters=1.5
    ),
}
VALUES = {
    "`kernel` must be [*kernel_size, channels, features], got shape (2,)": lambda: fold(
        np.ones(2, np.float32)
    ),
    "`x` must be [..., d] with a sample axis in front, got shape (3,)": lambda: ops.moments(
        np.ones(3)
    ),
    "`axes` must be from 0 to 0, got (1,)": lambda: ops.moments(EYE, axes=(1,)),
    "`axes` must be from 0 to 0, got (-1,)": lambda: ops.moments(EYE, axes=(-1,)),
    "`axes` must not name an axis twice, got (0, 0)": lambda: ops.moments(EYE, axes=(0, 0)),
    "`weights` must be broadcastable to (2,), got (3,)": lambda: ops.moments(EYE, np.ones(3)),
    "`axes` must be from -2 to 1, got (5,)": lambda: ops.local_norm(EYE, axes=(5,)),
    "`axes` must not name an axis twice, got (1, -1)": lambda: ops.local_norm(EYE, axes=(1, -1)),
    "`eps` must be at least 0, got -1.0": lambda: ops.local_norm(EYE, axes=(1,), eps=-1.0),
    "`weights` must be broadcastable to (2, 2), got (3,)": lambda: ops.local_norm(
        EYE, np.ones(3), axes=(1,)
    ),
    "`x` must be [batch, *spatial, channels] with 2 spatial axes, got shape (4, 5, 2)": lambda: (
        ops.patch_moments(X[:, 0], WINDOW, GROUPS)
    ),
    "`x` must be [batch, *spatial, channels], got shape (2,)": lambda: ops.patch_moments(
        X[0, 0, 0], WINDOW, POINTS
    ),
    "`groups` must have 2 columns, or 18 with kernel taps, got 27": lambda: ops.patch_moments(
        X, WINDOW, ops.column_groups(3, 9, 3)
    ),
    "`shift` must have shape (18,), got (2,)": lambda: ops.patch_moments(
        X, WINDOW, GROUPS, shift=np.zeros(2)
    ),
    "`x` has no samples: shape (0, 5, 5, 2)": lambda: ops.patch_moments(X[:0], WINDOW, GROUPS),
    "`x` has no samples: shape (0, 5, 5, 2); about a shift": lambda: ops.patch_moments(
        X[:0], WINDOW, GROUPS, shift=np.zeros(18)
    ),
    "`sampling_stride` must be at least 1, got -1": lambda: ops.sampled_rows(
        X.shape, WINDOW, GROUPS, -1
    ),
    "`step` must be at least 1, got -2": lambda: ops.every_nth(X, -2, np.zeros(4, int)),
    "`strides` must hold integers of at least 1, got True": lambda: ops.window((3, 3), True),
    "`ridge` must be finite, got inf": lambda: ops.eigh(EYE, ridge=float("inf")),
    "`ridge` must be finite, got inf; a polynomial": lambda: ops.chebyshev_ridge(
        EYE, ridge=float("inf")
    ),
    "`tol` must be greater than 0, got nan": lambda: ops.chebyshev(EYE, tol=float("nan")),
    "`num_iters` must be at least 1, got -3": lambda: ops.inverse_sqrt(
        EYE, method="eigh", num_iters=-3
    ),
}


def says(error, message):
    text = str(error.value)
    assert "\n" not in text
    assert message.partition("; ")[0] in text  # behind it: what tells two cases apart


@pytest.mark.parametrize("message", TYPES)
def test_an_argument_of_the_wrong_type_is_named(message):
    with pytest.raises(TypeError) as error:
        TYPES[message]()
    says(error, message)


@pytest.mark.parametrize("message", VALUES)
def test_an_argument_of_the_wrong_value_is_named(message):
    with pytest.raises(ValueError, match="`") as error:
        VALUES[message]()
    says(error, message)


def test_weights_may_be_bools_or_fewer_axes_and_samples_integers():
    x, kept = np.array([[1, 4], [3, 0], [200, 7]], np.uint8), np.array([True, True, False])
    expected = ops.moments(np.asarray(x[:2], np.float32))
    found = ops.moments(x, kept)
    np.testing.assert_allclose(found.mean, expected.mean)
    np.testing.assert_allclose(found.cov, expected.cov)
    np.testing.assert_allclose(ops.moments(x, np.float32(2)).mean, np.mean(x, 0), rtol=1e-6)
    normed = ops.local_norm(np.asarray(x.T, np.float32), kept, axes=(1,))
    np.testing.assert_allclose(normed[:, :2], [[-1, 1], [1, -1]], atol=1e-4)


def test_numbers_may_be_scalars_of_any_kind():
    for eps in (0, np.float32(0), np.array(0.0), jnp.bfloat16(0), jnp.float32(0)):
        assert ops.local_norm(jnp.array([[1.0, 3.0]]), axes=(1,), eps=eps).tolist() == [[-1.0, 1.0]]


def test_a_scalar_phase_is_that_of_every_image():
    x = jnp.arange(12.0).reshape(2, 6)
    for phase in (1, np.array(1), jnp.array(1)):
        pixels, _ = ops.every_nth(x, 3, phase)
        assert pixels.tolist() == [[2.0, 5.0], [8.0, 11.0]]


@pytest.mark.parametrize("spec", [P(None, None, None, "d"), P(None, None, "d"), P("d")])
@pytest.mark.parametrize("within", [True, False])
def test_a_kernel_that_is_sharded_over_an_explicit_mesh_is_folded(spec, within):
    """Where `nn.Conv` itself asks for a sharding of its output, features sharded."""
    mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Explicit,), devices=jax.devices()[:2])
    rng = np.random.default_rng(0)
    groups = ops.column_groups(channels=4, taps=8, block_size=2)
    arrays: Any = [
        rng.standard_normal(s).astype(np.float32) for s in ((2, 4, 4, 6), (6,), (16,), (16, 16))
    ]
    expected = ops.fold(*arrays, groups)
    kernel = jax.device_put(arrays[0], NamedSharding(mesh, spec))
    fold = jax.jit(lambda *args: ops.fold(*args, groups))
    if within:
        with jax.set_mesh(mesh):
            found = fold(kernel, *arrays[1:])
    else:
        found = fold(kernel, *arrays[1:])
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
