"""Any Linen model with whitening layers in the place of its own: `deconvolve`."""

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, overload

import jax
from flax import linen as nn

from netdeconv_jax.linen.conversion import Conversion, converting
from netdeconv_jax.whitening.conversion import DenseRule, Report, Rules, rules
from netdeconv_jax.whitening.spec import WhiteningSpec

Tree = Any


@dataclasses.dataclass(frozen=True)
class DeconvolvedModel:
    """A Linen module with whitening layers in the place of its own; what `deconvolve(model)` returns.

    Its methods are those of the module, and may be jitted, differentiated and handed to a `TrainState`.
    It is no module itself: convert the whole that you initialize, and leave parts out by `keep`.

    Attributes:
      model: the module, as it was.
      rules: what `deconvolve` was told.

    Source: ours.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import linen as nn
      >>> import netdeconv_jax
      >>> model = netdeconv_jax.deconvolve(nn.Conv(8, (3, 3)))
      >>> variables = jax.jit(model.init)(jax.random.key(0), jnp.ones((2, 8, 8, 3)))
      >>> sorted(variables["batch_stats"])
      ['mean', 'whitener']
    """

    model: nn.Module
    rules: Rules

    # Both also where the module's own fail, as with the list of `nn.Sequential` or arrays in fields.
    def __hash__(self) -> int:
        return hash((type(self.model), self.rules))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, DeconvolvedModel) or self.rules != other.rules:
            return False
        try:
            return self.model is other.model or bool(self.model == other.model)
        except (TypeError, ValueError):  # of arrays
            return False

    def init(self, rngs: Any, *args: Any, **kwargs: Any) -> Any:
        """Return initial variables, as `nn.Module.init`.

        Raises:
          ValueError: a pattern names no layer of the model, or a layer can make no `batch_stats`.
        """
        with converting(self.rules) as run:
            variables = self.model.init(rngs, *args, **kwargs)
        self._check(run, args, kwargs)
        return variables

    def init_with_output(self, rngs: Any, *args: Any, **kwargs: Any) -> Any:
        """Return the output and initial variables, as `nn.Module.init_with_output`."""
        with converting(self.rules) as run:
            result = self.model.init_with_output(rngs, *args, **kwargs)
        self._check(run, args, kwargs)
        return result

    def lazy_init(self, rngs: Any, *args: Any, **kwargs: Any) -> Any:
        """Return initial variables from shapes of inputs, as `nn.Module.lazy_init`."""
        with converting(self.rules):
            return self.model.lazy_init(rngs, *args, **kwargs)

    def apply(self, variables: Mapping[str, Tree], *args: Any, **kwargs: Any) -> Any:
        """Run the converted model, as `nn.Module.apply`."""
        with converting(self.rules):
            return self.model.apply(variables, *args, **kwargs)

    def tabulate(self, rngs: Any, *args: Any, **kwargs: Any) -> str:
        """Return a table of modules and variables, as `nn.Module.tabulate`."""
        with converting(self.rules):
            return self.model.tabulate(rngs, *args, **kwargs)

    def report(self, *args: Any, **kwargs: Any) -> Report:
        """Return what becomes of each layer, from a trace of `init` with these arguments.

        Raises:
          ValueError: as `init`.
        """
        keys = jax.random.key(0)
        # Without `jit`, whose earlier traces would hide what is inside.
        with converting(self.rules) as run, jax.disable_jit():
            jax.eval_shape(lambda: self.model.init(keys, *args, **kwargs))
        run.check(kwargs)
        return run.report

    def _check(self, run: Conversion, args: Any, kwargs: Any) -> None:
        try:
            run.check(kwargs)
        except ValueError:  # or what it missed is inside of a `nn.jit` that has run before
            self.report(*args, **kwargs)


@overload
def deconvolve(
    model: nn.Module,
    spec: WhiteningSpec | None = None,
    *,
    dense: DenseRule = False,
    keep: str | Sequence[str] = (),
    use_running_average: bool | None = None,
    axis_name: Any = None,
) -> DeconvolvedModel: ...
@overload
def deconvolve(
    model: WhiteningSpec | None = None,
    *,
    dense: DenseRule = False,
    keep: str | Sequence[str] = (),
    use_running_average: bool | None = None,
    axis_name: Any = None,
) -> contextlib.AbstractContextManager[Conversion]: ...
def deconvolve(
    model: nn.Module | WhiteningSpec | None = None,
    spec: WhiteningSpec | None = None,
    *,
    dense: DenseRule = False,
    keep: str | Sequence[str] = (),
    use_running_average: bool | None = None,
    axis_name: Any = None,
) -> Any:
    """Replace every convolution of a Linen model by one that whitens, and its batch norms by the identity.

    `deconvolve(model, spec)` returns an object with the `init` and `apply` of the model: the form to use.
    `with deconvolve(spec):` converts what `model.init` and `model.apply` run inside, on this thread. What
    is jitted is compiled anew there, and runs unconverted again outside; but a function that was compiled
    ahead of time, `jax.jit(f).lower(...).compile()`, runs as it was compiled.

    The rules:

    - Every `nn.Conv` becomes a `DeconvConv`, every `nn.ConvTranspose` a `DeconvConvTranspose`, of the same
      settings and initial kernel, always with a bias. One with a `mask` of its kernel, of a class that
      changes its parameters or does not call what it inherits, or below `nn.SpectralNorm` or
      `nn.WeightNorm` stays. `nn.Dense` becomes `DeconvDense` where `dense` says so, in blocks of 512
      features at least. Every other module that holds a matrix and no modules is a layer that stays.
    - Batch statistics are used, and `batch_stats` updated, where `batch_stats` (or `moments`) is mutable and
      the model is not initializing; running statistics otherwise, whatever the model's own `train` says.
      So a training step in which neither is mutable reuses the whiteners, as `update_whitener=False` does.
    - Every batch norm becomes the identity, also of classes that are like `nn.BatchNorm` in settings and
      variables and hold no modules, unless `keep` names it or what it directly follows is a layer that stays.
      A kept one is as it was. Of an heir that does more, only what it inherits becomes the identity; a `mask`
      that a batch norm is called with is not used. "Directly": behind a reshape or a sum nobody looks; and a
      class that is like a batch norm but ends in an activation loses that too. For both there is `keep`.
    - A batch norm whose scale starts at zero becomes the product with one learnt scalar that starts at zero:
      blocks that start as the identity still do.

    `report(x)` of the result, or `report` of what the `with` gives, lists what was done and why; look there
    for norms in front of convolutions (pre-activation), which you may want to keep.

    Args:
      model: a Linen module; or a `WhiteningSpec` or None, for the context manager.
      spec: how the new layers whiten, default that of `DeconvConv`.
      dense: False, True, patterns of paths, or a function of (path, in_features, features).
      keep: patterns of paths of the layers that stay what they are, of either kind: `"bn1"`,
        `"stage1/*/BatchNorm_0"`, the name of a module for all that it holds; "/" in front: from the root.
      use_running_average: overrides the second rule.
      axis_name: mapped axis over which statistics are pooled (`pmap`, `shard_map`), as `nn.BatchNorm`.
    Returns:
      A `DeconvolvedModel`, or a context manager.
    Raises:
      TypeError: `model` is no Linen module and no spec, or an argument is of the wrong type.

    Source: ours; De and Smith 2020 (SkipInit) for the scalar.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import linen as nn
      >>> import netdeconv_jax
      >>> net = nn.Sequential([nn.Conv(8, (3, 3), use_bias=False), nn.BatchNorm(True), nn.relu])
      >>> model, x = netdeconv_jax.deconvolve(net), jnp.ones((2, 8, 8, 3))
      >>> print(model.report(x))
      replaced  layers_0  Conv       by DeconvConv
      dropped   layers_1  BatchNorm  follows layers_0, which whitens
      1 replaced, 1 dropped, 0 kept
      >>> variables = model.init(jax.random.key(0), x)
      >>> y, updates = model.apply(variables, x, mutable=["batch_stats"])
      >>> sorted(updates["batch_stats"]["layers_0"])
      ['mean', 'whitener']
    """
    settings = (dense, keep, use_running_average, axis_name)
    if isinstance(model, nn.Module):
        return DeconvolvedModel(model, rules(spec, *settings))
    if model is not None and not isinstance(model, WhiteningSpec):
        raise TypeError(
            f"`model` must be a Linen module or a WhiteningSpec, got {type(model).__name__}; for NNX there "
            "is `netdeconv_jax.nnx.deconvolve`."
        )
    if model is not None and spec is not None:
        raise TypeError(f"`model` must be a Linen module where `spec` is given, got {model!r}.")
    return converting(rules(spec if model is None else model, *settings))
