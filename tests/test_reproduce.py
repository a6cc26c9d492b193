"""The runner of experiments: what it records, resumes, fits into a budget and says of it."""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from prepared_folders import encode, prepare_photos
from scipy import stats

from netdeconv_jax.whitening import ChebyshevRidge, Eigh, WhiteningSpec
from train import config as configs
from train import loop, whitening
from train.data.resident import Resident
from train.data.sources import Dataset, Examples
from train.data.streamed import Streamed
from train.experiments import (
    EXPERIMENTS,
    columns,
    evidence,
    images,
    published,
    race,
    race_cpu,
    results,
)
from train.experiments import runner as runners
from train.experiments.cell import Cell, Run, choose
from train.experiments.pictures import Pictures
from train.experiments.runner import Runner
from train.reproduce import main
from train.reproduction_page import write_page
from train.step import example_losses
from train.stopping import Stop, Stopped

ROOT = Path(__file__).parents[1]
CONFIG = "configs/cifar10.py:linear,none"
SMALL = {
    "epochs": 2,
    "batch_size": 8,
    "eval_batch_size": 8,
    "augment.crop": 0,
    "optimizer.learning_rate": 1e-3,
}


SUMS = {
    ("10", 1, "batch"): 440.35,
    ("10", 1, "deconv"): 671.11,
    ("10", 20, "batch"): 896.17,
    ("10", 20, "deconv"): 919.48,
    ("10", 100, "batch"): 920.19,
    ("10", 100, "deconv"): 935.5,
    ("100", 1, "batch"): 140.0,
    ("100", 1, "deconv"): 326.07,
    ("100", 20, "batch"): 669.84,
    ("100", 20, "deconv"): 717.02,
    ("100", 100, "batch"): 719.59,
    ("100", 100, "deconv"): 749.84,
}


def npz(folder, count=40):
    rng = np.random.default_rng(0)
    parts = {"x_train": count, "x_test": 16}
    arrays: dict[str, Any] = {
        name: rng.integers(0, 256, (n, 32, 32, 3), np.uint8) for name, n in parts.items()
    }
    arrays |= {"y" + name[1:]: rng.integers(0, 10, n) for name, n in parts.items()}
    np.savez(folder / "cifar10.npz", **arrays)
    return str(folder)


def runner(tmp_path, known=(), said=None):
    said = [] if said is None else said
    return Runner(tmp_path / "records", tmp_path / "work", npz(tmp_path), said.append, known)


def record(tmp_path, name="x/one-seed0"):
    return json.loads((tmp_path / "records" / f"{name}.json").read_text())


# ---- Experiments as data


def test_every_cell_has_a_config_that_holds_and_a_name_of_its_own():
    for experiment in EXPERIMENTS.values():
        names = [cell.name for cell in experiment.cells]
        assert len(set(names)) == len(names)
        assert all(a == b or not a.startswith(f"{b}-seed") for a in names for b in names)
        for cell in experiment.cells:
            assert bool(cell.config) != bool(cell.measure)
            if cell.config:
                config = configs.load(cell.config, cell.changes)
                whitening.create(config.whitening)


def test_cells_are_chosen_by_name_small_ones_first():
    runs = choose(["ablation/block*", "figure2"], EXPERIMENTS)
    assert [str(run) for run in runs[:3]] == [f"ablation/block{n}-seed0" for n in (16, 32)] + [
        "ablation/block16-seed1"
    ]
    assert {str(run) for run in runs[-2:]} == {
        "figure2/cifar10-seed0",
        "figure2/imagenet2012-seed0",
    }
    assert [str(run) for run in choose(["figure2/cifar10"], EXPERIMENTS, seed=7)] == [
        "figure2/cifar10-seed7"
    ]
    minutes = [run.cell.minutes for run in choose(["table1_epoch1"], EXPERIMENTS)]
    assert minutes == sorted(minutes)


@pytest.mark.parametrize("name", ["figure5", "figure2/mnist", "nothing/*"])
def test_a_name_that_no_cell_has_is_refused(name):
    with pytest.raises(ValueError, match="NAME"):
        choose([name], EXPERIMENTS)


# ---- Losses and roots that the experiments need


def test_the_squared_loss_is_half_the_squared_distance_to_one_hot_targets():
    logits, labels = jnp.array([[1.0, 0.5], [0.0, 3.0]]), jnp.array([0, 0])
    found = example_losses("l2", logits, labels, smoothing=0.0)
    np.testing.assert_allclose(found, [0.125, 5.0])
    np.testing.assert_allclose(example_losses("l2", logits, labels, smoothing=1.0), [0.125, 3.25])


def test_one_step_at_rate_one_with_the_exact_root_is_least_squares():
    """Section 3.3 through the trainer itself; expected from NumPy's solver."""
    rng = np.random.default_rng(0)
    pixels, labels = rng.integers(0, 256, (200, 3, 4, 1), np.uint8), rng.integers(0, 4, 200)
    examples = Examples(pixels, labels.astype(np.int32))
    data = Dataset(examples, examples, 4, (127.0,), (74.0,))
    changes = {
        "loss": "l2",
        "batch_size": 200,
        "eval_batch_size": 200,
        "epochs": 1,
        "whitening.method": "eigh",
        "whitening.eps": 1e-8,
        "whitening.momentum": 0.0,
        "optimizer.learning_rate": 1.0,
        "optimizer.momentum": 0.0,
        "optimizer.weight_decay": 0.0,
        "optimizer.schedule": "constant",
    }
    config = configs.load("configs/fashion_mnist.py:linear,deconv", changes)
    trainer = loop.Trainer(config, Resident(data, config), jax.devices()[:1])
    trainer.compile()
    (row,) = trainer.run(0)
    x = np.column_stack([(pixels.reshape(200, -1) - 127.0) / 74.0, np.ones(200)])
    y = np.eye(4)[labels]
    best = x @ np.linalg.lstsq(x, y, rcond=None)[0]
    assert row["test_loss"] == pytest.approx(0.5 * np.square(best - y).sum(1).mean(), rel=1e-5)
    assert row["train_loss"] > 1.02 * row["test_loss"]  # before the step


def test_channel_deconvolution_of_a_grey_image_is_one_scale_for_all_pixels():
    config = configs.load("configs/fashion_mnist.py:linear,channel", {})
    model = loop.create_model(config, 10, None)
    stats = jax.eval_shape(model.init, jax.random.key(0), jnp.ones((2, 6, 6, 1)))["batch_stats"]
    assert stats["linear"]["whitener"].shape == (1, 1)
    colour = jax.eval_shape(model.init, jax.random.key(0), jnp.ones((2, 6, 6, 3)))["batch_stats"]
    assert colour["linear"]["whitener"].shape == (3, 3)


def whitening_config(**changes):
    named = {f"whitening.{name}": value for name, value in changes.items()}
    return configs.load("configs/cifar10.py:cnn,deconv", named).whitening


def test_a_detached_root_is_the_same_root_without_a_gradient():
    plain, detached = (
        whitening.create(whitening_config()),
        whitening.create(whitening_config(through_root=False)),
    )
    cov = jnp.diag(jnp.array([1.0, 0.2, 0.1]))
    np.testing.assert_array_equal(plain.root(cov), detached.root(cov))
    assert jnp.abs(jax.grad(lambda c: plain.root(c).sum())(cov)).max() > 0.1
    assert jnp.abs(jax.grad(lambda c: detached.root(c).sum())(cov)).max() == 0
    assert detached.replace(num_iters=15).root == whitening.Detached(15)  # as stems lay over it


def test_a_ridge_reaches_the_exact_root_and_no_other():
    spec = whitening.create(whitening_config(method="eigh", ridge=0.01))
    assert spec.root == Eigh(0.01)
    spec = whitening.create(whitening_config(method="chebyshev", ridge=0.01))
    assert spec.root == ChebyshevRidge(0.01)
    with pytest.raises(ValueError, match="ridge"):
        whitening.create(whitening_config(ridge=0.01))
    with pytest.raises(ValueError, match="through_root"):
        whitening.create(whitening_config(method="eigh", through_root=False))


# ---- The runner


def test_a_cell_is_recorded_with_all_that_it_takes_to_run_it_again(tmp_path):
    run = Run("x", Cell("one", 0.1, CONFIG, SMALL, steps=True), 3)
    assert runner(tmp_path).run([run]) == 1
    found = record(tmp_path, "x/one-seed3")
    assert (found["experiment"], found["cell"], found["seed"]) == ("x", "one", 3)
    assert found["status"] == "done"
    assert found["command"] == "python -m train.reproduce x/one --seed=3 --again --data_dir=DIR"
    assert [row["epoch"] for row in found["epochs"]] == [1, 2]
    assert [step for step, _ in found["steps"]] == [*range(1, 11)]
    assert found["config"]["optimizer.learning_rate"] == 1e-3
    assert found["config"]["seed"] == 3
    assert found["versions"]["jax"] == jax.__version__
    assert found["device"].endswith("cores")
    assert found["seconds"] >= found["compile_seconds"] > 0
    assert str(tmp_path) not in json.dumps(found)
    assert not list((tmp_path / "work").rglob("checkpoints"))


def test_what_the_budget_stops_goes_on_where_it_was_and_ends_as_if_nothing_had_happened(tmp_path):
    run = Run("x", Cell("one", 1.0, CONFIG, SMALL | {"epochs": 6}, steps=True), 0)
    whole = runner(tmp_path)
    whole.run([run])
    expected = record(tmp_path)
    (tmp_path / "records/x/one-seed0.json").unlink()

    class Late(Stop):
        """A clock that is past the deadline after a few steps of a session."""

        def __init__(self, steps):
            super().__init__()
            self.left = steps

        def requested(self, step):
            del step
            self.left -= 1
            return None if self.left > 0 else 15

        def noted(self):
            return None

    said = []
    broken = runner(tmp_path, said=said)
    for steps in (7, 9):
        with pytest.raises(Stopped):
            broken._one(run, Late(steps), math.inf)
    assert runner(tmp_path, said=said).run([run]) == 1
    assert "x/one-seed0: resumes at step 16" in said
    found = record(tmp_path)
    assert found["steps"] == expected["steps"]
    for name in ("train_loss", "test_loss", "test_accuracy"):
        assert [r[name] for r in found["epochs"]] == [r[name] for r in expected["epochs"]]


def test_a_run_that_diverges_is_a_result(tmp_path):
    changes = SMALL | {"optimizer.learning_rate": 1e30, "loss": "l2"}
    assert runner(tmp_path).run([Run("x", Cell("one", 0.1, CONFIG, changes), 0)]) == 1
    found = record(tmp_path)
    assert found["status"] == "diverged"
    assert "is inf at step" in found["note"] or "not finite at step" in found["note"]


def test_a_record_says_what_a_preset_came_to(tmp_path):
    config = "configs/cifar10.py:linear,deconv"
    changes = SMALL | {"whitening.preset": "fast", "epochs": 1, "whitening.num_iters": 4}
    runner(tmp_path).run([Run("x", Cell("one", 0.1, config, changes), 0)])
    spec = record(tmp_path)["spec"]
    assert spec == repr(whitening.create(configs.load(config, changes).whitening))
    assert "num_iters=4" in spec
    assert "tol=" in spec


def test_a_dataset_that_cannot_be_had_is_looked_for_once_and_its_cells_are_passed_over(
    tmp_path, monkeypatch
):
    said = []
    told = Runner(tmp_path / "records", tmp_path / "work", npz(tmp_path), said.append)
    cells = [
        Cell("lost", 0.1, "configs/mnist.py:mlp,none", SMALL),
        Cell("again", 0.1, "configs/mnist.py:mlp,none", SMALL),
        Cell("one", 0.1, CONFIG, SMALL),
    ]
    looked, load = [], runners.load_images
    monkeypatch.setattr(runners, "load_images", lambda *args: looked.append(args[0]) or load(*args))
    assert told.run([Run("x", cell, 0) for cell in cells]) == 1
    assert record(tmp_path)["status"] == "done"
    (why,) = told.passed_over
    assert "holds no prepared mnist" in why
    assert looked.count("mnist") == 1
    assert sum("holds no prepared mnist" in line for line in said) == 2


def test_a_cell_that_its_data_do_not_fit_is_passed_over_and_the_next_one_is_not(tmp_path):
    told = runner(tmp_path)
    cells = [
        Cell("large", 0.1, CONFIG, SMALL | {"batch_size": 64}),
        Cell("one", 0.1, CONFIG, SMALL),
    ]
    assert told.run([Run("x", cell, 0) for cell in cells]) == 1
    assert record(tmp_path)["status"] == "done"
    (why,) = told.passed_over
    assert "`batch_size` must be at most the 40 training examples" in why


def photos(folder, broken=None):
    rng = np.random.default_rng(0)
    images = [encode(rng.integers(0, 256, (24, 30, 3), np.uint8), ".jpg") for _ in range(12)]
    if broken is not None:
        images[broken] = b"not a jpeg"
    records = [
        {"image": image, "label": i % 3, "file_name": f"{i}.JPEG"} for i, image in enumerate(images)
    ]
    prepare_photos(folder, {"train": records, "validation": records[:5]})
    size = {"augment.image_size": 16, "augment.eval_resize": 18}
    return Cell("one", 0.1, "configs/imagenet.py:linear,none", SMALL | size | {"augment.crop": 0})


@pytest.fixture
def closed(monkeypatch):
    """How often a stream was closed."""
    found, close = [], Streamed.close
    monkeypatch.setattr(Streamed, "close", lambda stream: (found.append(1), close(stream)))
    return found


def test_photos_are_streamed_and_their_stream_is_closed(tmp_path, closed):
    cell = photos(tmp_path)
    told = Runner(tmp_path / "records", tmp_path / "work", str(tmp_path), print)
    assert told.run([Run("x", cell, 0)]) == 1
    assert [row["step"] for row in record(tmp_path)["epochs"]] == [1, 2]
    assert len(closed) == 1
    lost = Runner(tmp_path / "records", tmp_path / "work", str(tmp_path / "no"), print)
    assert lost.run([Run("x", cell, 1)]) == 0
    assert "holds no prepared imagenet2012" in lost.passed_over[0]


@pytest.mark.parametrize("broken", [0, 4, 11])
def test_a_cell_with_a_photo_that_cannot_be_read_is_passed_over(tmp_path, closed, broken):
    told = Runner(tmp_path / "records", tmp_path / "work", str(tmp_path), print)
    assert told.run([Run("x", photos(tmp_path, broken), 0)]) == 0
    (why,) = told.passed_over
    assert f"{broken}.JPEG" in why
    assert len(closed) == 1


def test_streams_without_their_packages_are_passed_over(tmp_path, monkeypatch):
    cell = photos(tmp_path)
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    told = Runner(tmp_path / "records", tmp_path / "work", str(tmp_path), print)
    assert told.run([Run("x", cell, 0)]) == 0
    assert "train" in told.passed_over[0]


def known(seconds, cell="one", minutes=1.0, **more):
    head = {"experiment": "x", "cell": cell, "status": "done", "seconds": seconds}
    return head | {"minutes": minutes} | results.machine() | more


def test_times_are_learnt_from_the_same_cell_then_from_others_on_this_device_alone(tmp_path):
    cell, other = Run("x", Cell("one", 1.0, CONFIG), 1), Run("x", Cell("two", 3.0, CONFIG), 0)
    assert runner(tmp_path).estimate(cell) is None
    assert runner(tmp_path, [known(5.0, device="elsewhere")]).estimate(cell) is None
    told = runner(tmp_path, [known(5.0), known(30.0, "other", 2.0)])
    assert told.estimate(cell) == 5.0
    assert told.estimate(other) == pytest.approx(3 * (5.0 + 15.0) / 2)


def test_a_budget_is_spent_on_the_cells_that_fit(tmp_path):
    begun = []

    class Recorded(Runner):
        def _one(self, run, stop, deadline):
            begun.append(str(run))

    runs = [Run("x", Cell("long", 100.0, CONFIG), 0), Run("x", Cell("one", 1.0, CONFIG), 0)]
    told = Recorded(tmp_path, tmp_path, "", lambda line: None, [known(6.0)])
    told.run(runs, budget=60.0)
    assert begun[0] == "x/one-seed0"
    assert begun[1] == "x/long-seed0"  # what does not fit is begun with what is left
    begun.clear()
    assert told.run(runs, budget=1.0) == 0
    assert begun == []
    slow = Recorded(tmp_path, tmp_path, "", print, [known(60.0, compile_seconds=50.0)])
    slow.run(runs, budget=55.0)  # what would hardly be compiled is not begun
    assert begun == []
    measure = Run("x", Cell("long", 100.0, measure="tests.x:y"), 0)
    assert told.run([measure], budget=60.0) == 0  # nor what could not go on the next time
    assert begun == []


SLOW = """
import os, pathlib, signal, sys, time, types
from train.experiments.cell import Cell, Run
from train.experiments.runner import Runner
from train.stopping import Stopped

def measure(load, seed):
    if when == "during":
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)
    return {}

def say(line):
    if when == "before" and line.endswith("..."):
        os.kill(os.getpid(), signal.SIGTERM)

when, folder = sys.argv[1], pathlib.Path(sys.argv[2])
sys.modules["slow"] = types.SimpleNamespace(measure=measure)
try:
    Runner(folder, folder / "work", "", say).run([Run("x", Cell("one", 0.1, measure="slow:measure"), 0)])
except Stopped as stopped:
    sys.exit(stopped.exit_status)
"""


@pytest.mark.parametrize(
    ("when", "status"), [("during", -signal.SIGTERM), ("before", 143), ("never", 0)]
)
def test_a_signal_ends_a_measurement_at_once_and_nothing_is_recorded(tmp_path, when, status):
    """A shell calls both of them 143."""
    arguments = [sys.executable, "-c", SLOW, when, str(tmp_path)]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == status, done.stderr
    assert len(list(tmp_path.rglob("one-seed0.json"))) == (when == "never")


# ---- The command


def forbidden(names):
    return f"""
import sys
class Nothing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {names!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Nothing())
from train.reproduce import main
sys.exit(main(sys.argv[1:]))
"""


def test_cells_run_with_jax_flax_optax_and_orbax_alone(tmp_path):
    """A machine of little more than NumPy; the same command twice leaves the second nothing to do."""
    names = "tensorflow_datasets grain cv2 array_record tensorboardX tqdm safetensors sklearn matplotlib"
    arguments = [
        *(sys.executable, "-c", forbidden(set(names.split()))),
        *("figure4a/none-lr0.001", "--seed=1", "--device=cpu", "--compilation_cache="),
        *(f"--data_dir={tmp_path}", f"--results={tmp_path}/records", f"--workdir={tmp_path}/work"),
    ]
    rng = np.random.default_rng(0)
    parts = {"x_train": 600, "x_test": 100}
    arrays: dict[str, Any] = {
        name: rng.integers(0, 256, (n, 28, 28), np.uint8) for name, n in parts.items()
    }
    arrays |= {"y" + name[1:]: rng.integers(0, 10, n) for name, n in parts.items()}
    np.savez(tmp_path / "fashion_mnist.npz", **arrays)
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, env={**os.environ})
    assert done.returncode == 0, done.stderr
    found = record(tmp_path, "figure4a/none-lr0.001-seed1")
    assert found["config"]["loss"] == "l2"
    assert len(found["epochs"]) == 2


def test_the_list_says_what_is_missing(tmp_path, capsys):
    written(tmp_path, "table1_epoch1", "resnet18-batch", 0, 0.5)
    assert main(["list", f"--results={tmp_path}"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    told = {name: [done, *rest[:2]] for name, done, *rest in lines}
    assert told["table1_epoch1"] == ["1/60", "25", "h"]
    assert told["table1_cifar100_epoch1"] == ["0/60", "25", "h"]
    assert told["preprint_table1"] == ["0/27", "11", "days"]
    assert told["rows"] == ["0/2", "2", "min"]


def told(tmp_path, capsys, *arguments):
    status = main([*arguments, f"--results={tmp_path}/r", f"--workdir={tmp_path}/w"])
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return status, error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["figure5"], "NAME must be one of"),
        (["figure4a", "list"], "NAME must be one of"),
        (["figure4a", "--seed=-1"], "`--seed` must be from 0 to 4294967295, got -1"),
        (["report"], "`--results` has no record"),
    ],
)
def test_a_mistake_is_one_line(arguments, message, tmp_path, capsys):
    status, error = told(tmp_path, capsys, *arguments)
    assert status == 2
    assert message in error


def test_data_that_are_not_there_are_told_and_end_with_1(tmp_path, capsys):
    status, error = told(tmp_path, capsys, "figure4a", "--data_dir=/nowhere.npz")
    assert status == 1
    assert "/nowhere.npz" in error


def test_a_broken_record_is_told_by_every_command(tmp_path, capsys):
    (tmp_path / "r/figure2").mkdir(parents=True)
    (tmp_path / "r/figure2/cifar10-seed0.json").write_text("{")
    for name in ("list", "report", "figure4a"):
        status, error = told(tmp_path, capsys, name)
        assert status == 2
        assert "cifar10-seed0.json is no record of a run" in error


# ---- The page


def written(folder, experiment, cell, seed, accuracy, epochs=1):
    run = Run(experiment, next(c for c in EXPERIMENTS[experiment].cells if c.name == cell), seed)
    row = {
        "epoch": epochs,
        "train_loss": 1.0,
        "test_accuracy": accuracy,
        "step_seconds": 0.1,
        "step": 390,
    }
    content = {
        "status": "done",
        "seconds": 9.0,
        "minutes": 1.0,
        "config": {"epochs": epochs},
        "epochs": [row],
    }
    results.write(folder, run, content)


def page(tmp_path, folder):
    found = {name: results.read(folder, one) for name, one in EXPERIMENTS.items()}
    (tmp_path / "docs").mkdir(exist_ok=True)
    write_page(tmp_path / "docs/page.md", EXPERIMENTS, found)
    return (tmp_path / "docs/page.md").read_text()


def test_the_page_says_first_what_does_not_hold(tmp_path):
    for seed in (0, 1):
        for network, gain in (("resnet18", -0.1), ("pnasnet_a", -0.05)):
            written(tmp_path, "table1_epoch1", f"{network}-batch", seed, 0.60 + 0.01 * seed)
            written(tmp_path, "table1_epoch1", f"{network}-deconv", seed, 0.60 + gain)
    text = page(tmp_path, tmp_path)
    claims = [line for line in text.splitlines() if line.startswith("| Table 1")]
    assert "deconvolution beats batch norm | **does not hold**" in claims[0]
    assert "-8.0, 0 of 2 networks" in claims[0]
    assert "The other way round: resnet18, pnasnet_a." in text
    assert "| resnet18 | batch norm | 60.50 (60.00 to 61.00) | 56.25 | +4.25 | 2 |" in text
    assert (tmp_path / "docs/images/reproduction/summary.png").is_file()
    assert (tmp_path / "docs/images/reproduction/table1_epoch1.png").is_file()


def speedruns(tmp_path, *runs):
    """The verdict of the speed run, and the rows of its table, from (cell, seed, accuracy or None)."""
    for cell, seed, accuracy in runs:
        written(tmp_path, "speedrun", cell, seed, accuracy or 0.1)
        path = tmp_path / f"speedrun/{cell}-seed{seed}.json"
        content = json.loads(path.read_text())
        network, norm, epochs = cell.split("-")
        config = {"network": network, "norm": norm, "epochs": int(epochs.removeprefix("epochs"))}
        changes = {"config": config, "status": "done" if accuracy else "diverged"}
        path.write_text(json.dumps(content | changes))
    experiment = EXPERIMENTS["speedrun"]
    found = results.read(tmp_path, experiment)
    (verdict,) = experiment.judge(found)
    return verdict, [line for line in experiment.tell(found, None) if "air" in line]


def test_a_speed_run_of_one_seed_is_no_proof(tmp_path):
    verdict, _ = speedruns(tmp_path, ("airbench-deconv-epochs8", 0, 0.9401))
    assert (verdict.holds, verdict.seeds) == ("undecided", "1")
    assert "One seed" in verdict.why
    verdict, _ = speedruns(tmp_path, ("airbench-deconv-epochs8", 1, 0.9403))
    assert (verdict.holds, verdict.ours) == ("yes", "94.02% in 8 epochs, airbench")


def test_a_speed_run_fails_only_when_all_have_run(tmp_path):
    verdict, _ = speedruns(tmp_path, ("airbench-deconv-epochs6", 0, 0.91))
    assert verdict.holds == "undecided"
    cells = [cell.name for cell in EXPERIMENTS["speedrun"].cells]
    verdict, _ = speedruns(tmp_path, *((name, 0, 0.93) for name in cells))
    assert verdict.holds == "no"


def test_a_speed_run_that_diverged_is_counted_apart(tmp_path):
    runs = [("airbench-deconv-epochs8", 0, 0.92), ("airbench-deconv-epochs8", 1, None)]
    verdict, rows = speedruns(tmp_path, *runs, ("airbench-batch-epochs8", 0, None))
    assert verdict.seeds == "1"
    assert rows[0] == "| airbench | batch norm | 8 |  | 0, 1 diverged |  |"
    assert rows[1].startswith("| airbench | deconvolution | 8 | 92.00 | 1, 1 diverged | 9, ")


def test_a_condition_that_always_diverged_is_in_the_table_of_the_ablation(tmp_path):
    written(tmp_path, "ablation", "full", 0, 0.5)
    written(tmp_path, "ablation", "fast_every4", 0, 0.5)
    path = tmp_path / "ablation/fast_every4-seed0.json"
    path.write_text(path.read_text().replace('"done"', '"diverged"'))
    experiment = EXPERIMENTS["ablation"]
    rows = experiment.tell(results.read(tmp_path, experiment), Pictures(tmp_path / "page.md"))
    assert "| diverged |" in rows[-1]
    assert rows[-1].startswith("| `fast_every4` |")


def raced(tmp_path, **cells):
    """Verdicts and table of a race; by cell and seed seconds a step and the first epoch of 93%, or None."""
    for name, (seconds, reached) in cells.items():
        condition, epochs, seed = name.split("_")
        cell = f"{condition}-epochs{epochs}"
        written(tmp_path, "race", cell, int(seed), 0.95)
        path = tmp_path / f"race/{cell}-seed{seed}.json"
        rows = [
            {
                "step": 100 * epoch,
                "step_seconds": seconds,
                "test_accuracy": 0.93 if reached and epoch >= reached else 0.9,
            }
            for epoch in range(1, 6)
        ]
        record = json.loads(path.read_text()) | {"epochs": rows}
        record |= {"status": "diverged", "epochs": []} if seconds is None else {}
        path.write_text(json.dumps(record))
    experiment = EXPERIMENTS["race"]
    found = results.read(tmp_path, experiment)
    *lines, _, _ = experiment.tell(found, Pictures(tmp_path / "page.md"))
    return *experiment.judge(found), lines


def test_the_race_is_timed_by_steps_until_the_first_epoch_at_the_mark(tmp_path):
    seconds, accuracy, (picture, _, *table) = raced(
        tmp_path, batch_20_0=(0.03, 4), fast_20_0=(0.02, 3), mixed_20_0=(0.01, None)
    )
    assert (seconds.holds, seconds.ours) == ("undecided", "6 s against 12 s")  # one seed
    assert (seconds.difference, seconds.seeds) == ("0.50 of batch norm's", "1 and 1")
    assert (accuracy.holds, accuracy.ours) == ("no", "90.00% against 93.00%")
    assert picture.endswith("(images/reproduction/race.png)")
    assert (tmp_path / "images/reproduction/race.png").stat().st_size > 10_000
    assert [row.count("not reached") for row in table[2:]] == [0, 0, 1]


def test_a_race_is_not_run_without_both(tmp_path):
    seconds, accuracy, _ = raced(tmp_path, fast_20_0=(0.02, 3), fast_10_0=(0.03, None))
    assert {seconds.holds, accuracy.holds} == {"not run"}
    seconds, _, _ = raced(tmp_path, batch_20_0=(None, None))  # diverged
    assert seconds.holds == "not run"


def test_seconds_of_two_devices_are_no_race(tmp_path):
    raced(tmp_path, batch_20_0=(0.03, 4))
    path = tmp_path / "race/batch-epochs20-seed0.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"device": "another"}))
    seconds, _, _ = raced(tmp_path, fast_20_0=(0.02, 3))
    assert seconds.holds == "not run"


def test_who_is_not_there_needs_more_than_its_longest_run(tmp_path):
    seconds, _, _ = raced(tmp_path, batch_10_0=(0.03, None), fast_10_0=(0.02, None))
    assert seconds.holds == "undecided"
    seconds, _, _ = raced(tmp_path, fast_20_0=(0.02, 3))
    assert (seconds.holds, seconds.ours) == ("undecided", "6 s, batch norm more than 15 s")
    seconds, _, _ = raced(tmp_path, fast_20_1=(0.02, 3))
    assert (seconds.holds, seconds.ours) == ("yes", "6 s, batch norm more than 15 s")
    seconds, _, _ = raced(tmp_path, fast_20_1=(0.06, 3))
    assert (seconds.holds, seconds.ours) == ("undecided", "12 s, batch norm more than 15 s")
    batch = {"batch_20_0": (0.03, None), "batch_20_1": (0.01, 4), "batch_20_2": (0.03, None)}
    seconds, _, _ = raced(tmp_path, **batch)
    assert (seconds.holds, seconds.ours) == ("undecided", "12 s, batch norm more than 4 s")
    seconds, _, table = raced(tmp_path, batch_20_0=(0.01, 4), fast_20_1=(None, None))
    assert (seconds.holds, seconds.ours) == ("no", "deconvolution more than 10 s, batch norm 7 s")
    assert any("1, 1 diverged" in row for row in table)


def test_seeds_count_by_their_mean_and_one_proves_nothing(tmp_path):
    seconds, _, _ = raced(tmp_path, batch_20_0=(0.03, 4), fast_20_0=(0.02, 2), fast_20_1=(0.02, 4))
    assert (seconds.holds, seconds.ours) == ("undecided", "8 s against 12 s")  # 91.5% until then
    seconds, _, _ = raced(tmp_path, batch_20_1=(0.03, 4))
    assert (seconds.holds, seconds.seeds) == ("yes", "2 and 2")
    seconds, _, _ = raced(tmp_path, fast_20_1=(0.03, 4))
    assert (seconds.holds, seconds.difference) == ("in part", "0.83 of batch norm's")
    assert "Run were of batch norm 1 cell at 0.1 and of deconvolution 1 cell at 0.1." in seconds.why


def test_every_cell_of_a_race_has_the_rate_and_length_of_its_name():
    for name, module in (("race", race), ("race_cpu", race_cpu)):
        for cell in EXPERIMENTS[name].cells:
            condition, epochs, rate = race.settings(cell.name)
            config = configs.load(cell.config, cell.changes)
            assert (config.epochs, config.optimizer.learning_rate) == (epochs, rate)
            assert config.norm == module.CONDITIONS[condition][1]
    cell = next(cell for cell in race.CELLS if cell.name == "fast_mixed-epochs12-rate0.3")
    spec = whitening.create(configs.load(cell.config, cell.changes).whitening)
    assert spec == WhiteningSpec.fast().replace(precision="high", sample_dtype="bfloat16")


def raced_on_a_cpu(tmp_path, **cells):
    """The verdict and the table, by cell seconds a step and test accuracy by epoch of 100 steps."""
    for name, (seconds, *accuracy) in cells.items():
        condition, epochs, rate = name.split("_")
        cell = race.cell_name(condition, int(epochs), float(f"0.{rate}"))
        written(tmp_path, "race_cpu", cell, 0, 0.0)
        path = tmp_path / f"race_cpu/{cell}-seed0.json"
        rows = [
            {"step": 100 * epoch, "step_seconds": seconds, "test_accuracy": value}
            for epoch, value in enumerate(accuracy, 1)
        ]
        status = "done" if len(rows) == int(epochs) else "diverged"
        path.write_text(
            json.dumps(json.loads(path.read_text()) | {"epochs": rows, "status": status})
        )
    experiment = EXPERIMENTS["race_cpu"]
    found = results.read(tmp_path, experiment)
    (verdict,) = experiment.judge(found)
    return verdict, experiment.tell(found, Pictures(tmp_path / "page.md"))


class Drawn:
    """Keeps what would be drawn."""

    def ends(self, name, runs, **texts):
        self.runs, self.texts = runs, texts
        return name


def test_steps_of_the_race_on_a_cpu_are_those_timed_in_turns(tmp_path, monkeypatch):
    steps = {"batch": {"step_seconds": [3.0, 2.0, 2.5]}, "deconv:fast": {"step_seconds": [1.0]}}
    here = results.machine()["device"]
    for device, found in ((here, "200 s against 750 s"), ("another", "120 s against 150 s")):
        (tmp_path / "steps.json").write_text(
            json.dumps({"environment": {"processor": device}, "contenders": steps})
        )
        monkeypatch.setattr(race_cpu, "STEPS", tmp_path / "steps.json")
        verdict, _ = raced_on_a_cpu(
            tmp_path, batch_4_03=(0.5, 0.6, 0.7, 0.81, 0.82), fast_3_3=(0.6, 0.7, 0.8, 0.85)
        )
        assert verdict.ours == found
    (tmp_path / "steps.json").write_text(
        json.dumps({"environment": {"processor": here}, "contenders": steps})
    )
    verdict, _ = raced_on_a_cpu(
        tmp_path, every4_2_03=(0.5, 0.1, 0.2)
    )  # has not been timed in turns
    assert verdict.ours == "120 s against 150 s"


@pytest.fixture
def untimed(monkeypatch, tmp_path):
    monkeypatch.setattr(race_cpu, "STEPS", tmp_path / "none.json")


@pytest.mark.usefixtures("untimed")
def test_the_race_on_a_cpu_takes_the_soonest_run_of_each_norm(tmp_path):
    verdict, _ = raced_on_a_cpu(tmp_path, batch_4_03=(0.5, 0.6, 0.7, 0.81, 0.82))
    assert verdict.holds == "not run"
    verdict, _ = raced_on_a_cpu(tmp_path, fast_2_1=(0.6, 0.7, 0.79), every4_2_03=(0.5,))
    assert (verdict.holds, verdict.ours) == (
        "undecided",
        "deconvolution more than 120 s, batch norm 150 s",
    )
    verdict, (picture, _, *table) = raced_on_a_cpu(tmp_path, fast_3_3=(0.6, 0.7, 0.8, 0.85))
    assert (verdict.holds, verdict.ours) == ("in part", "120 s against 150 s")
    assert verdict.why.startswith("`WhiteningSpec.fast()` in a run of 3 epochs at rate 0.3, batch")
    assert (tmp_path / "images/reproduction/race_cpu.png").stat().st_size > 10_000
    assert picture.endswith("(images/reproduction/race_cpu.png)")
    rows = [row.split(" | ")[1:7] for row in table[2:-2]]
    assert rows[1] == ["3", "0.3", "85.00", "600", "120", "1"]
    assert rows[3] == ["2", "0.03", "", "", "", "0, 1 diverged"]
    verdict, _ = raced_on_a_cpu(tmp_path, batch_6_03=(0.7, 0.1, 0.1, 0.1, 0.8, 0.8, 0.8))
    assert (verdict.holds, verdict.ours) == (
        "undecided",
        "120 s against 210 s",
    )  # 0.7 is the median


@pytest.mark.usefixtures("untimed")
def test_the_picture_of_the_race_on_a_cpu_has_the_best_rate_of_each_length(tmp_path):
    raced_on_a_cpu(tmp_path, batch_2_03=(0.6, 0.4, 0.6), batch_2_1=(0.6, 0.4, 0.7))
    raced_on_a_cpu(tmp_path, fast_2_1=(0.3, 0.4, 0.72), fast_2_3=(0.3, 0.4, 0.71))
    experiment, drawn = EXPERIMENTS["race_cpu"], Drawn()
    experiment.tell(results.read(tmp_path, experiment), drawn)
    assert drawn.runs == {"batch": [(2.0, [70.0])], "deconv": [(1.0, [72.0])]}


def test_a_page_of_nothing_claims_nothing(tmp_path):
    text = page(tmp_path, tmp_path)
    assert "that were tested" not in text
    assert text.count("Not run yet: ") == 2
    assert all(f"`{name}`" in text for name in EXPERIMENTS)


def test_the_page_in_the_repository_is_that_of_its_records(tmp_path):
    text = page(tmp_path, ROOT / "benchmarks/results")
    assert text == (ROOT / "docs/reproduction.md").read_text()


def test_a_record_of_another_run_than_its_name_says_is_refused(tmp_path):
    written(tmp_path, "ablation", "full", 0, 0.5)
    path = tmp_path / "ablation/full-seed0.json"
    path.rename(tmp_path / "ablation/full-seed9.json")  # would count as another seed
    with pytest.raises(
        ValueError, match=r"full-seed9\.json is no record .* holds ablation/full-seed0"
    ):
        results.read(tmp_path, EXPERIMENTS["ablation"])
    content = json.loads((tmp_path / "ablation/full-seed9.json").read_text()) | {"seed": 9}
    (tmp_path / "ablation/full-seed9.json").write_text(json.dumps(content))
    assert [r["seed"] for r in results.read(tmp_path, EXPERIMENTS["ablation"])["full"]] == [9]
    del content["status"]
    (tmp_path / "ablation/full-seed9.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="it has no status"):
        results.read(tmp_path, EXPERIMENTS["ablation"])


def test_notes_of_records_are_on_the_page_and_seeds_beyond_the_plan_are_counted_apart(tmp_path):
    for seed in (0, 1, 7):
        written(tmp_path, "ablation", "full", seed, 0.5)
    path = tmp_path / "ablation/full-seed7.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"note": "Run by hand."}))
    text = page(tmp_path, tmp_path)
    assert "- `full`: Run by hand." in text
    planned = 3 * len(EXPERIMENTS["ablation"].cells)
    assert f"2 of {planned} runs and 1 with other seeds" in text


# ---- When a difference counts


def test_a_difference_counts_by_students_t_with_the_variance_of_all_conditions():
    """Against SciPy's own test of two samples, and its quantiles where a third condition lends its seeds."""
    one, other, third = [70.0, 71.0, 69.5], [68.1, 69.0, 67.9], [50.0, 52.0]
    noise = evidence.noise([one, other])
    gap = np.mean(one) - np.mean(other)
    tested: Any = stats.ttest_ind(one, other)
    counts = evidence.least(noise, 3, 3)
    assert (gap > counts) == (tested.pvalue < 0.05)
    assert gap / counts * stats.t.ppf(0.975, 4) == pytest.approx(tested.statistic)
    pooled = evidence.noise([one, other, third])
    assert pooled is not None
    assert pooled.freedom == 5
    squares = sum(np.sum((np.array(v) - np.mean(v)) ** 2) for v in (one, other, third))
    assert pooled.deviation == pytest.approx(math.sqrt(squares / 5))
    expected = stats.t.ppf(0.975, 5) * pooled.deviation * math.sqrt(1 + 1 / 3)
    assert evidence.least(pooled, 1, 3) == pytest.approx(expected)


def test_one_seed_is_decided_by_the_seeds_of_others_and_nothing_without_any():
    noise = evidence.noise([[70.0, 71.0, 70.5], [60.0]])
    assert evidence.better([60.0], [70.0, 71.0, 70.5], noise) == "no"
    assert evidence.better([70.0, 71.0, 70.5], [60.0], noise) == "yes"
    assert evidence.better([70.0], [70.5], noise) == "undecided"
    assert evidence.noise([[70.0], [60.0]]) is None
    assert evidence.noise([[70.0, 70.0], [60.0]]) is None
    assert "No condition has two seeds" in evidence.unsure(None, 1, 1)
    assert evidence.better([99.0], [1.0], None) == "undecided"


def test_what_the_first_epoch_borrows_is_what_the_ablation_has():
    found = results.read(ROOT / "benchmarks/results", EXPERIMENTS["ablation"])
    noise = evidence.noise([columns.accuracies(runs) for runs in found.values()])
    assert noise is not None
    assert noise.deviation == pytest.approx(columns.ABLATION_NOISE.deviation, rel=0.1)
    assert noise.freedom >= columns.ABLATION_NOISE.freedom


def test_published_columns_add_up_to_those_of_the_paper():
    """Sums of the columns of Table 1, which were added up from the paper itself."""
    sums = {
        (name, epochs, norm): round(sum(columns[epochs][norm] for columns in table.values()), 2)
        for name, table in (("10", published.FINAL), ("100", published.FINAL_CIFAR100))
        for epochs in (1, 20, 100)
        for norm in ("batch", "deconv")
    }
    assert sums == SUMS
    cell = next(
        c for c in EXPERIMENTS["preprint_table1_cifar100"].cells if c.name == "vgg13-deconv"
    )
    config = configs.load(cell.config, cell.changes)
    assert (config.dataset, config.batch_size, config.epochs) == ("cifar100", 256, 100)
    assert config.optimizer.weight_decay == 5e-3


def test_a_published_range_of_three_seeds_gives_its_deviation():
    """Against what the range of three normal deviates is on average."""
    drawn = np.random.default_rng(0).normal(0, 2, (20_000, 3))
    ranges = list(zip(drawn.min(1).tolist(), drawn.max(1).tolist(), strict=True))
    mean = np.mean([most - least for least, most in ranges])
    assert mean / evidence.RANGE == pytest.approx(2, rel=0.02)
    found = evidence.of_ranges(ranges[:5])
    assert found is not None
    assert found.freedom == 10


@pytest.mark.parametrize(
    ("gains", "verdict"),
    [
        ([-9] * 9, "no"),
        ([-9] * 9 + [0.1], "no"),
        ([-9] * 9 + [9], "no"),
        ([9, 9], "in part"),
        ([9] * 9 + [-9], "in part"),
        ([9] * 9 + [0.1], "in part"),
        ([9] * 10, "yes"),
        ([0.1, 0.1], "undecided"),
        ([-9], "no"),
    ],
)
def test_a_claim_of_all_networks_is_judged_by_those_that_ran(tmp_path, gains, verdict):
    networks = [cell.name for cell in EXPERIMENTS["table1_epoch1"].cells]
    names = list(dict.fromkeys(name.rpartition("-")[0] for name in networks))
    for name, gain in zip(names, gains, strict=False):
        written(tmp_path, "table1_epoch1", f"{name}-batch", 0, 0.5)
        written(tmp_path, "table1_epoch1", f"{name}-deconv", 0, 0.5 + gain / 100)
    experiment = EXPERIMENTS["table1_epoch1"]
    first, *_ = experiment.judge(results.read(tmp_path, experiment))
    assert first.holds == verdict


def test_more_seeds_do_not_unsettle_the_race(tmp_path):
    for seed, mixed, batch in ((0, 0.9421, 0.9237), (1, 0.9400, None), (2, None, 0.9230)):
        for name, accuracy in (("mixed", mixed), ("batch", batch)):
            if accuracy is not None:
                written(tmp_path, "race", f"{name}-epochs20", seed, accuracy, 20)
        experiment = EXPERIMENTS["race"]
        _, accuracy = experiment.judge(results.read(tmp_path, experiment))
        assert accuracy.holds == "yes"


def test_an_ablation_is_judged_by_all_its_seeds(tmp_path):
    for seed, (full, few) in enumerate([(0.670, 0.755), (0.665, 0.760), (0.685, 0.750)]):
        written(tmp_path, "ablation", "full", seed, full)
        written(tmp_path, "ablation", "iterations3", seed, few)
    written(tmp_path, "ablation", "detached", 0, 0.66)
    written(tmp_path, "ablation", "channel", 0, 0.60)
    experiment = EXPERIMENTS["ablation"]
    verdicts = {v.claim: v for v in experiment.judge(results.read(tmp_path, experiment))}
    assert verdicts["Ablation: five iterations are better than three"].holds == "no"
    unsure = verdicts["Ablation: the gradient through the whitener helps"]
    assert unsure.holds == "undecided"
    assert "Chance may make as much of so few runs" in unsure.why
    sure = verdicts["Ablation: full deconvolution is better than channel deconvolution"]
    assert (sure.holds, sure.ours, sure.seeds) == ("yes", "67.33% against 60.00%", "3 and 1")
    assert verdicts["Ablation: deconvolution is better than batch norm"].holds == "not run"


def test_images_survive_their_packing():
    image = np.random.default_rng(0).integers(0, 256, (5, 7, 3)) / 255
    np.testing.assert_allclose(images.unpack(images.pack(image)), image)
