"""An NNX layer against its Linen twin, array for array."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx


def equal(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def variables_of(layer) -> Any:
    """What an NNX layer holds, as the collections of its Linen twin."""
    pure = {
        name: nnx.to_pure_dict(nnx.state(layer, kind))
        for name, kind in (("params", nnx.Param), ("batch_stats", nnx.BatchStat))
    }
    return {name: tree for name, tree in pure.items() if tree}


def compare(layer, twin, x, mask=None, steps=3):
    """Three steps of training with gradients, then evaluation, in both APIs from the same parameters."""
    variables = variables_of(layer)
    shapes = jax.eval_shape(lambda x: twin.init(jax.random.key(0), x, True), x)
    equal(jax.tree.map(jnp.shape, variables), jax.tree.map(jnp.shape, shapes))

    @nnx.jit
    def ours(layer, x):
        def loss(layer, x):
            y = layer(x, mask=mask)
            return jnp.sum(jnp.sin(y.astype(jnp.float32))), y

        return nnx.grad(loss, argnums=(0, 1), has_aux=True)(layer, x)

    @jax.jit
    def theirs(variables, x):
        def loss(params, x):
            given = {**variables, "params": params}
            y, updates = twin.apply(given, x, False, mask=mask, mutable=["batch_stats"])
            return jnp.sum(jnp.sin(y.astype(jnp.float32))), (y, updates)

        return jax.grad(loss, argnums=(0, 1), has_aux=True)(variables.get("params", {}), x)

    for step in range(steps):
        seen = x * (step + 1)
        (grads, x_grad), y = ours(layer, seen)
        (expected, expected_x), (expected_y, updates) = theirs(variables, seen)
        variables = {**variables, **updates}
        equal((y, x_grad), (expected_y, expected_x))
        equal(nnx.to_pure_dict(grads), expected)
        equal(variables_of(layer), variables)
    np.testing.assert_array_equal(layer(x, True), twin.apply(variables, x, True))
