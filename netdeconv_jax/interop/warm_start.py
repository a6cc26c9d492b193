"""From a model trained with batch norm to one that whitens and computes the same function.

A batch norm folds into the convolution before it, `w_f` and `b_f`. Behind a whitener D and a mean mu, those
of what the layer sees in evaluation, the same layer has `w = D^-1 w_f` and `b = b_f + mu w_f`. As the
function is the same all the way, one pass of the folded model over data finds every D and mu.
"""

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import traverse_util
from flax.core import meta, unfreeze

from netdeconv_jax.interop.batch_norm import check_variables, leaves
from netdeconv_jax.interop.dry_run import WHITENED, Layer, Norm, Path, dry_run
from netdeconv_jax.interop.fold import fold, fold_batch_norm
from netdeconv_jax.interop.folded_model import plainly
from netdeconv_jax.interop.recalibrate import recalibrate
from netdeconv_jax.linen import DeconvolvedModel, deconvolve
from netdeconv_jax.linen.batch_norms import (
    first_argument,
    in_trial,
    is_batch_norm,
    starts_at_zero,
)
from netdeconv_jax.models.network import Network
from netdeconv_jax.whitening import WhiteningSpec
from netdeconv_jax.whitening.batches import arguments, first_and_all
from netdeconv_jax.whitening.conversion import DenseRule, rules
from netdeconv_jax.whitening.folding import features_axis, unfolded
from netdeconv_jax.whitening.layer import layer_spec
from netdeconv_jax.whitening.same_function import check_no_local_norm, check_same

Tree = Any
Leaves = dict[Path, Any]

# By which `nn.jit` tells what it traces while statistics are measured from what it traces otherwise.
_traces = jax.make_user_context(None)


def warm_start(
    model: nn.Module,
    variables: Mapping[str, Tree],
    batches: Iterable[Any],
    spec: WhiteningSpec | None = None,
    *,
    dense: DenseRule = False,
    keep: str | Sequence[str] = (),
    apply_kwargs: Mapping[str, Any] | None = None,
    rngs: Mapping[str, jax.Array] | None = None,
    axis_name: Any = None,
) -> tuple[Any, dict[str, Tree]]:
    """Return a trained model with whitening layers in the place of its own, still the same function.

    In evaluation outputs are the same to rounding, 1e-4 in float32 and about 1e-2 in bfloat16. Training goes
    on from there: batches are then whitened by their own statistics, so that first losses differ a little.

    Batch norms are folded into the convolutions (and dense layers, if these are converted) before them and
    gone. One that is not all that follows one such layer, as in front of a convolution, or that is shared,
    cannot be folded: it stays a batch norm, and the report of the model says so. So does a transposed
    convolution with strides: it has one bias, where whitening would need one for each phase. What only
    training runs, as an auxiliary head, stays too: nothing is known of what it sees.

    Args:
      model: a Linen module, or a network of the zoo of `norm="batch"`.
      variables: `params`, `batch_stats` and whatever else, as training left them.
      batches: iterable of inputs, or of tuples of a model's several, some hundreds of images in all, of the
        size that training will use: from these the running statistics are taken, as by `recalibrate`.
      spec: how the new layers whiten, without `local_norm`, which no kernel could undo.
      dense, keep, axis_name: as `deconvolve`.
      apply_kwargs: what makes the model run in evaluation, default `{"train": False}`; arrays and hashable
        values.
      rngs: as `model.apply`, if it needs them in evaluation.
    Returns:
      The model and its variables. The model is `deconvolve(model, spec, ...)`; of a network of the zoo it is
      its twin of `norm="deconv"`, if all its batch norms fold.
    Raises:
      ValueError: `batches` is empty, or one batch itself; `spec` has a `local_norm`; `model` has nothing to
        convert, or layers stacked by `nn.scan`; or on the first batch outputs differ by more than rounding,
        as where a norm is not what it seems.
      TypeError: `spec` is no `WhiteningSpec`, `model` no Linen module, `variables` no nested dicts, or
        `batches` no iterable.

    Source: ours.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import linen as nn
      >>> from netdeconv_jax.interop import warm_start
      >>> net = nn.Sequential([nn.Conv(8, (3, 3), use_bias=False), nn.BatchNorm(True), nn.relu])
      >>> x = jnp.arange(384.0).reshape(2, 8, 8, 3) % 7
      >>> trained = net.init(jax.random.key(0), x)
      >>> model, variables = warm_start(net, trained, [x], apply_kwargs={})
      >>> bool(jnp.allclose(model.apply(variables, x), net.apply(trained, x), atol=1e-4))
      True
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"`model` must be a Linen module, got {type(model).__name__}; for NNX there is "
            "`netdeconv_jax.nnx.warm_start`."
        )
    check_variables("variables", variables)
    own = model.spec if isinstance(model, Network) else WhiteningSpec()
    check_no_local_norm(layer_spec(spec, own))
    flags = {"train": False} if apply_kwargs is None else dict(apply_kwargs)
    first, batches = first_and_all(batches)
    x = arguments(first)
    plain = unfreeze(meta.unbox(dict(variables)))
    shape = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), x)
    start = None
    if isinstance(model, Network) and not (dense or keep):
        start = _twin(model, plain, spec, shape, flags, axis_name)
    if start is None:
        start = _converted(model, plain, shape, flags, rngs, spec, dense, keep, axis_name)
    found = _whitened(*start, batches, shape, flags, rngs)
    run, again = (functools.partial(one.apply, rngs=rngs, **flags) for one in (model, found[0]))
    check_same(lambda v, x: run(v, *x), plain, lambda v, x: again(v, *x), found[1], x)
    return found


def _twin(model, variables, spec, x, flags, axis_name):
    """The zoo's own network that whitens, and folded variables; None where it has other layers."""
    try:
        _, folded = fold(model, variables)
    except ValueError:
        return None
    twin = model.clone(norm="deconv", spec=spec or model.spec)
    if axis_name is not None:
        twin = twin.clone(axis_name=rules(spec, False, (), None, axis_name).axis_name)
    shapes = jax.eval_shape(lambda x: twin.init(jax.random.key(0), *x), x)
    if jax.tree.map(jnp.shape, shapes["params"]) != jax.tree.map(jnp.shape, folded["params"]):
        return None  # the original layout keeps some batch norms
    params = traverse_util.flatten_dict(folded["params"])
    layers, _ = dry_run(lambda x: twin.apply(folded, *x, **flags), params, x, WHITENED)
    return twin, layers, folded


def _converted(
    model, variables, x, flags, rngs, spec, dense, keep, axis_name
) -> tuple[DeconvolvedModel, dict[Path, Layer], dict[str, Tree]]:
    """The converted model, its layers, and variables with norms folded where that can be."""
    converted = deconvolve(model, spec, dense=dense, keep=keep, axis_name=axis_name)

    params, stats = (leaves(variables.get(name, {})) for name in ("params", "batch_stats"))
    found, ran = _batch_norms(lambda x: model.apply(variables, *x, rngs=rngs, **flags), x)
    unseen = frozenset({path[:-1] for path in (*params, *stats)} - ran)

    def leaving(norms: Iterable[Path]) -> DeconvolvedModel:
        warm = dataclasses.replace(
            converted.rules, unfolded=frozenset(norms), unseen=unseen, warm=True
        )
        return dataclasses.replace(converted, rules=warm)

    layers, norms = dry_run(
        lambda x: leaving(found).apply(variables, *x, rngs=rngs, **flags),
        params,
        x,
        WHITENED,
        found,
    )
    if not layers:
        raise ValueError("`model` has no convolution to convert, or runs it in a `jit` of its own.")
    # No rounding of kernels: they are not yet those that a convolution will use.
    layers = {path: dataclasses.replace(layer, dtype=None) for path, layer in layers.items()}
    left = []
    for path, norm in norms.items():
        if converted.rules.why_kept(path) or not _folds(path, norm, layers, params, stats):
            left.append(path)
            continue
        fold_batch_norm(path, norm, layers, params, stats)
        if (dtype := found[path]) is not None:
            params[(*path, "scale")] = jnp.ones((), dtype)
    for path, layer in layers.items():
        kernel = params[(*path, "kernel")]
        features = kernel.shape[features_axis(layer.groups)]
        params.setdefault((*path, "bias"), jnp.zeros(features, kernel.dtype))
    return leaving(left), layers, {**variables, **_trees(params, stats)}


def _batch_norms(run, x) -> tuple[dict[Path, Any], set[Path]]:
    """The batch norms that `run(x)` calls, with the dtype of the scalar in their place where there is one.

    And the paths of all modules that it calls.
    """
    found, ran = {}, set()

    def look(run, args, kwargs, context):
        module = context.module
        if context.method_name == "__call__" and not in_trial():
            ran.add(tuple(module.path))
        if is_batch_norm(context, args, kwargs):
            x: Any = first_argument(context.orig_method, args, kwargs)
            scalar = starts_at_zero(module, x.shape[-1])
            dtype = getattr(module, "param_dtype", jnp.float32) if scalar else None
            found[tuple(module.path)] = dtype
        return run(*args, **kwargs)

    with jax.disable_jit(), nn.intercept_methods(look):
        jax.eval_shape(run, x)
    return found, ran


def _folds(
    path: Path, norm: Norm, layers: Mapping[Path, Layer], params: Leaves, stats: Leaves
) -> bool:
    """Whether a batch norm is one of the features of one layer before it."""
    if norm.behind is None:
        return False
    axis = features_axis(layers[norm.behind].groups)
    features = (params[(*norm.behind, "kernel")].shape[axis],)
    own = {leaf[len(path)] for leaf in params if leaf[: len(path)] == path}
    if not own <= {"scale", "bias"}:
        return False
    return all(
        (*path, name) in stats and stats[(*path, name)].shape == features
        for name in ("mean", "var")
    )


@dataclasses.dataclass(frozen=True)
class _Measuring:
    """A model whose whitening layers run as plain ones, with statistics of what they see."""

    model: Any

    def apply(self, variables, *args, **kwargs):
        rules = getattr(self.model, "rules", None)
        with _traces(("measured", rules)), nn.intercept_methods(_measured):
            return self.model.apply(variables, *args, **kwargs)


def _measured(run, args, kwargs, context):
    module = context.module
    if context.method_name != "__call__" or not isinstance(module, WHITENED) or in_trial():
        return run(*args, **kwargs)
    if module.use_running_average is False:
        return run(*args, **kwargs)  # the one below
    # Without memory: of a layer that is called more than once the last call counts. All data are here.
    settings = {"use_running_average": False, "momentum": 0.0, "axis_name": None}
    twin = module.clone(parent=module.scope, **settings)
    # Without the call's own flags: it measures whatever they say.
    twin(first_argument(context.orig_method, args, kwargs), mask=kwargs.get("mask"))
    return plainly(run, args, kwargs, context)


def _whitened(model, layers, variables, batches, x, flags, rngs):
    """The model, and variables whose layers whiten and compute what they did."""
    shapes = jax.eval_shape(lambda x: model.init(jax.random.key(0), *x, **flags), x)["batch_stats"]
    own = {
        path: jnp.zeros(leaf.shape, leaf.dtype)
        for path, leaf in leaves(meta.unbox(shapes)).items()
        if path[:-1] in layers
    }
    others = leaves(variables.get("batch_stats", {}))
    start = {**variables, "batch_stats": traverse_util.unflatten_dict(others | own)}
    runs: Any = model
    if isinstance(model, DeconvolvedModel):
        runs = dataclasses.replace(
            model, rules=dataclasses.replace(model.rules, use_running_average=True)
        )
    measuring: Any = _Measuring(runs)
    measured = recalibrate(measuring, start, batches, apply_kwargs=flags, rngs=rngs)
    stats = leaves(measured["batch_stats"]) | others  # those of batch norms to the bit
    params = leaves(variables["params"])
    for path, layer in layers.items():
        names = ("kernel", "bias")
        params |= zip(
            ((*path, name) for name in names),
            unfolded(
                *(params[(*path, name)] for name in names),
                stats[(*path, "mean")],
                stats[(*path, "whitener")],
                layer.groups,
            ),
            strict=True,
        )
    return model, {**variables, **_trees(params, stats)}


def _trees(params: Leaves, stats: Leaves) -> dict[str, Tree]:
    both = {"params": params, "batch_stats": stats}
    return {name: traverse_util.unflatten_dict(flat) for name, flat in both.items()}
