"""The optimizers and schedules of a config, against their formulas."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from train import config as configs
from train import optimizer

PARAMS = {"kernel": jnp.array([[1.0, -2.0], [3.0, 4.0]]), "bias": jnp.array([0.5, -0.5])}
GRADS = {"kernel": jnp.array([[0.1, 0.2], [-0.3, 0.4]]), "bias": jnp.array([1.0, -1.0])}


def settings(**changes):
    config = configs.default().optimizer
    config.update({"schedule": "constant", "learning_rate": 0.1} | changes)
    return config


def two_steps(config):
    chain, _ = optimizer.create(config, total_steps=10, steps_per_epoch=5)
    state: Any = chain.init(PARAMS)
    params: Any = PARAMS
    for _ in range(2):
        updates, state = chain.update(GRADS, state, params)
        params = optax.apply_updates(params, updates)
    return params


def rates(steps=20, **changes):
    _, rate = optimizer.create(settings(**changes), total_steps=steps, steps_per_epoch=5)
    return np.array([float(rate(step)) for step in range(steps)])


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("decay_on", ["all", "kernels"])
def test_sgd_is_the_original_s_decay_in_the_gradient_and_in_the_momentum(nesterov, decay_on):
    got = two_steps(settings(weight_decay=0.01, decay_on=decay_on, nesterov=nesterov))
    for name, start in PARAMS.items():
        decay = 0.01 if decay_on == "all" or name == "kernel" else 0.0
        value, momentum = np.array(start, np.float64), 0.0
        for _ in range(2):
            gradient = np.array(GRADS[name], np.float64) + decay * value
            momentum = 0.9 * momentum + gradient
            value = value - 0.1 * (gradient + 0.9 * momentum if nesterov else momentum)
        np.testing.assert_allclose(got[name], value, rtol=1e-5)


@pytest.mark.parametrize("decay_on", ["all", "kernels"])
def test_adamw_decays_the_weights_beside_the_gradient(decay_on):
    got = two_steps(settings(name="adamw", weight_decay=0.01, decay_on=decay_on))
    for name, start in PARAMS.items():
        decay = 0.01 if decay_on == "all" or name == "kernel" else 0.0
        value = np.array(start, np.float64)
        for _ in range(2):  # with a gradient that stays the same, Adam's ratio is its sign
            value = value - 0.1 * (np.sign(GRADS[name]) + decay * value)
        np.testing.assert_allclose(got[name], value, rtol=1e-4)


def test_muon_orthogonalizes_kernels_and_leaves_biases_to_adam():
    got = two_steps(settings(name="muon", nesterov=False))
    change = np.array(got["kernel"] - PARAMS["kernel"]) / 0.2
    assert np.linalg.cond(change) < 2 < np.linalg.cond(np.array(GRADS["kernel"]))
    np.testing.assert_allclose(
        got["bias"], PARAMS["bias"] - 0.2 * jnp.sign(GRADS["bias"]), rtol=1e-4
    )


def test_muon_takes_convolutions():
    chain, _ = optimizer.create(settings(name="muon"), total_steps=10, steps_per_epoch=5)
    params = {"kernel": jnp.arange(288.0).reshape(3, 3, 4, 8) % 7, "bias": jnp.ones(8)}
    updates: Any = chain.update(params, chain.init(params), params)[0]
    flat = np.array(updates["kernel"]).reshape(36, 8)
    assert np.isfinite(flat).all()
    assert np.linalg.matrix_rank(flat) > 1


def test_the_cosine_starts_at_the_rate_and_would_reach_zero_after_the_last_step():
    expected = 0.05 * (1 + np.cos(np.pi * np.arange(20) / 20))
    np.testing.assert_allclose(rates(schedule="cosine"), expected, atol=1e-7)


def test_the_warm_up_rises_to_the_rate_and_the_schedule_takes_what_is_left():
    got = rates(schedule="cosine", warmup_epochs=1.0)
    np.testing.assert_allclose(got[:5], 0.1 * np.arange(1, 6) / 5, rtol=1e-6)
    np.testing.assert_allclose(got[5:], 0.05 * (1 + np.cos(np.pi * np.arange(15) / 15)), atol=1e-7)


def test_multistep_decays_at_its_milestones():
    got = rates(schedule="multistep", milestones=(0.5, 0.75), decay=0.1)
    np.testing.assert_allclose(got, [0.1] * 10 + [0.01] * 5 + [0.001] * 5, rtol=1e-6)


def test_milestones_are_shares_of_the_run_with_its_warm_up():
    got = rates(schedule="multistep", milestones=(0.5, 0.75), decay=0.1, warmup_epochs=1.0)
    np.testing.assert_allclose(got[5:], [0.1] * 5 + [0.01] * 5 + [0.001] * 5, rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"schedule": "multistep", "milestones": (0.4,), "warmup_epochs": 1.0},
            r"`optimizer.milestones` must come after the warm-up of 5 steps, of 10, got \(0.4,\)",
        ),
        ({"name": "lion"}, "`optimizer.name` must be one of .*, got 'lion'"),
        ({"schedule": "step"}, "`optimizer.schedule` must be one of .*, got 'step'"),
        ({"warmup_epochs": 2.0}, "`optimizer.warmup_epochs` must be shorter than the run of 10"),
    ],
)
def test_what_is_not_there_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        optimizer.create(settings(**changes), total_steps=10, steps_per_epoch=5)
