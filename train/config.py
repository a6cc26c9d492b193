"""Configs: every key with its default, and what is wrong with a config, said in one line."""

import ast
import difflib
import importlib.util
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_collections
from ml_collections import config_dict

from train.config_rules import MUST, WHITENING

# An `ml_collections.ConfigDict`. Of the types of its values it knows too little to be of use to a checker.
Config = Any

# ml_collections' own flag type answers a mistake in a config with a page of traceback: hence this file.
_PREFIX = "--config."

# What a run may change when it is resumed, because it changes no number, or only where it is computed.
FREE_TO_CHANGE = ("data_dir", "parallel", "bad_images", "log", "checkpoint")


def default() -> Config:
    """Return a config with every key that there is; an experiment changes what it needs.

    None means: not set. Times are in epochs, sizes of batches count all devices.
    """
    config = ml_collections.ConfigDict()
    config.dataset = ""  # a name of train/data
    config.data_dir = ""  # a folder of prepared datasets or an .npz file; "": TFDS's own folder
    config.network = "cnn"  # a name of netdeconv_jax.models.list()
    config.norm = "deconv"  # batch, channel, deconv or none
    config.epochs = 1
    config.batch_size = 128
    config.eval_batch_size = 512
    config.seed = 0
    config.dtype = "float32"  # of computation; parameters and statistics are float32 always
    config.loss = "cross_entropy"  # or "l2": half the squared distance to one-hot targets
    config.label_smoothing = 0.0
    config.accumulate = 1  # microbatches a step
    config.ema = 0.0  # decay of the average of the weights that is evaluated; 0: the weights
    config.recalibrate = 0  # batches of a pass for precise (global) statistics before an evaluation
    config.statistics = "global"  # of the whole batch, or of each "device" by itself
    config.parallel = "jit"  # or "pmap"
    config.bad_images = "raise"  # of photos that cannot be decoded; or "skip", and count

    config.model = ml_collections.ConfigDict()
    config.model.width = 1.0
    config.model.layout = "full"  # or "original": the original code's network, quirks included

    config.whitening = ml_collections.ConfigDict()  # laid over the network's own, see WhiteningSpec
    config.whitening.preset = "paper"  # or "fast", "mixed"
    for name, kind in WHITENING.items():
        setattr(config.whitening, name, config_dict.placeholder(kind))
    config.whitening.through_root = True  # False: no gradient flows through the whitener
    config.whitening.update_every = 1  # steps; those between reuse the running statistics
    # Momentum 0.9 leaves 0.9**50 = 0.5% of the identity that the running whitener starts from.
    config.whitening.update_warmup_steps = 50  # first steps, which all compute statistics

    config.augment = ml_collections.ConfigDict()
    config.augment.crop = 0  # pixels of black border that a random crop may reach into
    config.augment.flip = False
    config.augment.image_size = 224  # of datasets with images of many sizes
    config.augment.eval_resize = 256  # of their shorter side, before the crop at the centre

    config.optimizer = ml_collections.ConfigDict()
    config.optimizer.name = "sgd"
    config.optimizer.learning_rate = 0.1
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_epochs = 0.0
    config.optimizer.milestones = (0.5, 0.75)  # of schedule "multistep": shares of the run
    config.optimizer.decay = 0.1  # at each
    config.optimizer.momentum = 0.9
    config.optimizer.nesterov = False
    config.optimizer.weight_decay = 0.0
    config.optimizer.decay_on = "all"  # parameters, or "kernels"

    config.checkpoint = ml_collections.ConfigDict()
    config.checkpoint.keep = 2  # the newest so many, and the best one
    config.checkpoint.every_steps = 0  # between those at the ends of epochs; 0: none
    config.log = ml_collections.ConfigDict()
    config.log.every_steps = 50  # a row of training figures
    config.log.diagnostics_every_steps = 0  # a row of diagnostics of every whitened layer; 0: none
    return config


def network_and_norm(arg: str, norms: Iterable[str]) -> tuple[str, str]:
    """Split a config string `network,norm`.

    Raises:
      ValueError: it has another form, or the norm is none of `norms`.
    """
    network, _, norm = arg.partition(",")
    if not network or norm not in norms:
        raise ValueError(
            f"`:network,norm` must be a network, a comma and one of {tuple(norms)}, got {arg!r}."
        )
    return network, norm


def is_override(argument: str) -> bool:
    """Return whether a command-line argument has the form `--config.x=y`."""
    return argument.startswith(_PREFIX)


def overrides(arguments: Sequence[str]) -> dict[str, Any]:
    """Return what `--config.x=y` arguments set: Python literals, or strings.

    Raises:
      ValueError: an argument of another form.

    Example:
      >>> overrides(["--config.epochs=3", "--config.optimizer.schedule=constant"])
      {'epochs': 3, 'optimizer.schedule': 'constant'}
    """
    result = {}
    for argument in arguments:
        name, equals, text = argument.removeprefix(_PREFIX).partition("=")
        if not is_override(argument) or not equals:
            raise ValueError(f"An argument must be `--flag=value`, got `{argument}`.")
        try:
            result[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            result[name] = text
    return result


def seeds(texts: Sequence[str]) -> list[int]:
    """Return the seeds that `texts` spell, or raise ValueError."""
    what, holds = MUST["seed"]
    numbers = [int(text) if text.strip().isdecimal() else None for text in texts]
    if not all(map(holds, numbers)):
        raise ValueError(f"Each of `--seeds` must be {what}, got {','.join(texts)}.")
    return [number for number in numbers if number is not None]


def load(source: str, changes: Mapping[str, Any]) -> Config:
    """Return `get_config(arg)` of `file.py:arg`, changed, checked and locked.

    Args:
      source: path of the file, with a config string after a colon or without.
      changes: values by dotted name, see `overrides`.
    Raises:
      ValueError: no such file, a config string it does not know, an unknown key or a bad value.
    """
    path, *arg = source.split(":", 1)
    spec = (
        importlib.util.spec_from_file_location("experiment", path) if Path(path).is_file() else None
    )
    if spec is None or spec.loader is None:
        raise ValueError(f"`--config` must name a Python file, got {path!r}.")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        get_config = module.get_config
    except Exception as error:  # whatever the file does
        raise _no_config(path, error) from error
    try:
        config = get_config(*arg)
        config.lock()
    except ValueError:  # of a config string that it does not know
        raise
    except Exception as error:
        raise _no_config(path, error) from error
    for name, value in changes.items():
        _change(config, name, value)
    check(config)
    return config


def _no_config(path: str, error: Exception) -> ValueError:
    reason = (str(error) or type(error).__name__).splitlines()[0]
    return ValueError(f"`--config` {path} is no config: {reason}")


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values of a nested config by dotted name; tuples as lists, as JSON has them."""
    result = {}
    for name, value in config.items():
        if isinstance(value, Mapping | ml_collections.ConfigDict):
            result |= flat(dict(value), f"{prefix}{name}.")
        else:
            result[f"{prefix}{name}"] = list(value) if isinstance(value, tuple) else value
    return result


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return one line for each value of two flat configs that differs and may not when a run is resumed."""
    names = sorted(
        name
        for name in {*old, *new}
        if name.partition(".")[0] not in FREE_TO_CHANGE and old.get(name) != new.get(name)
    )
    return [f"{name}: was {old.get(name)!r}, is now {new.get(name)!r}" for name in names]


def check(config: Config) -> None:
    """Raise ValueError for a key that is missing or unknown, or a value out of range.

    Names of datasets, networks and optimizers, and settings of the whitening, are checked where they serve.
    """
    have = flat(config)
    for name in have:
        if name not in MUST:
            raise ValueError(f"`{name}` is not a key of a config; {_nearest(name, MUST)}.")
    for name, (what, holds) in MUST.items():
        if name not in have:
            raise ValueError(f"`{name}` is missing from the config: it must be {what}.")
        if not holds(have[name]):
            raise ValueError(f"`{name}` must be {what}, got {have[name]!r}.")
    if config.batch_size % config.accumulate:
        raise ValueError(
            f"`accumulate` must divide `batch_size`={config.batch_size}, got {config.accumulate}."
        )
    if config.augment.eval_resize < config.augment.image_size:
        raise ValueError(
            f"`augment.eval_resize` must be at least `augment.image_size`={config.augment.image_size}, got "
            f"{config.augment.eval_resize}."
        )
    if config.recalibrate and config.parallel == "pmap":
        raise ValueError(f"`recalibrate` must be 0 with `parallel` pmap, got {config.recalibrate}.")


def _change(config: Config, name: str, value: Any) -> None:
    have = flat(config)
    if name not in have:
        raise ValueError(f"`{name}` is not a key of this config; {_nearest(name, have)}.")
    try:
        config.update_from_flattened_dict({name: value})
    except (TypeError, ValueError):
        kind = type(have[name]).__name__
        what = MUST[name][0] if name in MUST else f"of type {kind}"
        raise ValueError(f"`{name}` must be {what}, got {value!r}.") from None


def _nearest(name: str, known: Iterable[str]) -> str:
    return f"the nearest is `{difflib.get_close_matches(name, known, n=1, cutoff=0)[0]}`"
