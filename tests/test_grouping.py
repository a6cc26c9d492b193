"""Columns of the patch matrix and the groups that are whitened together."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy_oracle as oracle
import pytest

from netdeconv_jax import ops

SHAPES = [(4, 9, 64), (4, 9, 2), (6, 4, 4), (6, 1, 3), (5, 9, 4), (1, 1, 1), (12, 3, 8), (3, 5, 1)]
NOT_AN_INT: Any = 2.5


@pytest.mark.parametrize(
    ("channels", "block_size", "block"),
    [
        (3, 64, 3),  # block_size above the channels: all of them
        (64, 64, 64),
        (128, 64, 64),
        (96, 64, 32),
        (100, 64, 4),
        (65, 64, 1),
        (784, 512, 16),
        (1, 1, 1),
        (7, 1, 1),
        (12, 13, 12),
    ],
)
def test_the_effective_block_is_all_channels_or_the_greatest_common_divisor(
    channels, block_size, block
):
    assert ops.effective_block(channels, block_size) == block


def test_the_effective_block_is_the_greatest_divisor_of_both_for_all_small_counts():
    for channels in range(1, 33):
        for block_size in range(1, 40):
            expected = oracle.block_of(channels, block_size)
            assert ops.effective_block(channels, block_size) == expected, (channels, block_size)


def test_a_numpy_integer_is_a_block_size():
    block_size: Any = np.int64(64)
    assert ops.effective_block(96, block_size) == 32


@pytest.mark.parametrize("kind", ["interleaved", "contiguous"])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(("channels", "taps", "block_size"), SHAPES)
def test_each_column_lands_where_a_loop_over_the_columns_puts_it(
    channels, taps, block_size, shared, kind
):
    groups = ops.column_groups(channels, taps, block_size, kind=kind, shared=shared)
    (expected,) = oracle.group_columns(channels, taps, block_size, kind)
    found = np.asarray(groups.split(jnp.arange(channels * taps)))
    count, width = len(expected), len(expected[0])
    assert found.shape == ((1, 1, count, width) if shared else (1, count, 1, width))
    np.testing.assert_array_equal(found.reshape(count, width), expected)


def test_interleaved_column_i_is_in_group_i_mod_g_at_position_i_div_g():
    groups = ops.column_groups(channels=4, taps=3, block_size=2)
    found = np.asarray(groups.split(jnp.arange(12)))[0, 0]
    for i in range(12):
        assert found[i % 2, i // 2] == i


def test_contiguous_groups_hold_neighbouring_channels_with_all_their_taps():
    groups = ops.column_groups(channels=4, taps=3, block_size=2, kind="contiguous")
    np.testing.assert_array_equal(
        groups.split(jnp.arange(12))[0, 0], [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]]
    )


@pytest.mark.parametrize("kind", ["interleaved", "contiguous"])
@pytest.mark.parametrize("block_size", [1, 2, 64])
@pytest.mark.parametrize(("channels", "feature_groups"), [(6, 2), (6, 3), (6, 6)])
def test_a_feature_group_is_one_group_of_its_own_channels_whatever_the_block_size(
    channels, feature_groups, block_size, kind
):
    groups = ops.column_groups(
        channels, 4, block_size, kind=kind, feature_group_count=feature_groups
    )
    expected = oracle.group_columns(channels, 4, block_size, kind, feature_groups)
    assert groups.stat_shape == (feature_groups,)
    assert groups.width == channels // feature_groups * 4
    np.testing.assert_array_equal(groups.split(jnp.arange(channels * 4))[:, 0], expected)


@pytest.mark.parametrize("kind", ["interleaved", "contiguous"])
@pytest.mark.parametrize("options", [{}, {"shared": False}, {"feature_group_count": 3}])
@pytest.mark.parametrize("lead", [(), (2,), (2, 3)])
def test_join_undoes_split_and_split_undoes_join(lead, options, kind):
    groups = ops.column_groups(12, 3, 4, kind=kind, **options)
    x = jnp.arange(np.prod((*lead, 36), dtype=int)).reshape(*lead, 36)
    parts = groups.split(x)
    assert parts.shape == (*lead, groups.feature_groups, groups.sets, groups.groups, groups.width)
    np.testing.assert_array_equal(groups.join(parts), x)
    np.testing.assert_array_equal(groups.split(groups.join(parts)), parts)


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ({}, ()),
        ({"shared": False}, (3,)),
        ({"feature_group_count": 4}, (4,)),
        ({"feature_group_count": 4, "shared": False}, (4,)),
    ],
)
def test_statistics_have_a_leading_axis_where_they_are_not_shared(options, shape):
    assert ops.column_groups(12, 9, 4, **options).stat_shape == shape


def test_per_group_statistics_of_a_single_group_have_no_leading_axis():
    assert ops.column_groups(4, 9, 64, shared=False).stat_shape == ()


def test_a_division_is_hashable_so_that_jit_can_take_it_as_static():
    split = jax.jit(lambda groups, x: groups.split(x), static_argnums=0)
    first, again = ops.column_groups(4, 3, 2), ops.column_groups(4, 3, 2)
    assert hash(first) == hash(again)
    np.testing.assert_array_equal(split(first, jnp.arange(12)), again.split(jnp.arange(12)))


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: ops.effective_block(8, 0), ValueError, ["`block_size`", "0"]),
        (lambda: ops.effective_block(8, -3), ValueError, ["`block_size`", "-3"]),
        (lambda: ops.effective_block(8, NOT_AN_INT), TypeError, ["`block_size`", "2.5"]),
        (lambda: ops.effective_block(8, True), TypeError, ["`block_size`", "True"]),
        (lambda: ops.effective_block(0, 8), ValueError, ["`channels`", "0"]),
        (lambda: ops.column_groups(8, 9, 0), ValueError, ["`block_size`", "0"]),
        (lambda: ops.column_groups(8, 9, 4, kind="striped"), ValueError, ["`grouping`", "striped"]),
        (
            lambda: ops.column_groups(8, 9, 4, feature_group_count=3),
            ValueError,
            ["`feature_group_count`", "3", "8"],
        ),
        (
            lambda: ops.column_groups(8, 9, 4, feature_group_count=0),
            ValueError,
            ["`feature_group_count`", "0"],
        ),
        (lambda: ops.column_groups(0, 9, 4), ValueError, ["`channels`", "0"]),
        (lambda: ops.column_groups(8, 0, 4), ValueError, ["`taps`", "0"]),
    ],
)
def test_bad_input_names_the_argument_and_its_value(call, error, words):
    with pytest.raises(error) as raised:
        call()
    for word in words:
        assert word in str(raised.value)
