"""`netdeconv_jax.analysis`: every figure against one that can be worked out by hand."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from netdeconv_jax import analysis, ops
from netdeconv_jax.analysis import figures

ANY: Any = lambda wrong: wrong  # noqa: E731, for arguments that a type checker would refuse
WINDOW, GROUPS = ops.window((3, 3)), ops.column_groups(2, 9, 2)
STATISTICS = np.zeros(18, np.float32), np.eye(18, dtype=np.float32)


def patches_covariance(rng, channels=2, taps=9):
    """Of columns in the order (channel, tap), with a condition of about a hundred."""
    size = channels * taps
    basis, _ = np.linalg.qr(rng.normal(size=(size, size)))
    return basis @ np.diag(np.geomspace(1, 1e-2, size)) @ basis.T


def test_the_exact_root_whitens_and_the_spectrum_says_so(x64):
    cov = patches_covariance(np.random.default_rng(0))
    after = analysis.whitened_covariance(cov, ops.eigh(jnp.asarray(cov)))
    np.testing.assert_allclose(analysis.spectrum(cov), np.geomspace(1, 1e-2, 18), rtol=1e-9)
    np.testing.assert_allclose(after, np.eye(18), atol=1e-9)
    assert analysis.condition(cov) == pytest.approx(100)
    assert analysis.condition(after) == pytest.approx(1)


def test_a_singular_covariance_has_an_infinite_condition():
    assert analysis.condition(np.ones((3, 3))) == float("inf")


def test_constant_columns_correlate_with_nothing():
    found = analysis.correlation(np.diag([4.0, 0.0]))
    assert found.tolist() == [[1.0, 0.0], [0.0, 0.0]]


def test_block_correlation_tells_pixels_from_channels():
    pixels, channels = np.full((3, 3), 0.5) + 0.5 * np.eye(3), np.array([[1, -0.25], [-0.25, 1]])
    found = analysis.block_correlation(7 * np.kron(channels, pixels), channels=2)
    assert found.pixels == pytest.approx(0.5)
    assert found.channels == pytest.approx(0.25)
    assert found.both == pytest.approx(0.125)
    assert found.across == pytest.approx((0.25 + 2 * 0.125) / 3)


@pytest.mark.parametrize("channels", [0, 1, 4, 6])
def test_columns_that_are_no_patches_are_refused(channels):
    with pytest.raises(ValueError, match="`channels`"):
        analysis.block_correlation(np.eye(6), channels)


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (
            ValueError,
            r"`cov` must be \[..., d, d\], got shape \(2, 3\)",
            lambda: analysis.spectrum(np.ones((2, 3))),
        ),
        (
            ValueError,
            r"`cov` must be \[d, d\], got shape \(3, 2, 2\)",
            lambda: analysis.condition(np.ones((3, 2, 2))),
        ),
        (
            ValueError,
            r"`whitener` must be of the size of `cov`, \(2, 2\), got shape \(3, 3\)",
            lambda: analysis.whitened_covariance(np.eye(2), np.eye(3)),
        ),
        (
            ValueError,
            r"`cov` must be \[d, d\], got shape \(1, 4, 4\)",
            lambda: analysis.block_correlation(np.ones((1, 4, 4)), 2),
        ),
        (
            TypeError,
            "`channels` must be an int, got 'a'",
            lambda: analysis.block_correlation(np.eye(6), ANY("a")),
        ),
        (
            ValueError,
            r"`x` must be .* with 2 spatial axes, got shape \(4, 4, 2\)",
            lambda: analysis.deconvolved(np.ones((4, 4, 2)), *STATISTICS, WINDOW, GROUPS),
        ),
        (
            TypeError,
            "`x` must be floating point, got uint8",
            lambda: analysis.deconvolved(
                np.ones((1, 4, 4, 2), np.uint8), *STATISTICS, WINDOW, GROUPS
            ),
        ),
        (
            ValueError,
            r"`groups` must divide the 27 columns of 3 channels .* got ColumnGroups.* of 18",
            lambda: analysis.deconvolved(np.ones((1, 4, 4, 3)), *STATISTICS, WINDOW, GROUPS),
        ),
        (
            ValueError,
            r"`groups` must divide the 36 columns of 4 channels .* got ColumnGroups.* of 18",
            lambda: analysis.whitening_filters(np.eye(18), (3, 3), 4, GROUPS),
        ),
        (
            ValueError,
            "`groups` must have one feature group, got 2",
            lambda: analysis.whitening_filters(
                np.ones((2, 9, 9)), (3, 3), 2, ops.column_groups(2, 9, 2, feature_group_count=2)
            ),
        ),
    ],
)
def test_a_bad_argument_is_refused_by_name(error, message, call):
    with pytest.raises(error, match=message):
        call()


def test_stacks_of_matrices_are_taken_where_the_result_is_one_too():
    stack = np.stack([np.eye(2), 4 * np.eye(2)])
    assert analysis.spectrum(stack).tolist() == [[1, 1], [4, 4]]
    assert analysis.whitened_covariance(stack, np.eye(2)).tolist() == stack.tolist()


def test_sparseness_is_that_of_known_distributions():
    rng = np.random.default_rng(0)
    normal, laplace = rng.normal(size=400_000), rng.laplace(size=400_000)
    assert analysis.kurtosis(normal) == pytest.approx(0, abs=0.05)
    assert analysis.kurtosis(laplace) == pytest.approx(3, abs=0.2)
    # E|x| / sqrt(E x^2): sqrt(2 / pi) of a normal variable, sqrt(1 / 2) of a Laplace one.
    assert analysis.hoyer(normal) == pytest.approx(1 - np.sqrt(2 / np.pi), abs=0.01)
    assert analysis.hoyer(laplace) == pytest.approx(1 - np.sqrt(1 / 2), abs=0.01)
    assert analysis.kurtosis(5 * normal + 3) == pytest.approx(analysis.kurtosis(normal))


def test_a_histogram_is_a_density_and_counts_what_is_beyond_it():
    x = np.random.default_rng(0).normal(size=100_000)
    density, edges = analysis.standardized_histogram(x, bins=40, limit=1.0)
    assert (density * np.diff(edges)).sum() == pytest.approx(0.6827, abs=0.005)


@pytest.mark.parametrize(
    "measure", [analysis.kurtosis, analysis.hoyer, analysis.standardized_histogram]
)
@pytest.mark.parametrize("x", [np.zeros(4), np.zeros(0)])
def test_values_without_spread_have_no_sparseness(measure, x):
    with pytest.raises(ValueError, match="`x`"):
        measure(x)


@pytest.mark.parametrize("kind", ["interleaved", "contiguous"])
def test_an_input_is_deconvolved_as_its_patches_are(kind):
    """The middle column of (X - mu) D, worked out on the patch matrix itself."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 5, 6, 4)), jnp.float32)
    window, groups = ops.window((3, 3)), ops.column_groups(4, 9, 2, kind=kind)
    moments = ops.patch_moments(x, window, groups)
    whitener = ops.newton_schulz(moments.cov + 1e-3 * jnp.eye(18), num_iters=5)
    patches = ops.extract_patches(x, (3, 3), padding="SAME")  # [2, 5, 6, 3, 3, 4]
    columns = jnp.moveaxis(patches, -1, 3).reshape(2, 5, 6, 36)
    rows = groups.split(columns) - moments.mean.reshape((1,) * 6 + (18,))
    sharp = groups.join(jnp.einsum("...i,ij->...j", rows, whitener)).reshape(2, 5, 6, 4, 9)
    found = analysis.deconvolved(x, moments.mean, whitener, window, groups)
    np.testing.assert_allclose(found, sharp[..., 4], atol=2e-5)


def test_feature_groups_are_deconvolved_one_by_one():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 5, 6, 4)), jnp.float32)
    mean, whitener = (jnp.asarray(rng.normal(size=(2, *s)), jnp.float32) for s in [(18,), (18, 18)])
    groups = ops.column_groups(4, 9, 64, feature_group_count=2)
    found = analysis.deconvolved(x, mean, whitener, WINDOW, groups)
    alone = [
        analysis.deconvolved(part, mean[i], whitener[i], WINDOW, GROUPS)
        for i, part in enumerate(jnp.split(x, 2, axis=-1))
    ]
    np.testing.assert_allclose(found, jnp.concatenate(alone, -1), atol=1e-4)


def test_whitening_filters_are_the_columns_of_the_whitener():
    rng = np.random.default_rng(0)
    whitener = jnp.asarray(rng.normal(size=(18, 18)), jnp.float32)
    filters = analysis.whitening_filters(whitener, (3, 3), 2, ops.column_groups(2, 9, 2))
    for channel, row, column in [(0, 0, 0), (1, 2, 1)]:
        index = 9 * channel + 3 * row + column
        expected = np.asarray(whitener)[:, index].reshape(2, 3, 3).transpose(1, 2, 0)
        np.testing.assert_allclose(filters[..., channel, row, column], expected, rtol=1e-6)


def test_a_kernel_without_a_middle_is_refused():
    with pytest.raises(ValueError, match="middle"):
        analysis.deconvolved(
            jnp.ones((1, 4, 4, 1)),
            jnp.zeros(4),
            jnp.eye(4),
            ops.window((2, 2)),
            ops.column_groups(1, 4, 1),
        )


def test_centre_surround_knows_on_off_and_neither():
    on = np.full((3, 3), -1.0)
    on[1, 1] = 4.0
    edge = np.array([[1.0, 0, -1]] * 3)
    found = analysis.centre_surround(np.stack([on, -on, edge, np.ones((3, 3))], -1))
    assert found.share == 0.5
    assert analysis.centre_surround(on[..., None]).balance == pytest.approx(2)


def test_random_filters_are_centre_surround_once_in_eighteen():
    filters = np.random.default_rng(0).normal(size=(3, 3, 40_000))
    assert analysis.centre_surround(filters).share == pytest.approx(1 / 18, abs=0.005)


def test_even_filters_are_refused():
    with pytest.raises(ValueError, match="odd"):
        analysis.centre_surround(np.ones((2, 3, 1)))


def test_pictures_are_written(tmp_path):
    edges = np.linspace(-1, 1, 6)
    figures.save_matrices(
        tmp_path / "a.png", {"before": np.eye(4), "after": np.zeros((4, 4))}, block=2
    )
    figures.save_filters(tmp_path / "b.png", {"w": [np.eye(3)] * 2, "v": [np.eye(3)]}, titles="xy")
    figures.save_densities(tmp_path / "c.png", {"x": {"before": (np.ones(5), edges)}})
    figures.save_images(tmp_path / "d.png", {"grey": np.ones((4, 6)), "colour": np.ones((4, 6, 3))})
    for name in "abcd":
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_numbers_come_back_on_the_host():
    found = analysis.spectrum(jax.numpy.eye(3))
    assert isinstance(found, np.ndarray)
    assert found.dtype == np.float64
