"""The sum of outer products of samples, with a derivative that costs half of what a product's does.

`G = sum_n w_n x_n x_n'` has the differential `S + S'` with `S = sum_n w_n x_n dx_n'`: one product over all
samples, where differentiating `dot(w x, x)` takes two, forward as well as in reverse. A training step then
pays for its covariances two products instead of three.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.sharding import NamedSharding, PartitionSpec

from netdeconv_jax.ops.devices import on_explicit_mesh


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def gram(
    x: jax.Array,
    weights: jax.Array | None,
    axes: tuple[int, ...],
    sample_dtype: str | None = None,
) -> jax.Array:
    """Return `sum_n w_n x_n x_n'` over the sample axes, at HIGHEST precision unless `sample_dtype` is given.

    Args:
      x: [..., d], floating point; the last axis is the variable.
      weights: [..., 1], of the rank of `x`, or None for ones.
      axes: the sample axes; over an explicit mesh they are contracted as they are, since one that is sharded
        must not be merged with others. The other axes lead in the result.
      sample_dtype: to which factors are rounded, derivatives and cotangents too; sums are of the dtype of `x`
        in the value, and rounded once in derivatives.
    Returns:
      [*others, d, d] in the dtype of `x`; over an explicit mesh, replicated.

    Source: ours.

    Example:
      >>> import jax.numpy as jnp
      >>> from netdeconv_jax.ops.gram import gram
      >>> gram(jnp.array([[1.0, 2.0], [0.0, 1.0]]), None, (0,)).tolist()
      [[1.0, 2.0], [2.0, 5.0]]
    """
    if sample_dtype is None:
        return _contract(_weighted(x, weights), x, axes, None)
    # Both factors are rounded alike, so that the result is symmetric and has no eigenvalue below 0.
    x = _weighted(x, None if weights is None else jnp.sqrt(weights))
    return _contract(x, x, axes, sample_dtype)


def _jvp(axes, sample_dtype, primals, tangents):
    (x, weights), (dx, dweights) = primals, tangents
    value = gram(x, weights, axes, sample_dtype)
    tangent = jnp.zeros_like(value)
    if not isinstance(dx, SymbolicZero):
        half = _contract_rounded(_weighted(x, weights), dx, axes, sample_dtype)
        tangent = half + jnp.swapaxes(half, -1, -2)
    if weights is not None and not isinstance(dweights, SymbolicZero):
        tangent = tangent + _contract_rounded(x * dweights, x, axes, sample_dtype)
    return value, tangent


gram.defjvp(_jvp, symbolic_zeros=True)


def _weighted(x: jax.Array, weights: jax.Array | None) -> jax.Array:
    return x if weights is None else x * weights


def _contract_rounded(
    a: jax.Array, b: jax.Array, axes: tuple[int, ...], sample_dtype: str | None
) -> jax.Array:
    """As `_contract`, the result rounded too, so that its transpose rounds the cotangent first."""
    return _contract(a, b, axes, sample_dtype, sample_dtype).astype(a.dtype)


def _contract(
    a: jax.Array,
    b: jax.Array,
    axes: tuple[int, ...],
    sample_dtype: str | None,
    result_dtype: str | None = None,
) -> jax.Array:
    element_type = a.dtype if result_dtype is None else jnp.dtype(result_dtype)
    precision = lax.Precision.HIGHEST
    if sample_dtype is not None:
        a, b, precision = a.astype(sample_dtype), b.astype(sample_dtype), lax.Precision.DEFAULT
    lead = tuple(i for i in range(a.ndim - 1) if i not in axes)
    shape, d = [a.shape[i] for i in lead], a.shape[-1]
    matrices, samples = math.prod(shape), math.prod(a.shape[i] for i in axes)
    contracted, batched, out_sharding = axes, lead, None
    if on_explicit_mesh(a):
        out_sharding = NamedSharding(jax.typeof(a).sharding.mesh, PartitionSpec())
    elif matrices == 1:
        # As a matrix: where several axes are contracted XLA first writes all samples out transposed.
        a, b = a.reshape(samples, d), b.reshape(samples, d)
        contracted, batched = (0,), ()
    elif jax.default_backend() == "cpu":
        # So does it here, in the order that suits many small matrices or few, as measured.
        samples_last = matrices > 2 * d
        order = (*lead, a.ndim - 1, *axes) if samples_last else (*lead, *axes, a.ndim - 1)
        sizes = (d, samples) if samples_last else (samples, d)
        a, b = (v.transpose(order).reshape(matrices, *sizes) for v in (a, b))
        contracted, batched = (2 if samples_last else 1,), (0,)
    product = lax.dot_general(
        a,
        b,
        ((contracted, contracted), (batched, batched)),
        precision=precision,
        preferred_element_type=element_type,
        out_sharding=out_sharding,
    )
    return product.reshape(*shape, d, d)
