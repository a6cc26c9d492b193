"""The trainer on the digits: it learns, it repeats itself, and it leaves what it measured."""

import dataclasses
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from trainer_process import interruptible

from train import augment, compare, data, loop, main
from train import config as configs

ROOT = Path(__file__).parents[1]
SOURCE = str(ROOT / "configs" / "digits.py") + ":cnn,{}"
# A quarter of the width: everything the loop does, compiled in seconds.
SMALL = {
    "model.width": 0.25,
    "whitening.block_size": 8,
    "epochs": 4,
    "batch_size": 64,
    "eval_batch_size": 256,
    "optimizer.learning_rate": 0.1,
}
NORMS = ("batch", "deconv")


def small(norm="deconv", **changes):
    return configs.load(SOURCE.format(norm), SMALL | changes)


@pytest.fixture(scope="module")
def digits():
    return data.load_dataset("digits")


def trainer_of(config, digits):
    """Compiled for one device: eight fake ones are slow, and tested elsewhere."""
    trainer = loop.Trainer(config, data.Resident(digits, config), jax.devices()[:1])
    trainer.compile()
    return trainer


@pytest.fixture(scope="module")
def trainers(digits):
    """Both norms, compiled once for the whole file."""
    return {norm: trainer_of(small(norm), digits) for norm in NORMS}


def command(*arguments):
    return [sys.executable, "-m", "train.main", *map(str, arguments)]


def overrides(**changes):
    settings = SMALL | changes
    return [f"--config.{name}={value}" for name, value in settings.items()]


def test_a_random_crop_shows_a_part_of_the_image_with_a_black_border():
    images = jax.random.randint(jax.random.key(1), (20, 5, 6, 2), 1, 255).astype(jnp.uint8)
    keys = jax.random.split(jax.random.key(0), 20)
    cropped = np.asarray(augment.crop(keys, images, 1))
    assert cropped.dtype == np.uint8
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))
    corners = []
    for old, new in zip(padded, cropped, strict=True):
        fits = [
            (i, j)
            for i in range(3)
            for j in range(3)
            if np.array_equal(old[i : i + 5, j : j + 6], new)
        ]
        assert len(fits) == 1
        corners += fits
    assert len(set(corners)) > 4
    assert augment.crop(keys, images, 0) is images


def test_a_flip_mirrors_about_half_of_the_images():
    images = np.arange(200 * 2 * 3).reshape(200, 2, 3, 1)
    keys = jax.random.split(jax.random.key(0), 200)
    flipped = np.asarray(augment.flip(keys, jnp.asarray(images)))
    mirrored = [np.array_equal(new, old[:, ::-1]) for old, new in zip(images, flipped, strict=True)]
    kept = [np.array_equal(new, old) for old, new in zip(images, flipped, strict=True)]
    assert all(a != b for a, b in zip(mirrored, kept, strict=True))
    assert 75 < sum(mirrored) < 125


def test_every_epoch_visits_each_example_at_most_once_in_another_order(digits):
    resident = data.Resident(digits, small(batch_size=100))
    feeds = resident.train_feeds(3, 0)
    visits = [[next(feeds)["order"] for _ in range(11)] for _ in range(2)]
    assert all(order is orders[0] for orders in visits for order in orders)
    epochs = [orders[0] for orders in visits]
    for order in epochs:
        assert order.shape == (100, 11)
        assert len(np.unique(order)) == 1100
    assert not np.array_equal(*epochs)
    # Half way through the second epoch, as a run that resumes there.
    np.testing.assert_array_equal(next(resident.train_feeds(3, 16))["order"], epochs[1])
    assert not np.array_equal(next(resident.train_feeds(4, 0))["order"], epochs[0])


def test_processes_share_each_batch(digits):
    config = small()
    whole = next(data.Resident(digits, config).train_feeds(0, 0))["order"]
    parts = [
        next(data.Resident(digits, config, index, 2).train_feeds(0, 0))["order"] for index in (0, 1)
    ]
    np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_both_norms_have_the_same_convolutions_and_classifier(trainers):
    kernels = {}
    for norm, trainer in trainers.items():
        leaves = jax.tree_util.tree_leaves_with_path(trainer.init(0).params)
        kernels[norm] = sorted(
            leaf.shape for path, leaf in leaves if jax.tree_util.keystr(path).endswith("['kernel']")
        )
    assert kernels["batch"] == kernels["deconv"]
    assert (3, 3, 8, 16) in kernels["deconv"]


@pytest.mark.parametrize("norm", NORMS)
def test_four_epochs_learn(trainers, norm):
    first, *_, last = rows = list(trainers[norm].run(seed=0))
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4]
    assert [row["step"] for row in rows] == [18, 36, 54, 72]
    assert last["train_loss"] < first["train_loss"]
    assert last["test_loss"] < first["test_loss"]
    assert last["test_accuracy"] > 0.8


def test_the_same_seed_gives_the_same_bits_and_another_one_does_not(trainers):
    def figures(seed):
        rows = list(trainers["deconv"].run(seed))
        return [(row["train_loss"], row["test_loss"]) for row in rows]

    first = figures(0)
    assert figures(0) == first
    assert figures(1) != first


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
def test_evaluation_counts_every_example_once(digits, size):
    trainer = trainer_of(small("batch", eval_batch_size=size), digits)
    variables = trainer.init(0).variables()
    mean, deviation = (np.float32(values) for values in (digits.mean, digits.deviation))
    images = (digits.test.images.astype(np.float32) - mean) / deviation
    logits = trainer.model.apply(variables, images, train=False)
    correct = np.sum(np.asarray(logits).argmax(-1) == digits.test.labels)
    chances = np.asarray(jax.nn.log_softmax(logits))[np.arange(599), digits.test.labels]
    figures: Any = trainer.evaluate(variables)
    assert figures["test_accuracy"] == correct / 599
    np.testing.assert_allclose(figures["test_loss"], -chances.mean(), rtol=1e-5)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_step_and_run(digits, tmp_path):
    trainer = trainer_of(small("batch", **{"optimizer.learning_rate": 1e30}), digits)
    with pytest.raises(loop.NonFiniteLossError, match=r"^The loss is nan at step \d+\.") as caught:
        list(trainer.run(seed=0))
    assert 1 < caught.value.step <= 18
    comparison = compare.Comparison({"batch": trainer}, [4])
    with pytest.raises(loop.NonFiniteLossError, match=r"step \d+ of batch norm, seed 4\."):
        list(compare.train(comparison, tmp_path))
    assert comparison.epochs == 0


def test_a_state_that_is_not_finite_behind_a_finite_loss_stops_the_run(digits, monkeypatch):
    trainer = trainer_of(small("batch"), digits)
    init = trainer.init

    def no_number_in_the_running_mean(seed):
        state = init(seed)
        running = state.batch_stats["bn1"]
        spoilt = state.batch_stats | {"bn1": running | {"mean": running["mean"] * np.nan}}
        return dataclasses.replace(state, batch_stats=spoilt)

    monkeypatch.setattr(trainer, "init", no_number_in_the_running_mean)
    with pytest.raises(
        loop.NonFiniteLossError, match=r"^The state is not finite at step 1\."
    ) as caught:
        list(trainer.run(seed=0))
    assert caught.value.layers == ["bn1"]
    assert np.isfinite(caught.value.loss)


def test_the_layers_are_those_that_the_first_bad_step_left_not_finite(digits, monkeypatch):
    trainer = trainer_of(small("deconv"), digits)
    init = trainer.init

    def huge_at_the_end(seed):
        state = init(seed)
        kernel = state.params["conv4"]["kernel"]
        params = state.params | {"conv4": state.params["conv4"] | {"kernel": kernel * 1e25}}
        return dataclasses.replace(state, params=params)

    monkeypatch.setattr(trainer, "init", huge_at_the_end)
    with pytest.raises(loop.NonFiniteLossError, match=r"The loss is nan at step 1\.") as caught:
        list(trainer.run(seed=0))
    # By the time that it is seen, two steps with parameters that are not numbers have spoilt all of them.
    # The classifier's input overflows, with no rectifier behind it: XLA's maximum(NaN, 0) on CPUs is either.
    assert (caught.value.step, caught.value.layers) == (1, ["linear"])


def test_a_comparison_keeps_what_follows_the_norm():
    assert main._with_norm("c.py:net,deconv,modern", "batch") == "c.py:net,batch,modern"
    assert main._with_norm("c.py:net", "batch") == "c.py:net,batch"
    assert main._with_norm("c.py:net,deconv", "none") == "c.py:net,none"


def test_a_mistake_in_the_program_keeps_its_traceback(tmp_path):
    code = "import sys; from absl import app; from train import loop, main; "
    code += "loop.Trainer.step = lambda self, *_: [].index('a mistake'); "
    code += "app.run(main.main, flags_parser=main.parse_flags)"
    arguments = [f"--config={SOURCE.format('batch')}", f"--workdir={tmp_path}"]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "'a mistake' is not in list" in done.stderr


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


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_a_signal_leaves_the_table_the_figures_and_the_picture(tmp_path, number):
    arguments = [f"--config={SOURCE.format('deconv')}", f"--workdir={tmp_path}"]
    arguments += ["--compare=batch,deconv", "--seeds=0,1", *overrides(epochs=100000)]
    with subprocess.Popen(
        interruptible(command(*arguments)),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.split()[:2] == ["epoch", "2/100000"]:
                break
        process.send_signal(number)
        rest, errors = process.communicate(timeout=300)
    assert process.returncode == 128 + number
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
        ({"batch_size": 2000}, "`batch_size` must be at most the 1198 training examples, got 2000"),
        ({"batch_size": 66, "accumulate": 3}, None),
        ({"dataset": "letters"}, "`dataset` must be one of .*, got 'letters'"),
        ({"network": "resnet"}, "`name` must be a network of the zoo, got 'resnet'; did you mean"),
        ({"norm": "layer"}, "`norm` must be one of .*, got 'layer'"),
        ({"network": "vgg11"}, "`x` is too small for the strides of VGG"),
        ({"whitening.block_size": 0}, "`block_size` must be at least 1, got 0"),
        ({"optimizer.name": "lion"}, "`optimizer.name` must be one of .*, got 'lion'"),
    ],
)
def test_what_a_config_names_and_is_not_there_is_answered_before_anything_is_compiled(
    changes, message
):
    def build():
        config = configs.load(SOURCE.format("deconv"), SMALL | changes)
        loop.Trainer(config, data.create(config), jax.devices()[:1])

    if message is None:
        build()
        return
    with pytest.raises(ValueError, match=message):
        build()


def test_the_learning_rates_are_those_that_the_recorded_sweep_chose():
    sweep = json.loads((ROOT / "benchmarks" / "results" / "digits_lr_sweep.json").read_text())
    rates = {norm: configs.load(SOURCE.format(norm), {}).optimizer.learning_rate for norm in NORMS}
    assert rates == sweep["best"]
