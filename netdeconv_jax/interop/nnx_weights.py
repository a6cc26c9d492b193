"""What an NNX model has learnt as the variables of Flax Linen, and back: the way to and from weight files."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
from flax import traverse_util

from netdeconv_jax.interop.batch_norm import check_variables

if TYPE_CHECKING:
    from flax import nnx

Leaf = tuple[str, ...]  # collection, then the path as strings


def nnx_variables(model: "nnx.Module") -> dict[str, dict[str, Any]]:
    """Return the parameters and running statistics of an NNX model as nested dicts, for `save_weights`.

    `params` holds every `nnx.Param`, `batch_stats` every `nnx.BatchStat`, ours included, by attribute names;
    the place in a list becomes a name as `"0"`. Where an NNX model names its layers as a Linen one does, the
    file serves both. The state of random streams and caches are not weights, and are left out.

    Args:
      model: an NNX module.
    Returns:
      Nested dicts of arrays. A variable that is shared stands where it is found first.
    Raises:
      TypeError: `model` is no NNX module.

    Source: ours.

    Example:
      >>> import tempfile
      >>> from flax import nnx
      >>> from netdeconv_jax import nnx as dnnx
      >>> from netdeconv_jax.interop import load_weights, nnx_update, nnx_variables, save_weights
      >>> model = nnx.Sequential(dnnx.DeconvDense(3, 4, rngs=nnx.Rngs(0)), nnx.relu)
      >>> other = nnx.Sequential(dnnx.DeconvDense(3, 4, rngs=nnx.Rngs(1)), nnx.relu)
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save_weights(folder + "/model.safetensors", nnx_variables(model))
      ...     variables, _ = load_weights(folder + "/model.safetensors")
      >>> nnx_update(other, variables)
      >>> bool((other.layers[0].kernel[...] == model.layers[0].kernel[...]).all())
      True
    """
    leaves = {leaf: variable[...] for leaf, variable in _variables(model).items()}
    return traverse_util.unflatten_dict(leaves)


def nnx_update(model: "nnx.Module", variables: Mapping[str, Any]) -> None:
    """Give an NNX model the values of `variables`, in place; each keeps the dtype that it has there.

    Args:
      model: an NNX module.
      variables: `params` and `batch_stats` as `nnx_variables` returns them, all of the model's and no others.
    Raises:
      ValueError: names are missing or unknown, or a shape is another; the first of them is named.
      TypeError: `model` is no NNX module, or `variables` are no nested dicts.

    Source: ours.

    Example:
      >>> from flax import nnx
      >>> from netdeconv_jax.interop import nnx_update, nnx_variables
      >>> model, other = (nnx.Linear(2, 3, rngs=nnx.Rngs(seed)) for seed in (0, 1))
      >>> nnx_update(model, nnx_variables(other))
    """
    known = _variables(model)
    check_variables("variables", variables)
    given: Any = traverse_util.flatten_dict(dict(variables))
    for what, names in (("lack", known.keys() - given), ("have an unknown", given.keys() - known)):
        if names:
            raise ValueError(f"`variables` {what} {'/'.join(map(str, min(names)))!r}.")
    for leaf, variable in known.items():
        if jnp.shape(given[leaf]) != variable.shape:
            raise ValueError(
                f"`variables` must hold {'/'.join(leaf)!r} of shape {variable.shape}, got "
                f"{jnp.shape(given[leaf])}."
            )
    for leaf, variable in known.items():
        variable.set_value(jnp.asarray(given[leaf], variable.dtype))


def _variables(model: "nnx.Module") -> dict[Leaf, Any]:
    """Every parameter and running statistic, once; also of a state, or of a dict of modules."""
    from flax import nnx

    found, ours = {}, isinstance(model, nnx.State)
    for path, node in nnx.iter_graph(model):
        ours = ours or isinstance(node, nnx.Module)
        for kind, collection in ((nnx.Param, "params"), (nnx.BatchStat, "batch_stats")):
            if isinstance(node, kind):
                found[(collection, *map(str, path))] = node
    if not found and not ours:
        raise TypeError(f"`model` must be an NNX module, got {type(model).__name__}.")
    return found
