"""From an NNX model trained with batch norm to one that whitens and computes the same function.

As `netdeconv_jax.interop.warm_start` does for Linen, whose head says how; the arithmetic is the same.
"""

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
from flax import nnx

from netdeconv_jax.nnx.behind import fold_norm
from netdeconv_jax.nnx.convert import converted
from netdeconv_jax.nnx.plan import evaluated, located, plan
from netdeconv_jax.whitening.batches import arguments, first_and_all, mean_over
from netdeconv_jax.whitening.conversion import (
    DROPPED,
    KEPT,
    REPLACED,
    UNFOLDED,
    DenseRule,
    Entry,
    Path,
    rules,
)
from netdeconv_jax.whitening.folding import unfolded
from netdeconv_jax.whitening.running import Running
from netdeconv_jax.whitening.same_function import check_no_local_norm, check_same
from netdeconv_jax.whitening.spec import WhiteningSpec


def warm_start(
    model: Any,
    batches: Iterable[Any],
    spec: WhiteningSpec | None = None,
    *,
    dense: DenseRule = False,
    keep: str | Sequence[str] = (),
    axis_name: Any = None,
    call_kwargs: Mapping[str, Any] | None = None,
) -> Any:
    """Return a copy of a trained NNX model that whitens in the place of its layers, still the same function.

    In evaluation outputs are the same to rounding, 1e-4 in float32 and about 1e-2 in bfloat16. Training goes
    on from there: batches are then whitened by their own statistics, so that first losses differ a little.
    Make the optimizer for the copy.

    Batch norms are folded into the convolutions (and dense layers, if these are converted) before them and
    gone. One that is not all that follows one such layer, as in front of a convolution, or that is shared,
    cannot be folded: it stays a batch norm. So does a transposed convolution with strides: it has one bias,
    where whitening would need one for each phase. `conversion_report(model, x, warm=True)` says which.

    Args:
      model: an `nnx.Module`, as training left it; it stays what it is.
      batches: iterable of inputs, or of tuples of a model's several, some hundreds of images in all, of the
        size that training will use: from these the running statistics are taken.
      spec: how the new layers whiten.
      dense, keep, axis_name: as `deconvolve`.
      call_kwargs: what the model's call needs besides in evaluation, after `eval()`.
    Returns:
      The copy, in the mode of the model given: that of its batch norms, else of its dropout. A model with
      neither does not know its mode; the copy is then in training, whatever was called before.
    Raises:
      ValueError: `batches` is empty, or one batch itself; `spec` has a `local_norm`; `model` has nothing to
        convert, or layers stacked by `nnx.vmap`; or on the first batch outputs differ by more than rounding,
        as where a norm is not what it seems.
      TypeError: `model` is no NNX module, or `spec` no `WhiteningSpec`.

    Source: ours.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from netdeconv_jax import nnx as dnnx
      >>> rngs = nnx.Rngs(0)
      >>> net = nnx.Sequential(nnx.Conv(3, 8, (3, 3), rngs=rngs), nnx.BatchNorm(8, rngs=rngs), nnx.relu)
      >>> x = jnp.arange(384.0).reshape(2, 8, 8, 3) % 7
      >>> model = dnnx.warm_start(net, [x])
      >>> net.eval(), model.eval()
      (None, None)
      >>> bool(jnp.allclose(model(x), net(x), atol=1e-4)), type(model.layers[0]).__name__
      (True, 'FormerConv')
    """
    wanted = dataclasses.replace(rules(spec, dense, keep, None, axis_name), warm=True)
    check_no_local_norm(wanted.spec)
    flags = dict(call_kwargs or {})
    old = evaluated(model)
    first, batches = first_and_all(batches)
    x = arguments(first)
    plans = plan(old, wanted)
    wanted.check_used(plans)
    met, sources = located(old, plans, x, flags, warm=True)
    plans = {path: met.get(path, _left(entry)) for path, entry in plans.items()}
    whitened = [path for path, entry in plans.items() if entry.action == REPLACED]
    if not whitened:
        raise ValueError("`model` has no convolution to convert.")
    new = converted(_folded(model, plans, sources), plans, wanted)
    layers = _modules(new)
    for path, entry in plans.items():
        if entry.action == DROPPED:
            layers[path].scale = nnx.data(None)  # folded: a scale of zero is no start of anything
    stats = mean_over(batches, _measure(new, whitened, flags))
    for path, (mean, whitener) in zip(whitened, stats, strict=True):
        layer = layers[path]
        kernel, bias = unfolded(layer.kernel[...], layer.bias[...], mean, whitener, layer.groups)
        layer.kernel, layer.bias = layer.kernel.copy(kernel), layer.bias.copy(bias)
        layer.mean.set_value(mean)
        layer.whitener.set_value(whitener)
    (run, state), (again, new_state) = (function_of(one, flags) for one in (old, evaluated(new)))
    check_same(lambda s, x: run(s, *x), state, lambda s, x: again(s, *x), new_state, x)
    return new


def _left(entry: Entry) -> Entry:
    """What becomes of a layer that the model did not run: a norm behind nothing that is known stays."""
    return (
        dataclasses.replace(entry, action=KEPT, why=UNFOLDED) if entry.action == DROPPED else entry
    )


def _folded(model: Any, plans: Mapping[Path, Entry], sources: Mapping[Path, Path]) -> Any:
    """A copy of the model whose norms that go are folded, and still there."""
    copy = nnx.clone(model)
    layers = _modules(copy)
    for path, entry in plans.items():
        layer = layers[path]
        if entry.action == REPLACED and layer.kernel.ndim != 2 + len(_kernel_size(layer)):
            raise ValueError(
                f"`model` has a kernel of shape {layer.kernel.shape} at {'/'.join(path)!r}, not that of one "
                "layer: layers under `nnx.vmap` cannot be warm-started."
            )
        if entry.action == DROPPED:
            layer = layers[sources[path]]
            axis = -2 if getattr(layer, "transpose_kernel", False) else -1
            # No rounding of kernels: they are not yet those that a convolution will use.
            fold_norm(layers[path], layer, axis=axis)
    return copy


def _kernel_size(layer: Any) -> Sequence[int]:
    size = getattr(layer, "kernel_size", ())
    return (size,) if isinstance(size, int) else size


def _measure(model: Any, whitened: Sequence[Path], flags: Mapping[str, Any]) -> Any:
    """What maps a batch to the statistics of what each layer sees, while all layers run as plain ones."""
    copy = evaluated(model)
    layers = _modules(copy)
    for path in whitened:
        layer = layers[path]
        layer.__class__ = _measured(type(layer))
        # Without memory: all data are here.
        layer.spec, layer.axis_name = layer.spec.replace(momentum=0.0, freeze=None), None
    graph, state = nnx.split(copy)

    @jax.jit
    def measure(state: Any, x: Any) -> list[tuple[jax.Array, jax.Array]]:
        model = nnx.merge(graph, state)
        model(*arguments(x), **flags)
        layers = _modules(model)
        return [(layers[path].mean[...], layers[path].whitener[...]) for path in whitened]

    return lambda x: measure(state, x)


@functools.cache  # a class is never forgotten by JAX, nor what it holds
def _measured(kind: type[Any]) -> type[Any]:
    """The class of layers of a kind that run as plain ones and keep the statistics of the last call."""

    class Measured(kind):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            start = Running.start(self.mean.shape, self.mean.dtype, counted=False)
            self.mean.set_value(start.mean)
            self.whitener.set_value(start.whitener)
            y = super().__call__(*args, use_running_average=True, **kwargs)
            super().__call__(*args, use_running_average=False, **kwargs)
            return y

    return Measured


def function_of(model: Any, flags: Mapping[str, Any]) -> tuple[Any, Any]:
    """A model as a function of variables and inputs, and the variables."""
    graph, state = nnx.split(model)
    return lambda state, *x: nnx.merge(graph, state)(*x, **flags), state


def _modules(model: Any) -> dict[Path, Any]:
    return {tuple(map(str, path)): module for path, module in nnx.iter_modules(model)}
