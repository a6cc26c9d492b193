"""Configs: every experiment builds, and every mistake is answered by its name and what would be right."""

import subprocess
import sys
from pathlib import Path

import pytest

from netdeconv_jax import models
from netdeconv_jax.models.units import NORMS
from train import config as configs
from train import loop

ROOT = Path(__file__).parents[1]
EXPERIMENTS = sorted(path.stem for path in (ROOT / "configs").glob("*.py"))


def source(name, arg=""):
    return f"{ROOT}/configs/{name}.py" + (f":{arg}" if arg else "")


def test_there_is_a_config_for_each_dataset():
    assert {"digits", "mnist", "fashion_mnist", "cifar10", "cifar100", "imagenet"} <= {*EXPERIMENTS}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_config_is_complete_and_begins_with_its_command(name):
    config = configs.load(source(name), {})
    for key in ("data_dir", "epochs", "batch_size", "seed"):
        assert key in config
    text = Path(source(name)).read_text()
    for part in ("python -m train.main", f"configs/{name}.py", "Hardware:", "Time:", "ccuracy"):
        assert part in text.split('"""')[1], part


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", [name for name in EXPERIMENTS if name != "digits"])
def test_every_config_takes_every_norm_and_network(name, norm):
    config = configs.load(source(name, f"resnet18,{norm}"), {})
    assert config.norm == norm
    assert config.network == ("resnet18_imagenet" if name == "imagenet" else "resnet18")
    assert loop.create_model(config, 10, None).norm == norm


def test_imagenet_has_a_modern_recipe():
    original = configs.load(source("imagenet", "resnet50,deconv"), {})
    modern = configs.load(source("imagenet", "resnet50,deconv,modern"), {})
    assert (original.dtype, modern.dtype) == ("float32", "bfloat16")
    assert modern.optimizer.learning_rate / original.optimizer.learning_rate == pytest.approx(
        modern.batch_size / original.batch_size
    )
    assert configs.load(source("imagenet", "vgg11,batch"), {}).optimizer.learning_rate == 0.01
    with pytest.raises(ValueError, match="may be followed by a comma and one of"):
        configs.load(source("imagenet", "resnet50,deconv,old"), {})


def test_whitening_settings_reach_the_layers():
    changes = {
        "whitening.block_size": 16,
        "whitening.num_iters": 3,
        "whitening.method": "chebyshev",
        "whitening.local_norm": "layer",
    }
    config = configs.load(source("cifar10"), changes)
    spec = loop.create_model(config, 10, None).spec
    assert spec == models.create("lenet").spec.replace(
        block_size=16, num_iters=3, method="chebyshev", local_norm="layer"
    )
    fast = configs.load(source("cifar10"), {"whitening.preset": "fast", "whitening.momentum": 0.5})
    assert loop.create_model(fast, 10, None).spec == spec.fast().replace(momentum=0.5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "`epochs` must be an int of at least 1, got 0"),
        ({"epochs": 1.5}, "`epochs` must be an int of at least 1, got 1.5"),
        ({"epochs": True}, "`epochs` must be an int of at least 1, got True"),
        ({"epochs": "many"}, "`epochs` must be an int of at least 1, got 'many'"),
        ({"epoch": 3}, "`epoch` is not a key of this config; the nearest is `epochs`"),
        ({"seed": -1}, "`seed` must be an int of at least 0 and at most 4294967295, got -1"),
        ({"seed": 2**32}, "`seed` must be an int of at least 0 and at most 4294967295, got"),
        ({"model.width": float("inf")}, "`model.width` must be a number above 0, got inf"),
        ({"dtype": "half"}, "`dtype` must be one of .*, got 'half'"),
        ({"parallel": "tmap"}, "`parallel` must be one of .*, got 'tmap'"),
        ({"accumulate": 3}, "`accumulate` must divide `batch_size`=32, got 3"),
        ({"ema": 1.0}, r"`ema` must be a number in \[0, 1\), got 1.0"),
        ({"model.widht": 8}, "`model.widht` is not a key of this config; the nearest is"),
        ({"model": 8}, "`model` is not a key of this config; the nearest is"),
        ({"whitening.block_size": "big"}, "`whitening.block_size` must be of type int, got 'big'"),
        ({"whitening.method": 3}, "`whitening.method` must be of type str, got 3"),
        ({"optimizer.learning_rate": 0}, "`optimizer.learning_rate` must be a number above 0"),
        ({"optimizer.momentum": 1.0}, r"`optimizer.momentum` must be a number in \[0, 1\)"),
        ({"optimizer.milestones": (0.7, 0.5)}, "`optimizer.milestones` must be increasing shares"),
        (
            {"augment.image_size": 320},
            "`augment.eval_resize` must be at least `augment.image_size`=320, got 256",
        ),
        ({"log.every_steps": 0}, "`log.every_steps` must be an int of at least 1, got 0"),
    ],
)
def test_a_bad_value_is_answered_by_its_name_and_what_would_be_right(changes, message):
    with pytest.raises(ValueError, match=message):
        configs.load(source("digits"), changes)


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("configs/none.py:cnn,deconv", "`--config` must name a Python file, got 'configs/none.py'"),
        (source("digits", "cnn,layer"), "`:network,norm` must be .*, got 'cnn,layer'"),
        (source("cifar10", ",deconv"), "`:network,norm` must be .*, got ',deconv'"),
        (source("imagenet", "resnet50"), "`:network,norm` must be .*, got 'resnet50,'"),
        (source("imagenet", "a,deconv,new"), "may be followed by .*, got 'a,deconv,new'"),
        (source("imagenet", "a,deconv,modern,x"), "may be followed by .*, got 'a,deconv,modern,x'"),
    ],
)
def test_a_bad_source_is_named(where, message):
    with pytest.raises(ValueError, match=message):
        configs.load(where, {})


def test_a_typo_in_a_config_file_is_answered_in_a_line(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from train import config\n"
        "def get_config(arg):\n"
        "    c = config.default()\n"
        "    c.optimzer.learning_rate = 0.1\n"
        "    return c\n"
    )
    with pytest.raises(ValueError, match=r"`--config` .*mine\.py is no config: .*optimzer"):
        configs.load(f"{file}:cnn,deconv", {})


def test_seeds_are_ints_that_fit():
    assert configs.seeds(["0", "7"]) == [0, 7]
    for text in ("-1", "x", str(2**32)):
        with pytest.raises(ValueError, match=f"`--seeds` must be .*, got 1,{text}"):
            configs.seeds(["1", text])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config=x.py"], "workdir"),
        (["--config=x.py", "--workdir=x", "--workdri=y"], "workdri"),
        ([f"--config={ROOT}/configs/digits.py", "--workdir="], "`--workdir` must name a folder"),
        (["--config=x.py", "--workdir=x", "--process_id=first"], "process_id"),
        (
            [
                "--config=x",
                "--workdir=x",
                "--coordinator=here",
                "--num_processes=2",
                "--process_id=0",
            ],
            "`--coordinator` must be host:port, got 'here'",
        ),
    ],
)
def test_a_bad_flag_is_answered_in_one_line(arguments, message):
    command = [sys.executable, "-m", "train.main", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("train: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_differences_name_what_may_not_change_and_pass_over_what_may():
    old = configs.flat(configs.load(source("digits"), {}))
    new = old | {"seed": 4, "parallel": "pmap", "data_dir": "elsewhere", "log.every_steps": 7}
    assert configs.differences(old, new) == ["seed: was 0, is now 4"]
    without = {name: value for name, value in old.items() if name != "ema"}
    assert configs.differences(without, old) == ["ema: was None, is now 0.0"]
