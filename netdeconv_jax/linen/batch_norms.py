"""What is a batch norm among the modules that a model runs, and what it is called with."""

import contextlib
import inspect
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.core import meta

_FIELDS = ("use_running_average", "momentum", "epsilon")
_trial = threading.local()


def body_of(kind: type[nn.Module]) -> Any:
    """The function that runs where `__call__` of a class, or `super().__call__` of an heir, is called."""
    return inspect.unwrap(kind.__call__)


def running_body(context: nn.module.InterceptorContext) -> Any:
    """The function whose call an interceptor has met."""
    return getattr(context.orig_method, "func", None)


def first_argument(method: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Return the first parameter of a bound method, however it was given; None if it was not."""
    if args:
        return args[0]
    names = list(inspect.signature(method).parameters)
    return kwargs.get(names[0]) if names else None


def is_batch_norm(context: nn.module.InterceptorContext, args: Any, kwargs: Any) -> bool:
    """Return whether the call that an interceptor has met is that of a batch norm, all of it."""
    return why_no_batch_norm(context, args, kwargs) is None


def why_no_batch_norm(context: nn.module.InterceptorContext, args: Any, kwargs: Any) -> str | None:
    """Return why a call is not that of a batch norm, "" where it is not like one, None if it is one.

    That is `nn.BatchNorm.__call__` itself, also where an heir calls it among other things; or `__call__` of
    another class that has its settings and, as a trial run of it shows, its variables, and no modules inside.
    """
    module = context.module
    if context.method_name != "__call__" or in_trial():
        return ""
    if isinstance(module, nn.BatchNorm):
        if running_body(context) is body_of(nn.BatchNorm):
            return None
        return f"{type(module).__name__} has a `__call__` of its own"
    return _why_other(module, context, args, kwargs) if looks_like_batch_norm(module) else ""


def looks_like_batch_norm(module: nn.Module) -> bool:
    """Return whether a module of another class has the settings of `nn.BatchNorm`."""
    return not isinstance(module, nn.BatchNorm) and all(hasattr(module, name) for name in _FIELDS)


def _why_other(module: nn.Module, context: Any, args: Any, kwargs: Any) -> str | None:
    """Return why a lookalike is no batch norm, "" if it is a block of layers, None if it is one."""
    inside: list[nn.Module] = []

    def look(run, args, kwargs, context):
        if context.module.path:
            inside.append(context.module)
        return run(*args, **kwargs)

    def run():
        return module.clone(parent=None, name=None).init_with_output(
            jax.random.key(0), *args, **kwargs
        )

    try:
        with trial(), jax.disable_jit(), nn.intercept_methods(look):
            output, variables = jax.eval_shape(run)
    except Exception:  # whatever its own code raises, it is not run again here
        return ""
    if inside:
        return ""
    x = first_argument(context.orig_method, args, kwargs)
    same = getattr(output, "shape", None) == np.shape(x)
    stats = variables.get("batch_stats", {})
    own = set(variables.get("params", {}))
    if not (same and set(stats) == {"mean", "var"} and own <= {"scale", "bias"}):
        return "is like a batch norm, but has other variables or another output"
    return None if set(variables) <= {"params", "batch_stats"} else ""


@contextlib.contextmanager
def trial() -> Iterator[None]:
    """Let interceptors of this package pass what runs inside."""
    before, _trial.runs = in_trial(), True
    try:
        yield
    finally:
        _trial.runs = before


def in_trial() -> bool:
    """Return whether a module is run only to see what it is."""
    return getattr(_trial, "runs", False)


def starts_at_zero(module: nn.Module, features: int) -> bool:
    """Return whether the scale of a batch norm starts at zero."""
    start = getattr(module, "scale_init", None)
    if start is None or not getattr(module, "use_scale", True):
        return False
    with jax.ensure_compile_time_eval():
        return not jnp.any(meta.unbox(start(jax.random.key(0), (features,), jnp.float32)))
