"""Layers under flax's transforms, Linen's and NNX's: the numbers of the same layers without them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from traced import primitives

from netdeconv_jax import DeconvConv, DeconvDense, WhiteningSpec
from netdeconv_jax import nnx as dnnx

SPEC = WhiteningSpec(eps=1e-2).replace(num_iters=2)
LAYERS, ROWS, WIDTH = 3, 8, 4
STATS = ["batch_stats"]


def normal(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def applied(module, mutable=STATS) -> Any:
    """The module's pass in training, compiled."""
    return jax.jit(lambda variables, *args: module.apply(variables, *args, mutable=mutable))


def close(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), ours, theirs)


class Block(nn.Module):
    """One layer, in the form that `nn.scan` asks for."""

    axis_name: Any = None
    kind: Any = DeconvDense

    @nn.compact
    def __call__(self, x, _=None):
        settings: Any = {"kernel_size": (3, 2)} if self.kind is DeconvConv else {}
        layer = self.kind(
            WIDTH, **settings, spec=SPEC, use_running_average=False, axis_name=self.axis_name
        )
        return jnp.tanh(layer(x)), None


def rows(kind) -> tuple[int, ...]:
    """The shape of an input of a layer, without channels."""
    return (2, 4, 3) if kind in (DeconvConv, dnnx.DeconvConv) else (ROWS,)


LINEN = pytest.mark.parametrize("kind", [DeconvDense, DeconvConv])
NNX = pytest.mark.parametrize("kind", [dnnx.DeconvDense, dnnx.DeconvConv])


def start(module, *args) -> Any:
    return jax.jit(module.init)(jax.random.key(1), *args)


def take(tree, i) -> Any:
    return jax.tree.map(lambda leaf: leaf[i], tree)


def stack(*trees) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


STACKED: Any = {
    "variable_axes": {"params": 0, "batch_stats": 0, "diagnostics": 0},
    "split_rngs": {"params": True},
}


@LINEN
def test_linen_scan_over_layers_is_a_loop_over_layers(kind):
    x, module = normal(*rows(kind), WIDTH), nn.scan(Block, length=LAYERS, **STACKED)(kind=kind)
    variables = start(module, x)
    told = [*STATS, "diagnostics"]
    (y, _), updates = applied(module, told)(variables, x)
    block, looped, found = applied(Block(kind=kind), told), x, []
    for i in range(LAYERS):
        (looped, _), update = block(take(variables, i), looped)
        found.append(update)
    close((y, updates), (looped, stack(*found)))
    # Where the transform does not carry the diagnostics, they are not asked for.
    without: Any = {**STACKED, "variable_axes": {"params": 0, "batch_stats": 0}}
    silent = nn.scan(Block, length=LAYERS, **without)(kind=kind)
    _, others = jax.eval_shape(lambda v: silent.apply(v, x, mutable=told), variables)
    assert not others.get("diagnostics")


def test_linen_scan_over_time_updates_one_set_of_statistics_step_by_step():
    xs, module = normal(LAYERS, ROWS, WIDTH), nn.scan(Cell, **CARRIED)()
    variables = start(Cell(), None, xs[0])  # flax carries only what is there before the loop
    (_, ys), updates = applied(module)(variables, None, xs)
    cell, given, found = applied(Cell()), variables, []
    for x in xs:
        (_, y), update = cell(given, None, x)
        given = {**given, **update}
        found.append(y)
    close((ys, updates["batch_stats"]), (jnp.stack(found), given["batch_stats"]))


class Cell(nn.Module):
    @nn.compact
    def __call__(self, carry, x):
        return carry, DeconvDense(2, spec=SPEC, use_running_average=False)(x)


CARRIED: Any = {
    "variable_broadcast": "params",
    "variable_carry": "batch_stats",
    "split_rngs": {"params": False},
}


@LINEN
def test_linen_vmap_over_variables_is_an_ensemble(kind):
    x = normal(LAYERS, *rows(kind), WIDTH)
    module = nn.vmap(Block, in_axes=0, out_axes=0, **STACKED)(kind=kind)
    variables = start(module, x)
    (y, _), updates = applied(module)(variables, x)
    block = applied(Block(kind=kind))
    alone = [block(take(variables, i), x[i]) for i in range(LAYERS)]
    close((y, updates), (jnp.stack([y for (y, _), _ in alone]), stack(*[u for _, u in alone])))


def test_linen_vmap_over_the_batch_pools_statistics_by_its_axis_name():
    x = normal(2, ROWS, WIDTH)
    shared: Any = {"params": None, "batch_stats": None}
    module: Any = nn.vmap(
        Block, variable_axes=shared, split_rngs={"params": False}, axis_name="parts"
    )(axis_name="parts")
    variables = start(module, x)
    (y, _), updates = applied(module)(variables, x)
    (whole, _), expected = applied(Block())(variables, x.reshape(-1, WIDTH))
    close((y.reshape(-1, WIDTH), updates), (whole, expected))


def test_linen_remat_changes_neither_gradients_nor_statistics():
    x, layer = normal(2, 5, 5, 2), {"features": 3, "kernel_size": (3, 3), "spec": SPEC}
    plain: Any = DeconvConv(**layer, use_running_average=False)
    remat: Any = nn.remat(DeconvConv)(**layer, use_running_average=False)
    variables = start(plain, x)

    def of(module):
        def loss(params):
            y, updates = module.apply({**variables, "params": params}, x, mutable=STATS)
            return jnp.sum(jnp.sin(y)), updates

        return jax.jit(jax.value_and_grad(loss, has_aux=True))

    close(of(remat)(variables["params"]), of(plain)(variables["params"]))
    assert "remat" in str(jax.make_jaxpr(of(remat))(variables["params"]))


# NNX


def layer(kind, rngs) -> Any:
    settings: Any = {"kernel_size": (3, 2)} if kind is dnnx.DeconvConv else {}
    return kind(WIDTH, WIDTH, **settings, spec=SPEC, rngs=rngs)


def layers(kind, count=LAYERS) -> Any:
    @nnx.split_rngs(splits=count)
    @nnx.vmap(in_axes=0, out_axes=0)
    def make(rngs):
        return layer(kind, rngs)

    return make(nnx.Rngs(0))


def arrays(module) -> Any:
    return nnx.to_pure_dict(nnx.state(module))


def each(stacked) -> Any:
    graph, state = nnx.split(stacked)
    return [nnx.merge(graph, take(state, i)) for i in range(LAYERS)]


@NNX
def test_nnx_scan_over_layers_is_a_loop_over_layers(kind):
    x, stacked = normal(*rows(kind), WIDTH), layers(kind)
    alone = each(stacked)

    @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    def forward(layer, x):
        return jnp.tanh(layer(x))

    y, looped = forward(stacked, x), x
    step = nnx.jit(lambda layer, x: jnp.tanh(layer(x)))
    for layer in alone:
        looped = step(layer, looped)
    close((y, arrays(stacked)), (looped, stack(*map(arrays, alone))))


@NNX
def test_nnx_vmap_over_variables_is_an_ensemble(kind):
    x, stacked = normal(LAYERS, *rows(kind), WIDTH), layers(kind)
    alone = each(stacked)
    y = nnx.vmap(lambda layer, x: layer(x), in_axes=0, out_axes=0)(stacked, x)
    one = nnx.jit(lambda layer, x: layer(x))
    found = jnp.stack([one(layer, x) for layer, x in zip(alone, x, strict=True)])
    close((y, arrays(stacked)), (found, stack(*map(arrays, alone))))


@NNX
def test_nnx_remat_changes_neither_gradients_nor_statistics(kind):
    x = normal(*rows(kind), WIDTH)
    plain, checkpointed = (layer(kind, nnx.Rngs(0)) for _ in "ab")

    def loss(layer, x):
        return jnp.sum(jnp.sin(layer(x)))

    ours = nnx.jit(nnx.value_and_grad(nnx.remat(loss), argnums=(0, 1)))(checkpointed, x)
    theirs = nnx.jit(nnx.value_and_grad(loss, argnums=(0, 1)))(plain, x)
    close(ours, theirs)
    close(arrays(checkpointed), arrays(plain))
    assert float(jnp.abs(plain.mean[...]).max()) > 0


@pytest.mark.parametrize("method", ["newton_schulz", "chebyshev"])
def test_remat_that_keeps_whiteners_computes_no_product_of_the_root_again(method):
    x = normal(*rows(DeconvConv), WIDTH)
    policies = jax.checkpoint_policies

    def products(wrap=lambda kind: kind) -> int:
        layer = wrap(DeconvConv)(WIDTH, (3, 2), use_running_average=False, method=method)
        variables = layer.init(jax.random.key(0), x)

        def loss(params, x):
            return layer.apply({**variables, "params": params}, x, mutable=STATS)[0].sum()

        gradient = jax.grad(loss, argnums=(0, 1))
        return primitives(gradient, variables["params"], x)["dot_general"]

    def remat(policy):
        return lambda kind: nn.remat(kind, policy=policy)

    kept = products(remat(policies.save_only_these_names("whitener")))
    folding = 2
    assert kept == products() + folding
    last = 1  # product of the root, which no gradient needs
    again = DeconvConv(WIDTH, 3, method=method).resolved_spec().root.products - last
    assert products(remat(policies.nothing_saveable)) >= products() + folding + again
