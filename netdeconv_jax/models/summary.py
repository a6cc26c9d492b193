"""The layers of a network in call order, with what each costs."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from netdeconv_jax import ops
from netdeconv_jax.linen import DeconvConv, DeconvDense
from netdeconv_jax.models.network import Network
from netdeconv_jax.models.pooling import AvgPool, MaxPool
from netdeconv_jax.whitening import WhiteningSpec
from netdeconv_jax.whitening.conv import conv_groups, dense_groups, sampling

_KINDS = {
    nn.Conv: "conv",
    nn.Dense: "dense",
    DeconvConv: "deconv_conv",
    DeconvDense: "deconv_dense",
    nn.BatchNorm: "batch_norm",
    MaxPool: "max_pool",
    AvgPool: "avg_pool",
}


@dataclasses.dataclass(frozen=True)
class LayerRow:
    """One layer of one network at one input size.

    Attributes:
      path: of the module in the variables.
      kind: `"conv"`, `"dense"`, `"deconv_conv"`, `"deconv_dense"`, `"batch_norm"`, `"max_pool"` or
        `"avg_pool"`.
      in_shape, out_shape: of the activations, batch and channels included.
      kernel_size, strides, padding, groups: of a convolution; a dense layer has kernel size 0.
      use_bias: of a convolution or dense layer.
      block: channels whitened together, 0 in a layer that does not whiten.
      spec: how the layer whitens, or None.
      parameters: of the layer.
      multiply_adds: of the convolution or product, for the whole batch.
      covariance, root, fold: multiply-adds that whitening adds to a training step's forward pass.
    """

    path: tuple[str, ...]
    kind: str
    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    kernel_size: int = 0
    strides: int = 1
    padding: int = 0
    groups: int = 1
    use_bias: bool = False
    block: int = 0
    spec: WhiteningSpec | None = None
    parameters: int = 0
    multiply_adds: int = 0
    covariance: int = 0
    root: int = 0
    fold: int = 0


def layer_table(model: Network, input_shape: tuple[int, ...]) -> list[LayerRow]:
    """Return the layers of `model` in call order; nothing is computed but shapes.

    Args:
      model: a network of the zoo, or any Linen module that takes images.
      input_shape: [batch, height, width, channels]; costs grow with the batch.
    Returns:
      A row for each convolution, dense, norm and pooling layer.

    Example:
      >>> from netdeconv_jax import models
      >>> from netdeconv_jax.models.summary import layer_table
      >>> layer_table(models.create("vgg11"), (1, 32, 32, 3))[0].block
      3
    """
    rows: list[LayerRow] = []

    def record(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        y = call(*args, **kwargs)
        if context.method_name == "__call__" and type(context.module) in _KINDS:
            rows.append(_row(context.module, args[0].shape, y.shape))
        return y

    def run(key: jax.Array, x: jax.Array) -> Any:
        with nn.intercept_methods(record):
            return model.init(key, x)

    jax.eval_shape(run, jax.random.key(0), jax.ShapeDtypeStruct(input_shape, jnp.float32))
    return rows


def _row(module: Any, in_shape: tuple[int, ...], out_shape: tuple[int, ...]) -> LayerRow:
    params = sum(leaf.size for leaf in jax.tree.leaves(module.variables.get("params", {})))
    row = LayerRow(module.path, _KINDS[type(module)], in_shape, out_shape, parameters=params)
    if row.kind in ("conv", "deconv_conv"):
        row = dataclasses.replace(
            row,
            kernel_size=module.kernel_size[0],
            strides=module.strides[0],
            padding=module.padding,
            groups=module.feature_group_count,
        )
    if row.kind in ("max_pool", "avg_pool", "batch_norm"):
        return row
    terms = in_shape[-1] // row.groups * max(1, row.kernel_size) ** 2  # that one output sums
    row = dataclasses.replace(
        row, use_bias=module.use_bias, multiply_adds=math.prod(out_shape) * terms
    )
    if not isinstance(module, DeconvConv | DeconvDense):
        return row

    spec = module.resolved_spec()
    groups, rows = _columns_and_rows(row, spec)
    whiteners = math.prod(groups.stat_shape)
    return dataclasses.replace(
        row,
        block=module.effective_block(in_shape[-1]),
        spec=spec,
        covariance=whiteners * rows * groups.width**2,
        root=whiteners * getattr(spec.root, "products", 10) * groups.width**3,
        fold=out_shape[-1] * terms * groups.width,
    )


def _columns_and_rows(row: LayerRow, spec: WhiteningSpec) -> tuple[ops.ColumnGroups, int]:
    """Return how the columns of a layer are divided, and how many samples each covariance sees."""
    channels = row.in_shape[-1]
    if row.kind == "deconv_dense":
        groups = dense_groups(spec, channels)
        return groups, math.prod(row.in_shape[:-1]) * groups.groups
    geometry = ops.window((row.kernel_size,) * 2, row.strides, row.padding)
    groups = conv_groups(spec, channels, geometry.taps, row.groups)
    grid = sampling(spec, row.in_shape, geometry, groups)
    return groups, ops.sampled_rows(row.in_shape, geometry, groups, **grid)
