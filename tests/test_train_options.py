"""What a config can switch on, each against what it says it does."""

import dataclasses
import itertools
import json
import signal
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_tensorboard import scalars_of

from netdeconv_jax.interop import load_weights
from train import config as configs
from train import data, loop, step, stopping
from train.output import Output
from train.tensorboard import Events
from train.workdir import Workdir

SMALL = {
    "model.width": 0.25,
    "whitening.block_size": 8,
    "epochs": 1,
    "batch_size": 64,
    "eval_batch_size": 256,
    "optimizer.learning_rate": 0.05,
}


class States(Output):
    """Keeps the state after every step."""

    saves = True

    def __init__(self):
        self.states = []

    def checkpoint_due(self, step):
        return True

    def save(self, step, state, meta, row):
        self.states.append(state)

    def finish(self, variables):
        self.variables = variables


def trained(norm="deconv", **changes):
    config = configs.load(f"configs/digits.py:cnn,{norm}", SMALL | changes)
    trainer = loop.Trainer(config, data.create(config), jax.devices()[:1])
    trainer.compile()
    watch = States()
    *_, row = trainer.run(0, watch)
    return trainer, watch, row


def largest_difference(one, other):
    differences = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), one, other)
    return max(jax.tree.leaves(differences))


@pytest.fixture(scope="module")
def plain():
    return {norm: trained(norm) for norm in ("none", "batch", "deconv")}


def test_microbatches_without_a_norm_are_the_big_batch(plain):
    _, watch, row = trained("none", accumulate=4)
    assert largest_difference(watch.states[-1].params, plain["none"][1].states[-1].params) < 1e-5
    assert row["test_loss"] == pytest.approx(plain["none"][2]["test_loss"], abs=1e-5)


@pytest.mark.parametrize("norm", ["batch", "deconv"])
def test_microbatches_update_the_first_layer_s_statistics_as_the_big_batch_does(plain, norm):
    _, watch, _ = trained(norm, accumulate=2)
    whole, parts = (run.states[0].batch_stats for run in (plain[norm][1], watch))
    first = "conv1" if norm == "deconv" else next(iter(whole))
    # Behind the first layer each microbatch was normalized by its own statistics.
    assert largest_difference(parts[first], whole[first]) < 1e-5
    assert largest_difference(parts, whole) > 1e-5


def test_the_average_of_the_weights_is_what_is_evaluated(plain):
    _, watch, _ = trained(ema=0.8)
    average = plain["deconv"][0].init(0).params
    for state in plain["deconv"][1].states:
        average = jax.tree.map(lambda a, b: 0.8 * a + 0.2 * b, average, state.params)
    assert largest_difference(watch.states[-1].params, plain["deconv"][1].states[-1].params) == 0
    assert largest_difference(watch.states[-1].ema, average) < 1e-5
    assert largest_difference(watch.variables["params"], average) < 1e-5


REUSING: Any = {"whitening.update_every": 3, "whitening.update_warmup_steps": 4}


@pytest.mark.parametrize("accumulate", [1, 2])
def test_statistics_are_computed_in_the_first_steps_and_then_in_every_third(plain, accumulate):
    trainer, watch, row = trained(accumulate=accumulate, **REUSING)
    stats = [trainer.init(0).batch_stats, *(state.batch_stats for state in watch.states)]
    moved = [largest_difference(*pair) > 0 for pair in itertools.pairwise(stats)]
    assert [step for step, moves in enumerate(moved) if moves] == [0, 1, 2, 3, 6, 9, 12, 15]
    weights = [state.params for state in watch.states]
    assert all(largest_difference(*pair) > 0 for pair in itertools.pairwise(weights))
    if accumulate == 1:  # step for step the same, until the first that reuses
        for ours, theirs in zip(watch.states[:4], plain["deconv"][1].states, strict=False):
            assert largest_difference(ours.params, theirs.params) == 0
            assert largest_difference(ours.batch_stats, theirs.batch_stats) == 0
    assert row["test_accuracy"] > 0.4  # after 18 steps: running statistics are behind in the first


def test_with_nothing_to_reuse_there_is_one_program():
    for norm, changes in {
        "batch": REUSING,
        "none": REUSING,
        "deconv": {"whitening.update_every": 3, "whitening.update_warmup_steps": 18},
    }.items():
        config = configs.load(f"configs/digits.py:cnn,{norm}", SMALL | changes)
        trainer = loop.Trainer(config, data.create(config), jax.devices()[:1])
        trainer.compile()
        assert trainer._reusing is None


class Killed(States):
    """Ends the run after some steps, and takes it up again from the state of that step."""

    saved = None

    def restore(self, like):
        return self.saved

    def stop_requested(self, step):
        return signal.SIGKILL if self.saved is None and step == 8 else None

    def save(self, step, state, meta, row):
        super().save(step, state, meta, row)
        if step == 8:
            self.saved = (state, json.loads(json.dumps(meta)))


def test_a_run_that_resumes_between_two_updates_ends_with_the_same_bits():
    trainer, watch, _ = trained(**REUSING)
    killed = Killed()
    with pytest.raises(stopping.Stopped, match="after step 8"):
        list(trainer.run(0, killed))
    list(trainer.run(0, killed))
    whole, resumed = (run.states[-1] for run in (watch, killed))
    assert len(killed.states) == len(watch.states) == 18
    assert jax.tree.map(np.ndarray.tobytes, whole) == jax.tree.map(np.ndarray.tobytes, resumed)


def test_precise_statistics_are_used_by_the_evaluation_and_left_out_of_the_training(plain):
    _, watch, row = trained(recalibrate=6)
    before, after = plain["deconv"][1], watch
    assert largest_difference(after.states[-1].batch_stats, before.states[-1].batch_stats) == 0
    assert (
        largest_difference(after.variables["batch_stats"], before.variables["batch_stats"]) > 1e-3
    )
    assert row["test_loss"] != plain["deconv"][2]["test_loss"]
    assert row["test_accuracy"] > 0.8


def test_samples_can_be_normalized_before_they_are_whitened(plain):
    trainer, watch, row = trained(**{"whitening.local_norm": "layer"})
    assert trainer.model.spec.local_norm == "layer"
    assert largest_difference(watch.states[0].batch_stats, plain["deconv"][1].states[0].batch_stats)
    assert row["test_accuracy"] > 0.8
    with pytest.raises(ValueError, match=r"`local_norm` must be one of .*, got 'group'"):
        trained(**{"whitening.local_norm": "group"})


def test_label_smoothing_mixes_in_a_tenth_of_all_labels(plain):
    trainer, _, _ = trained(label_smoothing=0.1)
    logits = jax.random.normal(jax.random.key(0), (5, 10))
    labels = np.arange(5)
    chances = np.asarray(jax.nn.log_softmax(logits), np.float64)
    expected = -0.9 * chances[np.arange(5), labels] - 0.1 * chances.mean(-1)
    got = trainer._steps._losses(logits, jnp.asarray(labels))
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_bfloat16_computes_in_half_and_keeps_parameters_and_statistics_in_float32():
    trainer, watch, row = trained(dtype="bfloat16")
    state = watch.states[-1]
    kinds = {leaf.dtype for leaf in jax.tree.leaves((state.params, state.batch_stats))}
    assert kinds == {np.dtype(np.float32)}
    assert trainer.model.dtype == "bfloat16"
    assert row["test_accuracy"] > 0.7


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_other_optimizers_learn(name):
    changes = {"optimizer.name": name, "optimizer.learning_rate": 0.01, "epochs": 3}
    assert trained(**changes)[2]["test_accuracy"] > 0.7


def test_diagnostics_of_networks_that_whiten_nothing_are_none(plain):
    for norm in ("none", "batch"):
        _, _, row = trained(norm, **{"log.diagnostics_every_steps": 5})
        assert row["test_loss"] == plain[norm][2]["test_loss"]


@pytest.mark.parametrize("norm", ["none", "deconv"])
def test_one_bad_batch_stops_the_run_at_its_step_although_a_relu_may_hide_it_from_the_loss(
    monkeypatch, norm
):
    config = configs.load(f"configs/digits.py:cnn,{norm}", SMALL)
    examples = data.create(config)
    good = examples.train_batch

    def bad_at_the_fifth(arrays, feed, key, step):
        batch = good(arrays, feed, key, step)
        return dataclasses.replace(batch, images=jnp.where(step == 4, jnp.nan, batch.images))

    monkeypatch.setattr(examples, "train_batch", bad_at_the_fifth)
    trainer = loop.Trainer(config, examples, jax.devices()[:1])
    trainer.compile()
    with pytest.raises(loop.NonFiniteLossError, match="at step 5") as caught:
        list(trainer.run(0))
    assert caught.value.step == 5
    assert ("conv1" in caught.value.layers) == (norm == "deconv")


class SignalInTheEvaluation(stopping.Stop):
    """Has got its signal when an evaluation asks for the second time."""

    asked = 0

    def noted(self):
        self.asked += 1
        return signal.SIGTERM if self.asked > 1 else None

    def requested(self, step):
        return None


def test_a_run_that_is_stopped_in_an_evaluation_makes_up_for_it_once(plain, tmp_path):
    trainer, _, expected = plain["deconv"]
    output = Workdir(tmp_path, trainer, SignalInTheEvaluation())
    with pytest.raises(stopping.Stopped, match="after step 18") as caught:
        list(trainer.run(0, output))
    output.close()
    assert caught.value.exit_status == 143
    for again in (False, True):
        output = Workdir(tmp_path, trainer, stopping.Stop())
        assert (list(trainer.run(0, output)) == []) == again
        output.close()
        rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
        (row,) = (row for row in rows if "test_loss" in row)
        for name in (
            *("step", "epoch", "train_loss", "train_accuracy", "test_loss", "test_accuracy"),
            "learning_rate",
        ):
            assert row[name] == expected[name]
        assert row["images_per_second"] > 0


def test_where_devices_run_their_own_program_each_draws_its_own_noise(plain):
    trainer, _, _ = plain["deconv"]

    def primitives_of(axis):
        steps = trainer._steps
        own = step.Steps(
            steps.model, steps.optimizer, steps.rate, trainer.data, trainer.config, axis
        )
        state, feed = trainer.init(0), next(trainer.data.train_feeds(0, 0))
        axes = [] if axis is None else [(axis, 2)]
        program = jax.make_jaxpr(own.train, axis_env=axes)(state, trainer.data.arrays, feed)
        return {eqn.primitive.name for eqn in program.jaxpr.eqns}

    assert "axis_index" in primitives_of("data")
    assert "axis_index" not in primitives_of(None)


def test_diagnostics_are_written_for_every_whitened_layer(tmp_path):
    changes = {"log.diagnostics_every_steps": 9, "log.every_steps": 6}
    config = configs.load("configs/digits.py:cnn,deconv", SMALL | changes)
    trainer = loop.Trainer(config, data.create(config), jax.devices()[:1])
    output = Workdir(tmp_path, trainer, stopping.Stop())
    with Events(tmp_path / "tensorboard") as killed:
        killed.scalars(1, {"train_loss": 9.0})
    trainer.compile()
    (row,) = trainer.run(0, output)
    output.close()
    lines = (tmp_path / "diagnostics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert {row["layer"] for row in rows} == {"conv1", "conv2", "conv3", "conv4", "linear"}
    assert [row["step"] for row in rows] == [9] * 5 + [18] * 5
    assert all(row["condition_after"] < row["condition_before"] for row in rows)
    metrics = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in metrics] == [6, 12, 18, 18]
    assert metrics[-1]["test_loss"] == row["test_loss"]
    assert metrics[-1]["wall_seconds"] > 0
    variables, metadata = load_weights(tmp_path / "model.safetensors")
    assert metadata["network"] == "cnn"
    assert metadata["input_shape"] == "[8, 8, 1]"
    assert trainer.evaluate(trainer._parallel.everywhere(variables)) == {
        name: row[name] for name in ("test_loss", "test_accuracy")
    }
    assert "<svg" in (tmp_path / "report.html").read_text()
    shown = scalars_of(tmp_path / "tensorboard")
    assert [step for step, tag, _ in shown if tag == "train_loss"] == [6, 12, 18, 18]
