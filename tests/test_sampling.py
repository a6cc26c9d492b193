"""Every n-th pixel of a flattened batch, against a slice of the flattened batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from netdeconv_jax import ops

# (batch, pixels, step): divisible or not, steps above the pixels of an image, steps above all pixels
SIZES = [
    (3, 9, 3),
    (2, 10, 3),
    (4, 7, 9),
    (5, 4, 9),
    (3, 8, 16),
    (2, 5, 25),
    (1, 13, 4),
    (6, 1, 4),
    (3, 6, 1),
]


def numbered(batch, pixels):
    """Values that tell where they came from; none is zero."""
    return np.arange(1, batch * pixels + 1, dtype=np.float32).reshape(batch, pixels)


def sampled(batch, pixels, step, start, *, traced):
    """The chosen values in flat order, when the flat count starts at `start`."""
    x = numbered(batch, pixels)
    phase = start + np.arange(batch) * pixels
    if traced:
        found, weights = jax.jit(lambda x, phase: ops.every_nth(x, step, phase))(x, phase)
    else:
        found, weights = ops.every_nth(jnp.asarray(x), step, phase)
    found = np.asarray(found)
    assert found.shape == (batch, -(-pixels // step))
    kept = np.ones(found.shape) if weights is None else np.broadcast_to(weights, found.shape)
    assert set(np.unique(kept)) <= {0, 1}
    np.testing.assert_array_equal(found[kept == 0], 0)
    return found[kept == 1], weights


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize(("batch", "pixels", "step"), SIZES)
def test_the_pixels_are_a_slice_of_the_flat_batch(batch, pixels, step, traced):
    found, _ = sampled(batch, pixels, step, 0, traced=traced)
    np.testing.assert_array_equal(found, numbered(batch, pixels).ravel()[::step])


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("start", [1, 5, 7, 9, 40])
def test_a_phase_continues_the_count_of_what_came_before(start, traced):
    found, _ = sampled(3, 7, 4, start, traced=traced)
    before = np.zeros(start, np.float32)
    everything = np.concatenate([before, numbered(3, 7).ravel()])
    expected = everything[::4]
    np.testing.assert_array_equal(found, expected[expected > 0])


@pytest.mark.parametrize("phase", [np.array([1, 8]), np.array([1 + 4 * 9, 8 + 4 * 5])])
def test_a_phase_counts_modulo_the_step(phase):
    x = jnp.asarray(numbered(2, 7))
    pixels, weights = ops.every_nth(x, 4, phase)
    expected, expected_weights = ops.every_nth(x, 4, np.array([1, 0]))
    np.testing.assert_array_equal(pixels, expected)
    np.testing.assert_array_equal(weights, expected_weights)


def test_there_are_no_weights_without_holes():
    for batch, pixels, step in [(3, 9, 3), (3, 8, 1), (1, 13, 4), (2, 5, 3)]:
        found, weights = sampled(batch, pixels, step, 0, traced=False)
        assert weights is None
        assert found.size == batch * -(-pixels // step)


def test_holes_are_zero_in_weights_and_pixels():
    # 2 x 7 pixels, every fourth: places 0, 4 of the first image and 8, 12 (its 1 and 5) of the second;
    # 2 x 5: places 0, 4 of the first image and only 8 (its 3) of the second.
    _, weights = ops.every_nth(jnp.asarray(numbered(2, 7)), 4, np.array([0, 7]))
    assert weights is None
    pixels, weights = ops.every_nth(jnp.asarray(numbered(2, 5)), 4, np.array([0, 5]))
    np.testing.assert_array_equal(pixels, [[1, 5], [9, 0]])
    np.testing.assert_array_equal(weights, [[1, 1], [1, 0]])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_pixels_keep_their_dtype_and_weights_are_at_least_float32(dtype):
    x = jnp.asarray(numbered(2, 5), dtype)
    pixels, weights = ops.every_nth(x, 4, np.array([0, 5]))
    assert pixels.dtype == dtype
    assert weights is not None
    assert weights.dtype == jnp.float32


def test_trailing_axes_come_along_and_may_have_phases_of_their_own():
    x = numbered(2, 30).reshape(2, 5, 3, 2)
    phase = np.array([[0, 1, 2]])[..., None]  # one for each of the three kinds
    pixels, weights = ops.every_nth(jnp.asarray(x), 3, phase)
    assert weights is not None
    weights = np.broadcast_to(weights, pixels.shape)
    assert pixels.shape == (2, 2, 3, 2)
    for kind in range(3):
        for image in range(2):
            kept = weights[image, :, kind, 0] == 1
            expected = x[image, -kind % 3 :: 3, kind]
            np.testing.assert_array_equal(pixels[image, kept, kind], expected)


def test_what_is_not_chosen_may_be_anything_also_in_the_gradient():
    x = np.full((2, 5), np.nan, np.float32)
    x[0, 0], x[0, 4], x[1, 3] = 1, 2, 3
    grad = jax.grad(lambda x: ops.every_nth(x, 4, np.array([0, 5]))[0].sum())(jnp.asarray(x))
    pixels, _ = ops.every_nth(jnp.asarray(x), 4, np.array([0, 5]))
    np.testing.assert_array_equal(pixels, [[1, 2], [3, 0]])
    np.testing.assert_array_equal(grad, np.isfinite(x).astype(np.float32))
