"""Checkpoints of the original PyTorch project as Flax variables."""

import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from netdeconv_jax import models
from netdeconv_jax.interop.torch_names import torch_module
from netdeconv_jax.models.registry import info
from netdeconv_jax.ops.arguments import check_path
from netdeconv_jax.whitening import WhiteningSpec

# Flax leaf -> entry of the state_dict. `step` counts for a freeze schedule; the original does not save it.
_ENTRIES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
    "whitener": "running_deconv",
}
_IGNORED = "num_batches_tracked"
_WRAPPERS = ("state_dict", "net", "model")

Names = tuple[str, ...]  # a path in the Flax variables


def load_torch_checkpoint(
    name: str,
    checkpoint: Mapping[str, Any] | str | os.PathLike,
    norm: str = "deconv",
    num_classes: int = 10,
    *,
    spec: WhiteningSpec | None = None,
) -> tuple[models.Network, dict[str, Any]]:
    """Return a network in the original layout with the variables of an original PyTorch checkpoint.

    Convolution weights turn from OIHW to HWIO and dense ones are transposed; running statistics keep the
    original's order of columns, which is ours.

    Args:
      name: a network of `models.list()` that the original has: all but `linear`, `mlp`, `cnn`, `lenet` and
        `airbench`.
      checkpoint: a `state_dict` of arrays (NumPy, JAX, or anything `np.asarray` takes), or the path of a
        `.npz`, `.safetensors`, `.pth` or `.pt` file; the last two need PyTorch, safetensors its package. A
        `"state_dict"` or `"net"` inside is taken, and a `"module."` in front of every name left out.
      norm: `"deconv"` or `"batch"`, or another that fits the entries.
      num_classes: of the checkpoint.
      spec: how the checkpoint's layers whiten, default the original's.
    Returns:
      The model, with the `param_dtype` of the arrays (float64 only where JAX has it enabled), and its
      variables.
    Raises:
      ValueError: an unknown `name`, a file of an unknown kind, or entries that are missing, unexpected or of
        another shape: all of them are named.
      TypeError: `checkpoint` is neither a mapping nor a path.
      ImportError: the package that reads the file is missing.

    Source: the `state_dict` of the original models.

    Example:
      >>> from netdeconv_jax.interop import load_torch_checkpoint
      >>> model, variables = load_torch_checkpoint("resnet18", "resnet18.pth")  # doctest: +SKIP
      >>> logits = model.apply(variables, images)  # doctest: +SKIP
    """
    entries = _unwrap(_read(checkpoint))
    dtype = jax.dtypes.canonicalize_dtype(_parameter_dtype(entries))
    model = models.create(name, norm, num_classes, spec, "original", param_dtype=dtype)
    size = info(name).size
    image = jax.ShapeDtypeStruct((1, size, size, _channels(name, entries)), dtype)
    expected = jax.eval_shape(model.init, jax.random.key(0), image)
    leaves: dict[Names, Any] = traverse_util.flatten_dict(expected)
    names = entry_names(name, leaves)

    problems = _problems(names, leaves, entries)
    if problems:
        raise ValueError(
            f"`checkpoint` does not fit {name} with norm={norm!r} and {num_classes} classes:\n"
            + "\n".join(problems)
        )
    variables = {
        path: _to_flax(path, entries[names[path]], leaf)
        if path in names
        else jnp.zeros(leaf.shape, leaf.dtype)
        for path, leaf in leaves.items()
    }
    return model, traverse_util.unflatten_dict(variables)


def _read(checkpoint: Mapping[str, Any] | str | os.PathLike) -> Mapping[str, Any]:
    if isinstance(checkpoint, Mapping):
        return checkpoint
    path = check_path("checkpoint", checkpoint)
    match path.suffix:
        case ".npz":
            with np.load(path) as file:
                return dict(file)
        case ".safetensors":
            from safetensors.numpy import load_file

            return load_file(path)
        case ".pth" | ".pt":
            import torch  # pyright: ignore[reportMissingImports]

            return torch.load(path, map_location="cpu", weights_only=True)
    raise ValueError(
        f"`checkpoint` must be a .npz, .safetensors, .pth or .pt file, got {path.name!r}."
    )


def _unwrap(entries: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Return arrays by name, without what training scripts and `DataParallel` wrap around them."""
    for wrapper in _WRAPPERS:
        inner = entries.get(wrapper)
        if isinstance(inner, Mapping):
            entries = inner
    return {name.removeprefix("module."): np.asarray(value) for name, value in entries.items()}


def _parameter_dtype(entries: Mapping[str, np.ndarray]) -> Any:
    for name, value in entries.items():
        if name.endswith("weight"):
            return value.dtype
    return np.dtype(np.float32)


def _channels(name: str, entries: Mapping[str, np.ndarray]) -> int:
    """Return the input channels that the first convolution of the checkpoint takes."""
    stems = ("conv1.weight", "features.0.weight", "features.conv0.weight")
    shapes = [entries[stem].shape for stem in stems if stem in entries]
    return shapes[0][1] if shapes and len(shapes[0]) == 4 else 3


def entry_names(name: str, leaves: Mapping[Names, Any]) -> dict[Names, str]:
    """Return the entry of the `state_dict` for each Flax path (collection, *layer, leaf) that has one."""
    layers = [path[1:-1] for path in leaves]
    whitened = {path[1:-1] for path in leaves if path[-1] == "whitener"}
    module = torch_module(name, layers, whitened)
    return {
        path: f"{module(path[1:-1])}.{_ENTRIES[path[-1]]}"
        for path in leaves
        if path[-1] in _ENTRIES
    }


def _problems(
    names: Mapping[Names, str], leaves: Mapping[Names, Any], entries: Mapping[str, np.ndarray]
) -> list[str]:
    shapes = {names[path]: _torch_shape(path, leaves[path].shape) for path in names}
    kinds = {
        "missing": [n for n in shapes if n not in entries],
        "unexpected": [n for n in entries if n not in shapes and not n.endswith(_IGNORED)],
        "misshapen": [
            f"{n} {entries[n].shape} instead of {shape}"
            for n, shape in shapes.items()
            if n in entries and entries[n].shape != shape
        ],
    }
    return [f"  {kind}: {', '.join(sorted(found))}" for kind, found in kinds.items() if found]


def _torch_shape(path: Names, shape: tuple[int, ...]) -> tuple[int, ...]:
    if path[-1] == "kernel":
        return (*shape[:1:-1], *shape[:2]) if len(shape) == 4 else shape[::-1]
    if path[-1] == "mean" and len(shape) == 2:
        return (shape[0] * shape[1],)  # of a grouped convolution
    return shape


def _to_flax(path: Names, value: np.ndarray, leaf: Any) -> jax.Array:
    if path[-1] == "kernel":
        value = value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T
    if path[-1] == "whitener":
        value = np.swapaxes(value, -1, -2)  # the original multiplies rows by it, we columns
    return jnp.asarray(value.reshape(leaf.shape), leaf.dtype)
