"""Diagnostics of whitening give the numbers that follow from known eigenvalues, and survive what diverged."""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from netdeconv_jax import DeconvConv, ops
from train import diagnostics, metrics
from train.diagnostics import format_table, layer_diagnostics, layer_names


def symmetric(eigenvalues, seed=0):
    """A matrix of these eigenvalues, with eigenvectors drawn at random, and its inverse square root."""
    values = np.asarray(eigenvalues, np.float64)
    q, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(len(values),) * 2))
    return q * values @ q.T, q * np.maximum(values, 1e-30) ** -0.5 @ q.T


def layer(cov, whitener, count=100.0):
    moments = {"count": np.asarray(count), "mean": np.zeros(cov.shape[:-1]), "cov": cov}
    return moments, {"mean": np.zeros(cov.shape[:-1]), "whitener": whitener}


def diagnose(cov, whitener, count: Any = 100.0, **settings):
    moments, stats = layer(cov, whitener, count)
    return layer_diagnostics({"a": moments}, {"a": stats}, **settings)["a"]


def test_the_exact_root_brings_the_condition_number_to_one():
    cov, root = symmetric([100.0, 10.0, 1.0, 0.5])
    found = diagnose(cov, root, eps=0.0)
    assert found["condition_before"] == pytest.approx(200)
    assert found["condition_after"] == pytest.approx(1)
    assert found["whitener_norm"] == pytest.approx(2**0.5)
    assert found["finite"] is True


def test_the_identity_leaves_the_condition_number():
    cov, _ = symmetric([9.0, 1.0, 0.0])
    found = diagnose(cov, np.eye(3), eps=1e-3)
    assert found["condition_before"] == pytest.approx(9.001 / 0.001)
    assert found["condition_after"] == pytest.approx(9.001 / 0.001)


def test_the_share_under_the_soft_ridge_is_counted_against_the_norm():
    norm = np.linalg.norm([3.0, 4.0])
    cov, _ = symmetric([3.0, 4.0, 0.0099 * norm, 0.0102 * norm, 0.0])
    assert diagnose(cov, np.eye(5), eps=0.0)["soft_share"] == pytest.approx(2 / 5)


def test_of_several_groups_the_worst_is_told_and_the_fewest_rows():
    (good, root), (bad, _) = symmetric([1.0, 2.0]), symmetric([1.0, 50.0], seed=1)
    found = diagnose(
        np.stack([good, bad]), np.stack([root, 3 * np.eye(2)]), count=[64.0, 32.0], eps=0.0
    )
    assert found["condition_before"] == pytest.approx(50)
    assert found["condition_after"] == pytest.approx(50)
    assert found["whitener_norm"] == pytest.approx(3)
    assert (found["rows"], found["groups"], found["dim"]) == (32, 2, 2)


def test_a_singular_covariance_without_a_ridge_is_told_as_what_float64_can_tell():
    assert diagnose(np.diag([1.0, 0.0]), np.eye(2), eps=0.0)["condition_before"] == 1e16
    assert diagnose(np.zeros((2, 2)), np.eye(2), eps=0.0)["condition_before"] is None
    assert diagnose(np.zeros((2, 2)), np.eye(2))["condition_before"] == 1


def test_the_share_of_products_follows_from_shapes():
    trees = [layer(np.eye(d), np.eye(d), rows) for d, rows in ((2, 100.0), (4, 50.0))]
    moments, stats = ({"a": {"x": a}, "b": b} for a, b in zip(*trees, strict=True))
    found = layer_diagnostics(moments, stats, root_products=6)
    first, second = 100 * 4 + 6 * 8, 50 * 16 + 6 * 64
    assert found["a/x"]["flops_share"] == pytest.approx(first / (first + second))
    assert found["b"]["flops_share"] == pytest.approx(second / (first + second))


def test_a_real_layer_is_whitened_as_far_as_its_iterations_go():
    x = jax.random.normal(jax.random.key(0), (16, 12, 12, 3))
    x = x + 0.7 * jnp.roll(x, 1, axis=1) + 0.5 * jnp.roll(x, 1, axis=2)
    conv = DeconvConv(4, (3, 3), padding="VALID", momentum=0.0, sampling_stride=1, num_iters=15)
    variables = conv.init(jax.random.key(1), x, use_running_average=True)
    _, updates = conv.apply(variables, x, use_running_average=False, mutable=["batch_stats"])
    patches = ops.extract_patches(x, (3, 3), padding="VALID")
    columns = np.moveaxis(np.asarray(patches), -1, -3).reshape(-1, 27)
    cov = np.cov(columns, rowvar=False, bias=True)
    moments = {"count": np.float32(len(columns)), "mean": columns.mean(0), "cov": cov}
    (found,) = layer_diagnostics(moments, updates["batch_stats"]).values()
    assert found["rows"] == 16 * 10 * 10
    assert found["condition_before"] > 10
    assert found["condition_after"] == pytest.approx(1, abs=1e-2)


@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_what_is_not_finite_is_flagged_and_the_rest_is_told(broken, tmp_path):
    cov, root = symmetric([1.0, 2.0])
    found = diagnose(cov, np.full((2, 2), broken))
    assert found["finite"] is False
    assert (found["condition_after"], found["whitener_norm"]) == (None, None)
    assert found["condition_before"] == pytest.approx(2, rel=1e-4)
    found = diagnose(np.full((2, 2), broken), root)
    assert found["finite"] is False
    assert (found["condition_before"], found["soft_share"]) == (None, None)
    assert found["whitener_norm"] == pytest.approx(1)
    assert format_table({"a": found}).splitlines()[1].split().count("-") == 3
    log = metrics.JsonLines(tmp_path / "diagnostics.jsonl")
    for row in diagnostics.diagnostic_rows(7, {"a": found}):
        log.write(row)
    row = json.loads((tmp_path / "diagnostics.jsonl").read_text())
    assert row == {"step": 7, "layer": "a", **found}
    assert diagnostics.diagnostic_scalars({"a": found}) == pytest.approx(
        {"whitening/whitener_norm/a": 1.0, "whitening/finite/a": 0.0}
    )


def test_scalars_are_powers_of_ten_by_layer():
    cov, root = symmetric([1000.0, 1.0])
    scalars = diagnostics.diagnostic_scalars({"b/c": diagnose(cov, root, eps=0.0)})
    assert scalars == pytest.approx(
        {
            "whitening/log10_condition_before/b/c": 3,
            "whitening/log10_condition_after/b/c": 0,
            "whitening/whitener_norm/b/c": 1,
            "whitening/soft_share/b/c": 0.5,
            "whitening/finite/b/c": 1,
        },
        abs=1e-9,
    )


def test_the_table_has_a_line_a_layer_and_straight_columns():
    cov, root = symmetric([100.0, 1.0])
    table = format_table({"a": diagnose(cov, root), "longer/name": diagnose(cov, root)})
    head, *lines = table.splitlines()
    assert head.split()[0] == "layer"
    assert [line.split()[0] for line in lines] == ["a", "longer/name"]
    assert {len(line) for line in (head, *lines)} == {len(head)}
    assert lines[0].split()[1:6] == ["2", "1", "100", "1.0e+02", "1.0e+00"]


def test_layers_without_moments_are_left_out_and_a_missing_whitener_is_named():
    moments, stats = layer(*symmetric([1.0, 2.0]))
    norm = {"mean": np.zeros(3), "var": np.ones(3)}
    assert list(layer_diagnostics({"a": moments}, {"a": stats, "norm": norm})) == ["a"]
    with pytest.raises(ValueError, match=r"whitener of shape \(2, 2\) at 'a', got None"):
        layer_diagnostics({"a": moments}, {"b": stats})
    with pytest.raises(ValueError, match=r"at 'a', got \(3, 3\)"):
        layer_diagnostics({"a": moments}, {"a": {"whitener": np.eye(3)}})
    assert layer_diagnostics({}, {"a": stats}) == {}


def test_layers_are_the_dicts_that_hold_arrays():
    tree = {"a": {"b": {"mean": 0, "step": 1}, "c": {"mean": 2}}, "d": {"whitener": 3}}
    assert layer_names(tree) == ["a/b", "a/c", "d"]
    assert layer_names({}) == []
