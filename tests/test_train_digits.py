"""The trainer on the digits: it learns, it repeats itself, and it leaves what it measured."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from train import augment, compare, data, loop
from train import config as configs

ROOT = Path(__file__).parents[1]
SOURCE = str(ROOT / "configs" / "digits.py") + ":cnn,{}"
# Two narrow layers on a quarter of the pixels: everything the loop does, compiled in a second.
SMALL = {
    "model.widths": (16, 16),
    "model.strides": (2, 1),
    "model.block_size": 8,
    "epochs": 4,
    "batch_size": 64,
    "optimizer.learning_rate": 0.1,
}
NORMS = ("batch", "deconv")


def small(norm="deconv", **changes):
    return configs.load(SOURCE.format(norm), SMALL | changes)


@pytest.fixture(scope="module")
def digits():
    return data.digits()


@pytest.fixture(scope="module")
def trainers(digits):
    """Both norms, compiled once for the whole file."""
    built = {norm: loop.Trainer(small(norm), digits) for norm in NORMS}
    for trainer in built.values():
        trainer.compile()
    return built


def command(*arguments):
    return [sys.executable, "-m", "train.main", *map(str, arguments)]


def overrides(**changes):
    settings = SMALL | changes
    return [f"--config.{name}={value}" for name, value in settings.items()]


def test_the_split_is_fixed_disjoint_and_holds_every_digit_in_both_parts(digits):
    assert len(digits.train) == 1198
    assert len(digits.test) == 599
    assert np.bincount(digits.train.labels).tolist() == [
        *(115, 119, 114, 129, 123),
        *(121, 127, 119, 111, 120),
    ]
    assert np.bincount(digits.test.labels).min() >= 54
    assert digits.train.images.shape == (1198, 8, 8, 1)
    assert digits.train.images.dtype == np.float32
    assert abs(digits.train.images.mean()) < 1e-5
    assert abs(digits.train.images.std() - 1) < 1e-5


def test_folds_hold_out_each_training_image_once_and_no_test_image(digits):
    folds = [data.hold_out(digits, fold) for fold in range(4)]
    assert [(len(fold.train), len(fold.test)) for fold in folds] == [(897, 299)] * 4
    expected = digits.train.images[:1196].reshape(1196, -1).tolist()
    held = np.concatenate([fold.test.images for fold in folds]).reshape(1196, -1).tolist()
    assert sorted(held) == sorted(expected)
    for fold in folds:
        both = np.concatenate([fold.train.images, fold.test.images]).reshape(1196, -1).tolist()
        assert sorted(both) == sorted(expected)


def test_a_shift_is_a_crop_of_the_image_with_its_border_repeated():
    images = jax.random.normal(jax.random.key(1), (20, 5, 6, 2))
    shifted = np.asarray(augment.shift(jax.random.key(0), images, 1))
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    corners = []
    for old, new in zip(padded, shifted, strict=True):
        fits = [
            (i, j)
            for i in range(3)
            for j in range(3)
            if np.array_equal(old[i : i + 5, j : j + 6], new)
        ]
        assert len(fits) == 1
        corners += fits
    assert len(set(corners)) > 4
    assert augment.shift(jax.random.key(0), images, 0) is images


def test_both_norms_have_the_same_convolutions_and_classifier(trainers):
    kernels = {}
    for norm, trainer in trainers.items():
        leaves = jax.tree_util.tree_leaves_with_path(trainer.init(0).params)
        kernels[norm] = sorted(
            leaf.shape for path, leaf in leaves if jax.tree_util.keystr(path).endswith("['kernel']")
        )
    assert kernels["batch"] == kernels["deconv"]
    assert kernels["deconv"] == [(3, 3, 1, 16), (3, 3, 16, 16), (16, 10)]


@pytest.mark.parametrize("norm", NORMS)
def test_four_epochs_learn(trainers, norm):
    first, *_, last = rows = list(trainers[norm].run(seed=0))
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4]
    assert [row["step"] for row in rows] == [18, 36, 54, 72]
    assert last["train_loss"] < first["train_loss"]
    assert last["test_loss"] < first["test_loss"]
    assert last["test_accuracy"] > 0.8


def test_the_same_seed_gives_the_same_bits_and_another_one_does_not(trainers):
    trainer = trainers["deconv"]
    states = [trainer.train_epoch(trainer.init(seed))[0] for seed in (0, 0, 1)]
    first, again, other = (
        jax.tree.leaves((state.params, state.batch_stats, state.opt_state)) for state in states
    )
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(first, other, strict=True))


def test_runs_with_other_seeds_compile_nothing(trainers):
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: compiled.append(event) if "compile" in event else None
    )
    try:
        list(trainers["deconv"].run(seed=5))
        warm = len(compiled)
        list(trainers["deconv"].run(seed=6))
        assert len(compiled) == warm
    finally:
        jax.monitoring.clear_event_listeners()


@pytest.mark.parametrize("size", [100, 600])
def test_evaluation_counts_every_example_once(trainers, digits, size):
    state = trainers["batch"].init(0)
    trainer = loop.Trainer(small("batch", eval_batch_size=size), digits)
    trainer.compile()
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    logits = trainer.model.apply(variables, digits.test.images, train=False)
    correct = np.sum(np.asarray(logits).argmax(-1) == digits.test.labels)
    chances = np.asarray(jax.nn.log_softmax(logits))[np.arange(599), digits.test.labels]
    figures = trainer.evaluate(state)
    assert figures["test_accuracy"] == correct / 599
    np.testing.assert_allclose(figures["test_loss"], -chances.mean(), rtol=1e-5)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_step_and_run(digits, tmp_path):
    trainer = loop.Trainer(small("batch", **{"optimizer.learning_rate": 1e30}), digits)
    trainer.compile()
    with pytest.raises(loop.NonFiniteLossError, match=r"The loss is nan at step \d+\.") as caught:
        list(trainer.run(seed=0))
    assert 1 < caught.value.step <= 18
    comparison = compare.Comparison({"batch": trainer}, [4])
    with pytest.raises(loop.NonFiniteLossError, match=r"step \d+ of batch norm, seed 4\."):
        list(compare.train(comparison, tmp_path))
    assert comparison.epochs == 0


def test_a_comparison_writes_its_table_its_figures_and_its_picture(trainers, tmp_path):
    comparison = compare.Comparison(trainers, [0, 1])
    lines = list(compare.train(comparison, tmp_path))
    table = compare.write(comparison, tmp_path)
    assert len(lines) == 4
    figures = json.loads((tmp_path / "comparison.json").read_text())
    assert figures["epochs_finished"] == 4
    for norm in NORMS:
        rows = [
            [json.loads(line) for line in file.read_text().splitlines()]
            for file in sorted((tmp_path / norm).glob("seed*/metrics.jsonl"))
        ]
        assert rows == figures["curves"][norm]
        accuracies = [100 * run[-1]["test_accuracy"] for run in rows]
        cell = figures["table"][norm]["test_accuracy_percent"]["4"]
        assert cell == pytest.approx(
            {"mean": np.mean(accuracies), "deviation": np.std(accuracies, ddof=1)}
        )
        assert f"{cell['mean']:.2f} ± {cell['deviation']:4.2f}" in table
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert str(tmp_path / "curves.png") in table


def test_ctrl_c_leaves_the_table_the_figures_and_the_picture(tmp_path):
    arguments = [f"--config={SOURCE.format('deconv')}", f"--workdir={tmp_path}"]
    arguments += ["--compare=batch,deconv", "--seeds=0,1", *overrides(epochs=100000)]
    with subprocess.Popen(
        command(*arguments), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.split()[:2] == ["epoch", "2/100000"]:
                break
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate(timeout=300)
    assert process.returncode == 130
    assert "Interrupted" in errors
    assert "Traceback" not in errors
    figures = json.loads((tmp_path / "comparison.json").read_text())
    assert figures["epochs_finished"] >= 2
    assert "batch norm" in rest
    assert "epoch 1 " in rest
    assert (tmp_path / "curves.png").is_file()


def test_a_bad_config_ends_with_status_2_and_one_line(tmp_path):
    arguments = [f"--config={SOURCE.format('deconv')}", f"--workdir={tmp_path}", "--config.epoch=3"]
    result = subprocess.run(command(*arguments), cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr == "train: `epoch` is not a key of this config; the nearest is `epochs`.\n"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "`epochs` must be an int of at least 1, got 0"),
        ({"epochs": 1.5}, "`epochs` must be an int of at least 1, got 1.5"),
        ({"epochs": "many"}, "`epochs` must be an int of at least 1, got 'many'"),
        ({"batch_size": 2000}, "`batch_size` must be at most the 1198 training examples, got 2000"),
        ({"seed": -1}, "`seed` must be an int of at least 0, got -1"),
        ({"dataset": "letters"}, "`dataset` must be one of .*, got 'letters'"),
        ({"network": "rnn"}, "`network` must be one of .*, got 'rnn'"),
        ({"norm": "layer"}, "`norm` must be one of .*, got 'layer'"),
        ({"model.block_size": 0}, "`block_size` must be at least 1, got 0"),
        ({"model.widths": (8,)}, "`model.widths` and `model.strides` must be as long"),
        (
            {"model.width": 8},
            "`model.width` is not a key of this config; the nearest is `model.widths`",
        ),
        (
            {"optimizer.learning_rate": 0},
            "`optimizer.learning_rate` must be a number above 0, got 0",
        ),
        (
            {"optimizer.momentum": 1.0},
            r"`optimizer.momentum` must be a number in \[0, 1\), got 1.0",
        ),
        ({"optimizer.name": "lion"}, "`optimizer.name` must be one of .*, got 'lion'"),
        ({"optimizer.schedule": "step"}, "`optimizer.schedule` must be one of .*, got 'step'"),
    ],
)
def test_a_bad_value_is_answered_by_its_name_and_what_would_be_right(digits, changes, message):
    def build():
        config = configs.load(SOURCE.format("deconv"), SMALL | changes)
        data.load(config.dataset)
        loop.Trainer(config, digits)

    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("configs/none.py:cnn,deconv", "`--config` must name a Python file, got 'configs/none.py'"),
        (SOURCE.format("layer"), "`:network,norm` must be .*, got 'cnn,layer'"),
    ],
)
def test_a_bad_source_is_named(source, message):
    with pytest.raises(ValueError, match=message):
        configs.load(source, {})


def test_the_learning_rates_are_those_that_the_recorded_sweep_chose():
    sweep = json.loads((ROOT / "benchmarks" / "results" / "digits_lr_sweep.json").read_text())
    rates = {norm: configs.load(SOURCE.format(norm), {}).optimizer.learning_rate for norm in NORMS}
    assert rates == sweep["best"]
