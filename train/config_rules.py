"""What each value of a config must be, in words and as a test."""

import math
from collections.abc import Callable
from typing import Any

# Settings of the whitening that are not set (None) unless an experiment sets them, and their types.
WHITENING = {
    "block_size": int,
    "num_iters": int,
    "eps": float,
    "momentum": float,
    "sampling_stride": int,
    "sampling_centred": bool,
    "whiten": str,
    "grouping": str,
    "shared_whitener": bool,
    "local_norm": str,
    "method": str,
    "one_pass": bool,
    "sample_dtype": str,
    "precision": str,  # of the root's products, and folding's
    "ridge": float,  # of methods "eigh" and "chebyshev", relative to the norm
}

Rule = tuple[str, Callable[[Any], bool]]


def _int_from(least: int, most: float = math.inf) -> Rule:
    def holds(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most

    return f"an int of at least {least}" + (
        f" and at most {most}" if most < math.inf else ""
    ), holds


def _number(what: str, holds: Callable[[float], bool]) -> Rule:
    def is_such(value: Any) -> bool:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return is_number and abs(value) < math.inf and holds(value)

    return f"a number {what}", is_such


def _one_of(*values: str) -> Rule:
    return f"one of {values}", lambda value: value in values


def _increasing_shares(value: Any) -> bool:
    numbers = isinstance(value, list) and all(isinstance(v, int | float) for v in value)
    return numbers and all(a < b for a, b in zip([0, *value], [*value, 1], strict=True))


_STRING: Rule = ("a string", lambda value: isinstance(value, str))
_BOOL: Rule = ("True or False", lambda value: isinstance(value, bool))
_SHARE: Rule = _number("in [0, 1)", lambda v: 0 <= v < 1)

MUST: dict[str, Rule] = {
    "dataset": _STRING,
    "data_dir": _STRING,
    "network": _STRING,
    "norm": _STRING,
    "epochs": _int_from(1),
    "batch_size": _int_from(1),
    "eval_batch_size": _int_from(1),
    "seed": _int_from(0, 2**32 - 1),  # a larger one would be cut to 32 bits, and be another's
    "dtype": _one_of("float32", "bfloat16"),
    "loss": _one_of("cross_entropy", "l2"),
    "label_smoothing": _SHARE,
    "accumulate": _int_from(1),
    "ema": _SHARE,
    "recalibrate": _int_from(0),
    "statistics": _one_of("global", "device"),
    "parallel": _one_of("jit", "pmap"),
    "bad_images": _one_of("raise", "skip"),
    "model.width": _number("above 0", lambda v: v > 0),
    "model.layout": _one_of("full", "original"),
    "whitening.preset": _one_of("paper", "fast", "mixed"),
    "whitening.through_root": _BOOL,
    "whitening.update_every": _int_from(1),
    "whitening.update_warmup_steps": _int_from(0),
    "augment.crop": _int_from(0),
    "augment.flip": _BOOL,
    "augment.image_size": _int_from(1),
    "augment.eval_resize": _int_from(1),
    "optimizer.name": _STRING,
    "optimizer.schedule": _STRING,
    "optimizer.learning_rate": _number("above 0", lambda v: v > 0),
    "optimizer.warmup_epochs": _number("of at least 0", lambda v: v >= 0),
    "optimizer.milestones": ("increasing shares of the run, in (0, 1)", _increasing_shares),
    "optimizer.decay": _number("above 0", lambda v: v > 0),
    "optimizer.momentum": _SHARE,
    "optimizer.nesterov": _BOOL,
    "optimizer.weight_decay": _number("of at least 0", lambda v: v >= 0),
    "optimizer.decay_on": _one_of("all", "kernels"),
    "checkpoint.keep": _int_from(2),
    "checkpoint.every_steps": _int_from(0),
    "log.every_steps": _int_from(1),
    "log.diagnostics_every_steps": _int_from(0),
}
for _name, _kind in WHITENING.items():
    MUST[f"whitening.{_name}"] = (f"of type {_kind.__name__}", lambda value: True)
