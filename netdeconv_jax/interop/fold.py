"""A trained model as the plain network that it is: every whitener and mean folded into kernel and bias."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import traverse_util
from flax.core import meta, unfreeze
from jax import lax

from netdeconv_jax import ops
from netdeconv_jax.interop.dry_run import ALL, WHITENED, Layer, Norm, Path, dry_run
from netdeconv_jax.linen import DeconvConv, DeconvDense
from netdeconv_jax.models.network import Network
from netdeconv_jax.whitening.conv import plain_conv, plain_dense

Tree = Any
Leaves = dict[Path, Any]


@dataclasses.dataclass(frozen=True)
class FoldedModel:
    """A Linen module whose `DeconvConv` and `DeconvDense` run as plain layers, with what `fold` made of them.

    Attributes:
      model: the module that was folded.

    Source: ours.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from netdeconv_jax import DeconvDense
      >>> from netdeconv_jax.interop import fold
      >>> layer, x = DeconvDense(3, use_running_average=True), jnp.ones((4, 2))
      >>> plain, variables = fold(layer, layer.init(jax.random.key(0), x), x)
      >>> type(plain).__name__, sorted(variables), plain.apply(variables, x).shape
      ('FoldedModel', ['params'], (4, 3))
    """

    model: nn.Module

    def apply(self, variables: Mapping[str, Tree], *args: Any, **kwargs: Any) -> Any:
        """Return `model.apply(variables, *args, **kwargs)` with plain layers in place of whitened ones."""
        with nn.intercept_methods(_plainly):
            return self.model.apply(variables, *args, **kwargs)


def fold(
    model: nn.Module, variables: Mapping[str, Tree], x: Any = None, **apply_kwargs: Any
) -> tuple[Any, dict[str, Tree]]:
    """Return the plain network that `model` is in evaluation, and its variables.

    `(X - mu) D w + b = X (D w) + (b - mu D w)`: with the running statistics a whitened layer is a plain one.
    Logits are the same to rounding. Where computation is in low precision the kernel is rounded before its
    bias is formed, as in evaluation.

    A network of the zoo comes back as its twin of `norm="none"`, batch norms folded into the convolutions
    before them. Any other Linen module comes back as a `FoldedModel`, whose `apply` is that of the module;
    what it holds besides, batch norms and `ChannelDeconv` too, stays as it is.

    Args:
      model: a network of the zoo, or any Linen module.
      variables: `params`, `batch_stats` and whatever else; also NumPy's arrays.
      x: an input of the model, or its shape and dtype; only needed for modules that are not of the zoo.
      **apply_kwargs: what `model.apply` needs besides in evaluation: `train=False`.
    Returns:
      The model, and variables as nested dicts, without the statistics that were folded.
    Raises:
      ValueError: `x` is missing; a layer has no statistics or is stacked by `nn.scan`; a network of the zoo
        has a batch norm that follows no convolution (pre-activation networks and `linear`, of
        `norm="batch"`).

    Source: ours; Ye et al. 2020, section 3.4.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from netdeconv_jax import models
      >>> from netdeconv_jax.interop import fold
      >>> model, x = models.create("lenet", norm="deconv"), jnp.ones((2, 28, 28, 1))
      >>> plain, variables = fold(model, model.init(jax.random.key(0), x))
      >>> plain.norm, sorted(variables), plain.apply(variables, x).shape
      ('none', ['params'], (2, 10))
    """
    plain = unfreeze(meta.unbox(dict(variables)))
    collections = {name: _leaves(tree) for name, tree in plain.items()}
    params, stats = collections.get("params", {}), collections.get("batch_stats", {})
    zoo = isinstance(model, Network)
    if x is None:
        if not zoo:
            raise ValueError(
                "`x` must be an input of the model, or its shape and dtype, where the model is none of the "
                "zoo; got None."
            )
        # Small and of any number of channels: in a dry run layers answer by their kernels.
        x = jax.ShapeDtypeStruct((1, *(model.minimum_size or 1,) * 2, 3), jnp.float32)
    kinds = ALL if zoo else WHITENED
    layers, norms = dry_run(lambda x: model.apply(plain, x, **apply_kwargs), params, x, kinds)
    for path, layer in layers.items():
        if layer.groups is not None:
            _fold_whitener(path, layer, params, stats)
    if not zoo:
        return FoldedModel(model), _trees(collections | {"params": params, "batch_stats": stats})
    for path, norm in norms.items():
        _fold_batch_norm(path, norm, layers, params, stats)
    twin = model.clone(norm="none")
    _check_all_there(twin, params, stats, x)
    return twin, _trees(collections | {"params": params, "batch_stats": stats})


@functools.partial(jax.jit, static_argnames=("groups", "dtype"))
def _folded(kernel, bias, mean, whitener, groups, dtype):
    folded, shift = ops.fold(kernel, bias, mean, whitener, groups, dtype=dtype)
    return folded.astype(kernel.dtype), shift.astype(kernel.dtype)


def _fold_whitener(path: Path, layer: Layer, params: Leaves, stats: Leaves) -> None:
    """Put kernel and bias of the plain layer in the place of what the whitened one has."""
    if (*path, "whitener") not in stats:
        raise ValueError(f"`variables` have no `batch_stats` of the layer {'/'.join(path)!r}.")
    kernel = params[(*path, "kernel")]
    params[(*path, "kernel")], params[(*path, "bias")] = _folded(
        kernel,
        params.get((*path, "bias")),
        stats.pop((*path, "mean")),
        stats.pop((*path, "whitener")),
        groups=layer.groups,
        dtype=jnp.dtype(layer.dtype or kernel.dtype),
    )
    stats.pop((*path, "step"), None)


def _fold_batch_norm(
    path: Path, norm: Norm, layers: Mapping[Path, Layer], params: Leaves, stats: Leaves
) -> None:
    """Fold a batch norm into the layer before it."""
    if norm.behind is None:
        raise ValueError(
            f"`model` has a batch norm, {'/'.join(path)!r}, that is not all that follows one convolution: "
            "it cannot be folded."
        )
    dtype = layers[norm.behind].dtype
    kernel, bias = params[(*norm.behind, "kernel")], params.get((*norm.behind, "bias"))
    mean, var = stats.pop((*path, "mean")), stats.pop((*path, "var"))
    gain = lax.rsqrt(var + norm.epsilon) * params.pop((*path, "scale"), 1)
    shift = (mean if bias is None else mean - bias) * gain
    offset = params.pop((*path, "bias"), 0)
    folded = kernel * gain.reshape((1,) * (kernel.ndim - 1) + (-1,))
    params[(*norm.behind, "kernel")] = folded.astype(dtype or kernel.dtype).astype(kernel.dtype)
    params[(*norm.behind, "bias")] = (offset - shift).astype(kernel.dtype)


def _check_all_there(twin: Network, params: Leaves, stats: Leaves, x: Any) -> None:
    """Raise unless the twin runs with these parameters and leaves none of them unused."""
    tree = {"params": traverse_util.unflatten_dict(params)}
    layers, norms = dry_run(lambda x: twin.apply(tree, x), params, x, ALL)
    used = {(*path, leaf) for path in layers for leaf in ("kernel", "bias")}
    left = sorted(set(params) ^ used) + sorted(stats) + sorted(norms)
    if left:
        raise ValueError(
            f"`variables` do not fit `model.norm='none'` after folding: {'/'.join(left[0])!r} is left over."
        )


def _plainly(run, args, kwargs, context):
    """Run a layer that whitens as the plain one that its folded variables describe."""
    module = context.module
    if context.method_name != "__call__" or not isinstance(module, DeconvConv | DeconvDense):
        return run(*args, **kwargs)
    x = args[0] if args else kwargs["x"]
    kernel, bias = (module.get_variable("params", name) for name in ("kernel", "bias"))
    promoted, *_ = module.promote_dtype(x, kernel, bias, dtype=module.dtype)
    kernel = kernel.astype(promoted.dtype)
    if isinstance(module, DeconvDense):
        return plain_dense(
            x, kernel, bias, precision=module.precision, dot_general=module.dot_general
        )
    return plain_conv(
        x,
        kernel,
        bias,
        geometry=ops.window(
            module.kernel_size,
            module.strides,
            module.padding,
            module.input_dilation,
            module.kernel_dilation,
        ),
        feature_group_count=module.feature_group_count,
        precision=module.precision,
        conv_general_dilated=module.conv_general_dilated,
    )


def _leaves(tree: Tree) -> Leaves:
    flat: Any = traverse_util.flatten_dict(tree)
    return flat


def _trees(collections: Mapping[str, Leaves]) -> dict[str, Tree]:
    return {name: traverse_util.unflatten_dict(flat) for name, flat in collections.items() if flat}
