"""What converts a Linen model while it runs: an interceptor of methods.

Modules are met where they are called. An `nn.Conv` lends its scope to a `DeconvConv` of the same settings, so
that names and initial kernels stay what they were; a batch norm returns its input.
"""

import contextlib
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.core import meta

from netdeconv_jax.linen.batch_norms import (
    body_of,
    first_argument,
    in_trial,
    running_body,
    starts_at_zero,
    why_no_batch_norm,
)
from netdeconv_jax.linen.layers import ChannelDeconv, DeconvConv, DeconvConvTranspose, DeconvDense
from netdeconv_jax.whitening.conversion import (
    DROPPED,
    KEPT,
    REPLACED,
    Entry,
    Path,
    Report,
    Rules,
    explain_norm,
    explain_unwhitened,
)

_OURS = (ChannelDeconv, DeconvConv, DeconvConvTranspose, DeconvDense)
_WRAPPERS = (nn.SpectralNorm, nn.WeightNorm)
_SHARED = (
    "features",
    "dtype",
    "param_dtype",
    "precision",
    "kernel_init",
    "bias_init",
    "promote_dtype",
)
_GEOMETRY = ("kernel_size", "strides", "padding", "kernel_dilation")
_OPERATIONS = ("conv_general_dilated", "dot_general")
_traces = jax.make_user_context(None)
_REMEMBERED = 64  # outputs among which a batch norm looks for the layer that made its input


class _Unsown:
    """A layer in the place of another, which stores their output where outputs are captured."""

    def sow(self, col: str, name: str, value: Any, *args: Any, **kwargs: Any) -> bool:
        """Store a value, as `nn.Module.sow`."""
        if (col, name) == ("intermediates", "__call__"):
            return False
        layer: Any = super()
        return layer.sow(col, name, value, *args, **kwargs)


class _Conv(_Unsown, DeconvConv):
    pass


class _ConvTranspose(_Unsown, DeconvConvTranspose):
    pass


class _Dense(_Unsown, DeconvDense):
    pass


# What stands in the place of each kind, and the settings that it takes over besides the shared ones.
_TWINS: dict[type[nn.Module], tuple[type[Any], tuple[str, ...]]] = {
    nn.Conv: (_Conv, (*_GEOMETRY, "input_dilation", "feature_group_count")),
    nn.ConvTranspose: (
        _ConvTranspose,
        (*_GEOMETRY, "transpose_kernel", "preferred_element_type"),
    ),
    nn.Dense: (_Dense, ()),
}
_LINEAR = (*_TWINS, nn.DenseGeneral, nn.ConvLocal)  # there is nothing to convert the last to


class Conversion:
    """A conversion: the rules, and the record of what was converted while models ran.

    Source: ours.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import linen as nn
      >>> import netdeconv_jax
      >>> with netdeconv_jax.deconvolve() as conversion:
      ...     variables = nn.Conv(4, (3, 3)).init(jax.random.key(0), jnp.ones((1, 8, 8, 3)))
      >>> conversion.report.replaced
      ('',)
    """

    def __init__(self, rules: Rules):
        self._rules = rules
        self._entries: dict[Path, Entry] = {}
        # Outputs of layers, and whether these whiten.
        self._made: list[tuple[weakref.ref, Path, bool]] = []
        self._wrapped = 0  # how deep inside of modules that normalize what is called kernel

    @property
    def report(self) -> Report:
        """What became of each layer so far."""
        return Report(tuple(self._entries.values()))

    def check(self, kwargs: Mapping[str, Any]) -> None:
        """Raise if a pattern names no layer, where the whole model has run."""
        if kwargs.get("method") is None:
            self._rules.check_used(self._entries)

    def __call__(self, run, args, kwargs, context):
        """Run one method of one module, converted; an interceptor of `nn.intercept_methods`."""
        module, path = context.module, tuple(context.module.path)
        if context.method_name != "__call__" or isinstance(module, _OURS) or in_trial():
            return run(*args, **kwargs)
        if isinstance(module, _WRAPPERS):
            return self._wrapper(run, args, kwargs)
        x = first_argument(context.orig_method, args, kwargs)
        if (why := why_no_batch_norm(context, args, kwargs)) is None:
            return self._norm(module, path, x, run, args, kwargs)
        if why:
            self._note(module, path, KEPT, why)
            return run(*args, **kwargs)  # an heir may still call a batch norm's own
        body, kinds = running_body(context), [kind for kind in _LINEAR if isinstance(module, kind)]
        if body not in map(body_of, kinds):
            return self._other(module, path, run, args, kwargs)
        twin, why = self._twin(module, path, x)
        self._note(module, path, KEPT if twin is None else REPLACED, why)
        y = run(*args, **kwargs) if twin is None else self._whitened(twin, x)
        self._remember(y, path, twin is not None)
        return y

    def _wrapper(self, run, args, kwargs):
        self._wrapped += 1
        try:
            return run(*args, **kwargs)
        finally:
            self._wrapped -= 1

    def _other(self, module: nn.Module, path: Path, run, args, kwargs):
        """Run a module of another kind; where it is a layer all the same, a batch norm may follow it."""
        before = self._entries.get(path)
        y = run(*args, **kwargs)
        entry = self._entries.get(path)
        if entry is before:  # it has not called what it may inherit
            if not _is_layer(module):
                return y
            name = type(module).__name__
            own = f"{name} has a `__call__` of its own" if isinstance(module, _LINEAR) else None
            why = self._rules.why_kept(path) or own or f"{name} is not converted"
            entry = self._note(module, path, KEPT, why)
        if entry is not None and isinstance(y, jax.Array):
            self._remember(y, path, entry.action == REPLACED)
        return y

    def _twin(self, module: Any, path: Path, x: Any) -> tuple[Any, str]:
        """The layer in the place of this one, or None, and why."""
        if why := self._rules.why_kept(path):
            return None, why
        if self._wrapped:
            return None, "below a SpectralNorm or WeightNorm, which would normalize the whitener"
        kind = next((kind for kind in _TWINS if isinstance(module, kind)), None)
        if kind is None:
            return None, f"{type(module).__name__} is not converted"
        if kind is nn.Dense and not self._rules.wants_dense(path, np.shape(x)[-1], module.features):
            return None, "`dense` does not ask for it"
        if getattr(module, "mask", None) is not None:
            return None, "has a mask of its kernel"
        if type(module).param is not kind.param:
            return None, f"{type(module).__name__} changes its parameters"
        if kind is nn.ConvTranspose and (why := self._rules.why_strided(module.strides)):
            return None, why
        twin, settings = _TWINS[kind]
        spec = self._rules.dense_spec if kind is nn.Dense else self._rules.spec
        fields = _fields(module, (*_SHARED, *settings)) | _operations(module)
        return twin(**fields, spec=spec, **self._common(module)), f"by Deconv{kind.__name__}"

    def _common(self, module: nn.Module) -> dict[str, Any]:
        """Return where the new layer's variables live, and which statistics it uses."""
        running = self._rules.use_running_average
        mutable = [module.is_mutable_collection(name) for name in ("batch_stats", "moments")]
        if module.is_initializing() and not mutable[0]:
            raise ValueError(
                f"`model` has a layer, {'/'.join(module.path)!r}, that can make no `batch_stats`: give its "
                "`nn.scan` or `nn.vmap` `variable_axes` for them, or leave them mutable in `init`."
            )
        if running is None:
            running = module.is_initializing() or not any(mutable)
        axis_name = self._rules.axis_name
        return {"use_running_average": running, "axis_name": axis_name, "parent": module.scope}

    def _whitened(self, twin: Any, inputs: Any) -> jax.Array:
        x = jnp.asarray(inputs)
        if not jnp.issubdtype(x.dtype, jnp.inexact):  # which nn.Conv promotes
            x = x.astype(twin.dtype or twin.param_dtype)
        return twin(x)

    def _remember(self, y: Any, path: Path, whitens: bool) -> None:
        alive = [made for made in self._made if made[0]() is not None]
        self._made = [*alive[1 - _REMEMBERED :], (weakref.ref(y), path, whitens)]

    def _norm(self, module: nn.Module, path: Path, x: Any, run, args, kwargs):
        source, whitens = next(
            ((path, whitens) for made, path, whitens in self._made if made() is x), (None, True)
        )
        why = self._rules.why_kept(path)
        if why is None and source is not None and not whitens:
            why = explain_unwhitened(source)
        if why is not None:
            self._note(module, path, KEPT, why)
            return run(*args, **kwargs)
        scalar = starts_at_zero(module, x.shape[-1])
        why = explain_norm(source, scalar=scalar, warm=self._rules.warm)
        self._note(module, path, DROPPED, why)
        fields = _fields(module, ("dtype", "param_dtype", "use_scale", "use_bias"))
        param_dtype = fields["param_dtype"] or jnp.float32
        dtype = fields["dtype"] or jnp.result_type(x)
        if fields["dtype"] is None and (fields["use_scale"] or fields["use_bias"]):
            dtype = jnp.promote_types(dtype, param_dtype)  # what the batch norm would return
        x = jnp.asarray(x, dtype)
        if not scalar:
            return x
        # By the scope: the module itself need not be one that may declare parameters when it is called.
        scope: Any = module.scope
        scale = scope.param("scale", nn.initializers.zeros, (), param_dtype)
        return x * jnp.asarray(scale, dtype)

    def _note(self, module: nn.Module, path: Path, action: str, why: str) -> Entry:
        self._entries[path] = entry = Entry("/".join(path), type(module).__name__, action, why)
        return entry


@contextlib.contextmanager
def converting(rules: Rules) -> Iterator[Conversion]:
    """Convert what models run inside, and give the record of it.

    A function that is jitted has a trace of its own for each set of rules, and for none.
    """
    conversion = Conversion(rules)
    with _traces(rules), nn.intercept_methods(conversion):
        yield conversion


def _is_layer(module: nn.Module) -> bool:
    """Whether a module that has run holds a matrix, and no modules."""
    own = meta.unbox(module.variables.get("params", {})).values()
    return not any(isinstance(leaf, Mapping) for leaf in own) and any(
        jnp.ndim(leaf) > 1 for leaf in own
    )


def _operations(module: nn.Module) -> dict[str, Any]:
    """The function that a layer convolves or multiplies by, whether given or made by a class."""
    found = {}
    for name in _OPERATIONS:
        if hasattr(module, name):
            make = getattr(module, f"{name}_cls", None)
            found[name] = getattr(module, name) if make is None else make()
    return found


def _fields(module: nn.Module, names: Sequence[str]) -> dict[str, Any]:
    return {name: getattr(module, name, None) for name in names}
