"""The parts of a whitened layer, each compiled by itself and timed at every shape that a network has.

A part that runs alone is not fused with its neighbours and shares no core with them, so that the sum over
layers is not the time of a step; it says where the time goes.
"""

import dataclasses
import statistics
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from netdeconv_jax import ops
from netdeconv_jax.models.network import Network
from netdeconv_jax.models.summary import LayerRow, layer_table
from netdeconv_jax.whitening.conv import conv_groups, dense_groups, sampling
from netdeconv_jax.whitening.running import whitener_of

LEAST_SECONDS, REPEATS = 0.05, 5


def layers(model: Network, shape: tuple[int, ...], dtype: Any) -> list[dict[str, Any]]:
    """Return, for each shape of layer, how often it occurs and the seconds of its parts.

    Each part has `forward`, and `both`: value and the pullback of a cotangent of ones.
    """
    rows = [
        dataclasses.replace(row, path=())
        for row in layer_table(model, shape)
        if row.kind in ("deconv_conv", "deconv_dense", "batch_norm")
    ]
    found = []
    for row, count in Counter(rows).items():
        timed = {}
        for name, (function, arguments) in _parts(row, dtype).items():
            timed[name] = {
                "forward": seconds_of(function, *arguments),
                "both": seconds_of(value_and_pullback(function), *arguments),
            }
        found.append(
            {
                "kind": row.kind,
                "in_shape": row.in_shape,
                "out_shape": row.out_shape,
                "kernel_size": row.kernel_size,
                "strides": row.strides,
                "count": count,
                "parts": timed,
            }
        )
    return found


def totals(layers: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Return the seconds of each part, summed over all layers of the network."""
    total: dict[str, dict[str, float]] = {}
    for layer in layers:
        for name, timed in layer["parts"].items():
            part = total.setdefault(name, {"forward": 0.0, "both": 0.0})
            for key, seconds in timed.items():
                part[key] += layer["count"] * seconds
    return total


def value_and_pullback(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function of the same arguments with its value and the pullback of ones."""

    def both(*arguments: Any) -> Any:
        value, pullback = jax.vjp(function, *arguments)
        return value, pullback(jax.tree.map(jnp.ones_like, value))

    return both


def seconds_of(function: Callable[..., Any], *arguments: Any) -> float:
    """Return the median over a few turns of the seconds of one call, compiled and warm."""
    compiled = jax.jit(function).lower(*arguments).compile()

    def turn(times: int) -> float:
        start = time.perf_counter()
        result = None
        for _ in range(times):
            result = compiled(*arguments)
        jax.block_until_ready(result)
        return (time.perf_counter() - start) / times

    turn(1)
    times = max(1, round(LEAST_SECONDS / turn(1)))
    return statistics.median(turn(times) for _ in range(REPEATS))


def _parts(row: LayerRow, dtype: Any) -> dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]:
    key = jax.random.key(0)
    x = jax.random.normal(key, row.in_shape, dtype)
    if row.kind == "batch_norm":
        norm = nn.BatchNorm(use_running_average=False, momentum=0.9, epsilon=1e-5, dtype=dtype)
        variables = norm.init(key, x)
        return {
            "batch_norm": (
                lambda x, variables: norm.apply(variables, x, mutable=["batch_stats"])[0],
                (x, variables),
            )
        }
    assert row.spec is not None
    spec = row.spec
    if row.kind == "deconv_dense":
        x = x.reshape(x.shape[0], -1, 1, x.shape[-1])
        geometry, groups, grid = ops.window((1, 1)), dense_groups(spec, x.shape[-1]), {}
    else:
        geometry = ops.window((row.kernel_size,) * 2, row.strides, row.padding)
        groups = conv_groups(spec, x.shape[-1], geometry.taps, row.groups)
        grid = sampling(spec, x.shape, geometry, groups)
    kernel_shape = (*geometry.kernel_size, x.shape[-1] // row.groups, row.out_shape[-1])
    kernel = jax.random.normal(key, kernel_shape)
    bias = jnp.zeros(kernel_shape[-1])

    def moments(x: jax.Array) -> ops.Moments:
        shift = jnp.zeros((*groups.stat_shape, groups.width)) if spec.one_pass else None
        return ops.patch_moments(
            x,
            geometry,
            groups,
            shift=shift,
            sample_dtype=spec.sample_dtype,
            **grid,
        )

    def fold(kernel: jax.Array, bias: jax.Array, mean: jax.Array, whitener: jax.Array) -> Any:
        precision = spec.fold_precision(dtype, training=True)
        return ops.fold(kernel, bias, mean, whitener, groups, dtype=dtype, precision=precision)

    def convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return geometry.convolve(
            x,
            kernel,
            feature_group_count=row.groups,
            conv_general_dilated=ops.convolution,  # as in training
        )

    found = jax.jit(moments)(x)
    whitener = jax.jit(lambda moments: whitener_of(moments, spec))(found)
    return {
        "statistics": (moments, (x,)),
        "root": (lambda cov: whitener_of(dataclasses.replace(found, cov=cov), spec), (found.cov,)),
        "fold": (fold, (kernel, bias, found.mean, whitener)),
        "convolution": (convolve, (x, kernel.astype(dtype))),
    }
