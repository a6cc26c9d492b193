"""Configs: read one from its file, and answer what is wrong with it in one line."""

import ast
import difflib
import importlib.util
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

# An `ml_collections.ConfigDict`. Of the types of its values it knows too little to be of use to a checker.
Config = Any

# ml_collections' own flag type answers a mistake in a config with a page of traceback: hence this file.
_PREFIX = "--config."


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
    """Return the ints >= 0 that `texts` spell, or raise ValueError."""
    if not all(text.strip().isdecimal() for text in texts):
        raise ValueError(f"`--seeds` must be ints of at least 0, got {','.join(texts)}.")
    return [int(text) for text in texts]


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
    spec.loader.exec_module(module)
    config = module.get_config(*arg)
    config.lock()
    for name, value in changes.items():
        _change(config, name, value)
    check(config)
    return config


def check(config: Config) -> None:
    """Raise ValueError for a key that is missing or unknown, or a value out of range.

    Names of datasets, networks and optimizers, and the settings of `model`, are checked where they are used.
    """
    have = {name: v for name, v in _flat(config.to_dict()).items() if not name.startswith("model.")}
    for name in have:
        if name not in _MUST:
            raise ValueError(f"`{name}` is not a key of a config; {_nearest(name, _MUST)}.")
    for name, (what, holds) in _MUST.items():
        if name not in have:
            raise ValueError(f"`{name}` is missing from the config: it must be {what}.")
        if isinstance(have[name], bool) or not holds(have[name]):
            raise ValueError(f"`{name}` must be {what}, got {have[name]!r}.")


def _change(config: Config, name: str, value: Any) -> None:
    have = _flat(config.to_dict())
    if name not in have:
        raise ValueError(f"`{name}` is not a key of this config; {_nearest(name, have)}.")
    try:
        config.update_from_flattened_dict({name: value})
    except (TypeError, ValueError):
        kind = type(have[name]).__name__
        what = _MUST[name][0] if name in _MUST else f"of type {kind}"
        raise ValueError(f"`{name}` must be {what}, got {value!r}.") from None


def _nearest(name: str, known: Iterable[str]) -> str:
    return f"the nearest is `{difflib.get_close_matches(name, known, n=1, cutoff=0)[0]}`"


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    result = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            result |= _flat(value, f"{prefix}{name}.")
        else:
            result[f"{prefix}{name}"] = value
    return result


def _string(value: Any) -> bool:
    return isinstance(value, str)


def _int_from(least: int) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, int) and value >= least


def _number(holds: Callable[[float], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, (int, float)) and holds(value)


_MUST: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "dataset": ("a string", _string),
    "data_dir": ("a string", _string),
    "network": ("a string", _string),
    "norm": ("a string", _string),
    "epochs": ("an int of at least 1", _int_from(1)),
    "batch_size": ("an int of at least 1", _int_from(1)),
    "eval_batch_size": ("an int of at least 1", _int_from(1)),
    "seed": ("an int of at least 0", _int_from(0)),
    "augment.shift": ("an int of at least 0", _int_from(0)),
    "optimizer.name": ("a string", _string),
    "optimizer.schedule": ("a string", _string),
    "optimizer.learning_rate": ("a number above 0", _number(lambda v: v > 0)),
    "optimizer.momentum": ("a number in [0, 1)", _number(lambda v: 0 <= v < 1)),
    "optimizer.weight_decay": ("a number of at least 0", _number(lambda v: v >= 0)),
}
