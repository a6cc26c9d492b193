"""A network of the zoo with its weights, from the one file that the trainer leaves."""

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

from netdeconv_jax import models
from netdeconv_jax.interop.dry_run import kernel_shapes
from netdeconv_jax.interop.weights import load_weights
from netdeconv_jax.whitening import Chebyshev, ChebyshevRidge, Eigh, WhiteningSpec

_NEEDED = ("network", "norm", "num_classes")
_OF_TRAINING = ("through_root", "update_every", "update_warmup_steps")


def load_model(
    path: str | os.PathLike,
) -> tuple[models.Network, dict[str, Any], dict[str, Any]]:
    """Return the network of a `model.safetensors`, its variables and the file's metadata.

    The metadata say which network it is: `network`, `norm` and `num_classes`; where they hold the trainer's
    `config`, its width, layout, dtype and whitening are those of the network too. So a file of your own is
    `save_weights(path, variables, {"network": "resnet18", "norm": "deconv", "num_classes": "10"})`, with
    `"config": '{"whitening.local_norm": "layer"}'` besides where the spec is not the default one: the weights
    do not tell it.

    Args:
      path: of the file.
    Returns:
      The model, its variables as NumPy arrays, and the metadata, `config` as a dict of values by dotted name.
    Raises:
      FileNotFoundError: there is no file at `path`.
      ValueError: it is not a safetensors file, or its metadata do not say which network it is, or say
        another than that of the weights, to the shapes.
      ImportError: the package safetensors is missing.

    Source: ours.

    Example:
      >>> import tempfile, jax, jax.numpy as jnp
      >>> from netdeconv_jax import models
      >>> from netdeconv_jax.interop import load_model, save_weights
      >>> model, x = models.create("lenet", norm="none"), jnp.ones((1, 8, 8, 1))
      >>> metadata = {"network": "lenet", "norm": "none", "num_classes": "10"}
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save_weights(folder + "/model.safetensors", model.init(jax.random.key(0), x), metadata)
      ...     again, variables, _ = load_model(folder + "/model.safetensors")
      >>> again == model, again.apply(variables, x).shape
      (True, (1, 10))
    """
    variables, metadata = load_weights(path)
    config = metadata.get("config", {})
    if isinstance(config, str):
        try:
            config = json.loads(config)
        except ValueError:
            config = None
    if missing := [name for name in _NEEDED if name not in metadata]:
        raise ValueError(
            f"`path` must be a file whose metadata say {', '.join(_NEEDED)}, as the trainer's do; "
            f"{os.fspath(path)!r} does not say {', '.join(missing)}."
        )
    where = f"`path` {os.fspath(path)!r} has metadata that cannot be used:"
    if not str(metadata["num_classes"]).isdecimal():
        raise ValueError(
            f"{where} `num_classes` must be a number, got {metadata['num_classes']!r}."
        )
    if not isinstance(config, Mapping):
        raise ValueError(f"{where} `config` must be a JSON object, got {metadata['config']!r}.")
    try:
        model = _network(metadata, config)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where} {error}") from error
    try:
        shape = trained_shape(metadata)
        if variables.get("params"):  # a file may be there for its metadata alone
            _check(model, variables, shape, metadata["network"])
    except ValueError as error:
        raise ValueError(f"{where} {error}") from error
    return model, variables, {**metadata, "config": dict(config)}


def trained_shape(metadata: Mapping[str, Any]) -> tuple[int, int, int] | None:
    """Return height, width and channels of the images that a network was trained on, None if not known.

    Raises:
      ValueError: `input_shape` is something else.
    """
    given = metadata.get("input_shape", "null")
    try:
        shape: Any = json.loads(given) if isinstance(given, str) else given
    except ValueError:
        shape = given
    if shape is None:
        return None
    if not isinstance(shape, Sequence) or [type(n) for n in shape] != [int] * 3 or min(shape) < 1:
        raise ValueError(f"`input_shape` must be [height, width, channels], got {given!r}.")
    height, width, channels = shape
    return height, width, channels


def misfit(
    model: models.Network, variables: Mapping[str, Any], shape: Sequence[int], *, any_size: bool
) -> str | None:
    """Return how the shapes of variables are not those of a network for images of a shape, None if they are.

    Args:
      model: the network.
      variables: `params` and `batch_stats`.
      shape: height, width and channels.
      any_size: whether to pass dense layers of other inputs, which sizes of images make.
    """
    x = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    expected = _shapes(jax.eval_shape(lambda x: model.init(jax.random.key(0), x), x))
    found = _shapes(variables)
    for path in sorted(expected.keys() | found.keys(), reverse=True):  # parameters first
        have, want, name = found.get(path), expected.get(path), "/".join(path)
        if have is None:
            return f"{name} is missing in the file"
        if want is None:
            if path[-1] == "step":  # which only training needs
                continue
            return f"{name} is in the file alone"
        of_inputs = path[0] == "batch_stats" or (path[-1] == "kernel" and have[1:] == want[1:])
        dense = len(expected.get(("params", *path[1:-1], "kernel"), ())) == 2
        if have != want and not (any_size and dense and of_inputs):
            return f"{name} has shape {have} in the file, {want} in the network"
    return None


def _shapes(variables: Mapping[str, Any]) -> dict[tuple[str, ...], tuple[int, ...]]:
    parts = {name: variables.get(name, {}) for name in ("params", "batch_stats")}
    flat: Any = traverse_util.flatten_dict(parts)
    return {path: jnp.shape(leaf) for path, leaf in flat.items()}


def _check(
    model: models.Network,
    variables: Mapping[str, Any],
    shape: tuple[int, int, int] | None,
    network: str,
) -> None:
    """Raise if variables are those of another network."""
    try:
        kernels: Any = kernel_shapes(model, variables)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"the weights are not those of {network}.") from error
    if (classes := kernels[-1][-1]) != model.num_classes:
        raise ValueError(f"`num_classes` is {model.num_classes}, of the weights {classes}.")
    any_size = shape is None
    if shape is None:
        size = model.minimum_size or 1
        shape = size, size, kernels[0][2] if len(kernels[0]) == 4 else 1
    if why := misfit(model, variables, shape, any_size=any_size):
        raise ValueError(f"the weights are not those of {network}: {why}.")


def _network(metadata: Mapping[str, Any], config: Mapping[str, Any]) -> models.Network:
    """The network that the trainer makes of this config."""
    prefix = "whitening."
    settings = {n.removeprefix(prefix): v for n, v in config.items() if n.startswith(prefix)}
    dtype = config.get("dtype", "float32")
    return models.create(
        metadata["network"],
        metadata["norm"],
        int(metadata["num_classes"]),
        configured_spec(settings),
        config.get("model.layout", "full"),
        width=config.get("model.width", 1.0),
        dtype=None if dtype == "float32" else jnp.dtype(dtype).name,
    )


def configured_spec(settings: Mapping[str, Any]) -> WhiteningSpec:
    """Return the spec that the trainer's settings `whitening.*` describe; None leaves a default.

    Args:
      settings: keywords of `WhiteningSpec`, `preset` and `ridge`, without the prefix. What says how to train,
        not what a network computes, is ignored.
    Raises:
      ValueError: a setting that `WhiteningSpec` refuses, or a `ridge` for another method than "eigh" and
        "chebyshev".
    """
    given = {name: value for name, value in settings.items() if value is not None}
    for name in _OF_TRAINING:
        given.pop(name, None)
    presets = {"fast": WhiteningSpec.fast, "mixed": WhiteningSpec.mixed}
    spec = presets.get(given.pop("preset", "paper"), WhiteningSpec)()
    ridge = given.pop("ridge", None)
    spec = spec.replace(**given)
    if ridge is None:
        return spec
    if isinstance(spec.root, Eigh):
        return spec.replace(root=Eigh(ridge))
    if isinstance(spec.root, Chebyshev):
        return spec.replace(root=ChebyshevRidge(ridge, precision=spec.root.precision))
    raise ValueError(
        f"`whitening.ridge` goes with method 'eigh' or 'chebyshev', got {spec.root!r}."
    )
