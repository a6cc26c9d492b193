"""Measurements of a trained network: how sparse its layers' inputs are, and what its filters look like."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from netdeconv_jax import DeconvConv, analysis, ops
from netdeconv_jax.whitening.conv import conv_groups
from train import config as configs
from train import loop
from train.data.resident import Resident
from train.data.sources import Dataset
from train.experiments import images
from train.experiments.inputs import Load, describe, rounded
from train.output import Output

IMAGES = 256  # of the test set
SHOWN = 3  # channels in the picture of features
STEM, NORMS = "conv1", ("deconv", "batch")


class _Variables(Output):
    """Keeps the variables that a run ends with."""

    def finish(self, variables: Any) -> None:
        """See `Output`."""
        self.variables = variables


def measure(
    load: Load, seed: int, network: str, layer: str, width: float = 1.0, epochs: int = 1
) -> dict[str, Any]:
    """Train a network on CIFAR-10 with either norm, look at its filters and at the inputs of its layers.

    Args:
      load: returns a dataset.
      seed: of the training.
      network: one whose first convolution is called `conv1`.
      layer: whose input is pictured.
      width, epochs: of the training.
    """
    data = load("cifar10")
    figures: dict[str, Any] = {
        "network": network,
        "layer": layer,
        "test_accuracy": {},
        "filters": {},
    }
    for norm in NORMS:
        changes = {"model.width": width, "epochs": epochs}
        config = configs.load(f"configs/cifar10.py:{network},{norm}", changes)
        trainer, output = loop.Trainer(config, Resident(data, config)), _Variables()
        trainer.compile()
        rows = list(trainer.run(seed, output))
        figures["test_accuracy"][norm] = rows[-1]["test_accuracy"]
        # The first layer's input is the data's: its whitener at the end is that at the start too.
        start = {**output.variables, "params": trainer.init(seed).variables()["params"]}
        for when, variables in (("start", start), ("end", output.variables)):
            for name, kernel in _kernels(trainer.model, variables, norm).items():
                figures["filters"][f"{name}, {when}"] = _filters(kernel)
        if norm == "deconv":
            figures["whitener"] = _whitener(trainer.model, output.variables, data)
            figures["layers"] = _layers(trainer.model, output.variables, data)
            figures["pictures"] = _pictures(trainer.model, output.variables, data, layer)
            figures["photo"] = images.PHOTO
    return figures


def _kernels(model: Any, variables: Any, norm: str) -> dict[str, np.ndarray]:
    """Return the first layer's kernels [height, width, channels, features]: as trained, and as applied."""
    kernel = np.asarray(variables["params"][STEM]["kernel"], np.float64)
    if norm != "deconv":
        return {"batch norm: w": kernel}
    stats = variables["batch_stats"][STEM]
    height, width, channels, _ = kernel.shape
    groups = conv_groups(model.spec, channels, height * width)
    applied, _ = ops.fold(jnp.asarray(kernel), None, stats["mean"], stats["whitener"], groups)
    return {"deconvolution: w": kernel, "deconvolution: D w": np.asarray(applied, np.float64)}


def _filters(kernel: np.ndarray) -> dict[str, Any]:
    """Return how many filters are centre-surround in brightness, and those planes themselves."""
    brightness = kernel.mean(2)
    found = analysis.centre_surround(brightness)
    return {
        "count": brightness.shape[-1],
        "share": found.share,
        "balance": found.balance,
        "planes": rounded(np.moveaxis(brightness, -1, 0)[:12]),
    }


def _whitener(model: Any, variables: Any, data: Dataset) -> dict[str, Any]:
    """Return the rows of D that belong to the middle tap of each channel, by the channel they look at."""
    stats, kernel = variables["batch_stats"][STEM], variables["params"][STEM]["kernel"]
    size, channels = kernel.shape[:2], len(data.mean)
    groups = conv_groups(model.spec, channels, size[0] * size[1])
    filters = analysis.whitening_filters(stats["whitener"], size, channels, groups)
    middle = filters[
        ..., size[0] // 2, size[1] // 2
    ]  # [height, width, channel in, channel of the row]
    own = np.stack([middle[:, :, c, c] for c in range(channels)], -1)
    # What a channel's filter sees in the others says whether colours oppose each other.
    others = [middle[:, :, i, o].sum() for i, o in itertools.permutations(range(channels), 2)]
    found = analysis.centre_surround(own)
    return {
        "share": found.share,
        "balance": found.balance,
        "own": rounded(np.moveaxis(own, -1, 0)),
        "all": rounded(middle.transpose(3, 2, 0, 1)),
        "other_channels": rounded(np.asarray(others)),
    }


def _inputs(model: Any, variables: Any, x: Any) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Return by layer what a whitened convolution gets, and that deconvolved at the middle tap."""
    seen: dict[str, tuple[DeconvConv, jax.Array]] = {}

    def watch(call, args, kwargs, context):
        if isinstance(context.module, DeconvConv) and context.method_name == "__call__":
            seen["/".join(context.module.path)] = (context.module, args[0])
        return call(*args, **kwargs)

    with nn.intercept_methods(watch):
        model.apply(variables, jnp.asarray(x), train=False)
    found = {}
    for name, (module, given) in seen.items():
        stats: Any = variables["batch_stats"]
        for part in name.split("/"):
            stats = stats[part]
        size: Any = module.kernel_size
        geometry = ops.window(size, padding="SAME")
        groups = conv_groups(
            module.resolved_spec(), given.shape[-1], geometry.taps, module.feature_group_count
        )
        sharp = analysis.deconvolved(given, stats["mean"], stats["whitener"], geometry, groups)
        found[name] = given, sharp
    return found


def _layers(model: Any, variables: Any, data: Dataset) -> dict[str, Any]:
    inputs = _inputs(model, variables, images.normalized(data.test, data, IMAGES))
    return {
        name: {
            "input": describe(given),
            "centred": describe(np.asarray(given) - np.asarray(given).mean((0, 1, 2))),
            "deconvolved": describe(sharp),
        }
        for name, (given, sharp) in inputs.items()
    }


def _pictures(model: Any, variables: Any, data: Dataset, layer: str) -> dict[str, Any]:
    """Return the channels of a layer's input that vary most, on a photo, as figure 9 shows them."""
    x = (images.photo()[None].astype(np.float32) - data.mean) / data.deviation
    x = x[:, : x.shape[1] // 32 * 32, : x.shape[2] // 32 * 32].astype(np.float32)
    given, sharp = (np.asarray(part)[0] for part in _inputs(model, variables, x)[layer])
    pictures = {}
    for number, channel in enumerate(np.argsort(-given.std((0, 1)))[:SHOWN], 1):
        pictures[f"input {number}"] = images.pack(images.stretched(given[..., channel]))
        pictures[f"|deconvolved| {number}"] = images.pack(
            images.stretched(np.abs(sharp[..., channel]))
        )
    return pictures
