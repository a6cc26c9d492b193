"""A network of the zoo with its weights, from the one file that the trainer leaves."""

import json
import os
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

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
        another than that of the weights.
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
    if variables.get("params"):  # a file may be there for its metadata alone
        try:
            classes = kernel_shapes(model, variables)[-1][-1]
        except KeyError as error:
            network = metadata["network"]
            raise ValueError(f"{where} the weights are not those of {network}.") from error
        if classes != model.num_classes:
            raise ValueError(
                f"{where} `num_classes` is {model.num_classes}, of the weights {classes}."
            )
    return model, variables, {**metadata, "config": dict(config)}


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
    spec = WhiteningSpec.fast() if given.pop("preset", None) == "fast" else WhiteningSpec()
    ridge = given.pop("ridge", None)
    spec = spec.replace(**given)
    if ridge is None:
        return spec
    kinds = {Eigh: Eigh, Chebyshev: ChebyshevRidge}
    if type(spec.root) not in kinds:
        raise ValueError(
            f"`whitening.ridge` goes with method 'eigh' or 'chebyshev', got {spec.root!r}."
        )
    return spec.replace(root=kinds[type(spec.root)](ridge))
