"""Whether a converted model computes what the model did."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import jaxprs_in_params

from netdeconv_jax.whitening.spec import WhiteningSpec

# Of the largest output, by bits of the fraction. Far above rounding, also where a device multiplies float32
# in fewer bits, and far below what a wrong fold does.
_TOLERANCES = ((52, 1e-6), (23, 0.05), (0, 0.25))

TIED = "a kernel that is folded may be used elsewhere too"


def check_no_local_norm(spec: WhiteningSpec | None) -> None:
    """Raise if layers of `spec` cannot compute what plain ones do, whatever their kernels."""
    if spec is not None and spec.local_norm is not None:
        raise ValueError(
            f"`spec` must have no `local_norm` for a warm start, got {spec.local_norm!r}: each sample would "
            "be divided by its own deviation, which is another function than the one that was trained."
        )


def check_same(
    run: Callable[[Any, Any], Any],
    variables: Any,
    again: Callable[[Any, Any], Any],
    new_variables: Any,
    x: Any,
    *,
    after: str = "conversion",
    remedy: str = "`keep` the layers that are not what they look like",
) -> None:
    """Raise if the new model computes anything else: a batch norm may be none, whatever it looks like."""
    precision = _precision(jax.make_jaxpr(run)(variables, x).jaxpr)
    tolerance = next(most for bits, most in _TOLERANCES if bits <= precision)
    old, new = jax.jit(run)(variables, x), jax.jit(again)(new_variables, x)
    for expected, output in zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True):
        if not jnp.issubdtype(expected.dtype, jnp.inexact):
            continue
        difference = jnp.where(
            output == expected, 0, output - expected
        )  # also of infinities: masks
        finite = jnp.where(jnp.isfinite(expected), expected, 0)
        largest, error = (float(jnp.abs(y).max()) for y in (finite, difference))
        if not error <= tolerance * max(largest, 1e-3):
            raise ValueError(
                f"`model` computes something else after {after}: outputs of up to {largest:.3g} differ by "
                f"{error:.3g}; {remedy}."
            )


def _precision(jaxpr: Any) -> int:
    """The fewest bits of the fraction of any number in a program."""
    found = [52]
    for eqn in jaxpr.eqns:
        dtypes = [var.aval.dtype for var in eqn.outvars if hasattr(var.aval, "dtype")]
        found += [jnp.finfo(dtype).nmant for dtype in dtypes if jnp.issubdtype(dtype, jnp.floating)]
        found += [_precision(inner) for inner in jaxprs_in_params(eqn.params)]
    return min(found)
