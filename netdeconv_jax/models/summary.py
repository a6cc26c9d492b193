"""The layers of a network in call order, with what each costs."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from netdeconv_jax.linen import DeconvConv, DeconvDense
from netdeconv_jax.models.network import Network
from netdeconv_jax.models.pooling import AvgPool, MaxPool
from netdeconv_jax.whitening import NewtonSchulz, Stride, WhiteningSpec

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
    whitener = module.get_variable("batch_stats", "whitener").shape
    width, whiteners = whitener[-1], math.prod(whitener[:-2])
    columns = in_shape[-1] * (max(1, row.kernel_size) ** 2 if _sees_patches(row, spec) else 1)
    return dataclasses.replace(
        row,
        block=module.effective_block(in_shape[-1]),
        spec=spec,
        covariance=_samples(row, spec) * columns * width,
        root=_root_products(spec) * width**3 * whiteners,
        fold=out_shape[-1] * terms * width,
    )


def _sees_patches(row: LayerRow, spec: WhiteningSpec) -> bool:
    return row.kernel_size > 1 and spec.whiten == "patches"


def _samples(row: LayerRow, spec: WhiteningSpec) -> int:
    """Return how many patches, pixels or vectors the statistics see."""
    if row.kind == "deconv_dense":
        return math.prod(row.in_shape[:-1])
    stride = row.strides * (spec.sampling.stride if isinstance(spec.sampling, Stride) else 1)
    if not _sees_patches(row, spec):
        return math.ceil(math.prod(row.in_shape[:-1]) / stride**2)
    grid = [(n + 2 * row.padding - row.kernel_size) // stride + 1 for n in row.in_shape[1:3]]
    return row.in_shape[0] * math.prod(grid)


def _root_products(spec: WhiteningSpec) -> int:
    """Return the matrix products of one root: K iterations need 3 K - 3; others count as ten."""
    return 3 * spec.root.num_iters - 3 if isinstance(spec.root, NewtonSchulz) else 10
