"""`update_whitener=False`: a training step that whitens by the running statistics and leaves them alone."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import AxisType, PartitionSpec
from nnx_twins import equal, variables_of
from traced import primitives

from netdeconv_jax import (
    ChannelDeconv,
    DeconvConv,
    DeconvConvTranspose,
    DeconvDense,
    WhiteningSpec,
    interop,
    models,
)
from netdeconv_jax import nnx as dnnx
from netdeconv_jax.models import Network
from netdeconv_jax.models.registry import info

X = jax.random.normal(jax.random.key(0), (6, 8, 8, 6)) * jnp.arange(1, 7).reshape(1, 1, 1, 6) + 1

LAYERS = {
    "conv": lambda **kw: DeconvConv(4, (3, 3), block_size=2, **kw),
    "conv of whitened channels": lambda **kw: DeconvConv(4, (3, 3), whiten="channels", **kw),
    "depthwise": lambda **kw: DeconvConv(6, (3, 3), feature_group_count=6, **kw),
    "transposed": lambda **kw: DeconvConvTranspose(4, (3, 3), strides=2, block_size=2, **kw),
    "dense": lambda **kw: DeconvDense(4, **kw),
    "channel": lambda **kw: ChannelDeconv(block_size=3, **kw),
    "channel with a rest": lambda **kw: ChannelDeconv(block_size=4, **kw),
}
TWINS = {
    "conv": lambda: dnnx.DeconvConv(6, 4, (3, 3), block_size=2, rngs=nnx.Rngs(0)),
    "transposed": lambda: dnnx.DeconvConvTranspose(6, 4, (3, 3), 2, block_size=2, rngs=nnx.Rngs(0)),
    "dense": lambda: dnnx.DeconvDense(6, 4, rngs=nnx.Rngs(0)),
    "channel with a rest": lambda: dnnx.ChannelDeconv(6, block_size=4),
}


def trained(layer, steps=2) -> Any:
    """Variables with some statistics in them."""
    variables = {"params": {}, **layer.init(jax.random.key(1), X, True)}
    for _ in range(steps):
        variables |= layer.apply(variables, X, False, mutable=["batch_stats"])[1]
    return variables


def reused(layer, variables, x, mask=None) -> Any:
    return layer.apply(
        variables, x, False, mask=mask, update_whitener=False, mutable=["batch_stats"]
    )


@pytest.mark.parametrize("name", LAYERS)
def test_output_and_gradients_are_those_of_evaluation_and_nothing_is_updated(name):
    layer = LAYERS[name]()
    variables = trained(layer)
    y, updates = reused(layer, variables, 2 * X, mask=jnp.ones((6, 1, 1, 1)).at[0].set(0))
    np.testing.assert_array_equal(y, layer.apply(variables, 2 * X, True))
    equal(updates["batch_stats"], variables["batch_stats"])

    def loss(variables, x, evaluating):
        if evaluating:
            return jnp.sum(jnp.sin(layer.apply(variables, x, True)))
        return jnp.sum(jnp.sin(reused(layer, variables, x)[0]))

    floats = {**variables, "batch_stats": dict(variables["batch_stats"])}
    step = floats["batch_stats"].pop("step", None)

    def of_floats(floats, x, evaluating):
        counted = {} if step is None else {"step": step}
        stats = {**floats["batch_stats"], **counted}
        return loss({**floats, "batch_stats": stats}, x, evaluating)

    grads, x_grad = jax.grad(of_floats, argnums=(0, 1))(floats, X, False)
    expected, expected_x = jax.grad(of_floats, argnums=(0, 1))(floats, X, True)
    equal((grads["params"], x_grad), (expected["params"], expected_x))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(grads["batch_stats"]))
    assert any(np.any(leaf) for leaf in jax.tree.leaves(expected["batch_stats"]))


@pytest.mark.parametrize("name", LAYERS)
def test_no_covariance_no_root_and_nothing_to_wait_for_is_in_the_program(name):
    layer = LAYERS[name](axis_name="devices")
    variables = trained(LAYERS[name]())

    def found(**flags):
        def step(x):
            return layer.apply(variables, x, **flags, mutable=["batch_stats"])[0]

        mesh = jax.make_mesh((2,), ("devices",), axis_types=(AxisType.Auto,))
        parts = PartitionSpec("devices")
        mapped = jax.shard_map(step, mesh=mesh, in_specs=parts, out_specs=parts)
        return primitives(mapped, X)

    reusing = found(use_running_average=False, update_whitener=False)
    computing = found(use_running_average=False)
    assert reusing["dot_general"] == found(use_running_average=True)["dot_general"]
    assert computing["dot_general"] > reusing["dot_general"] + 12
    assert not any("psum" in name or name == "cond" for name in reusing)
    assert any("psum" in name for name in computing)


def test_before_any_update_the_layer_is_a_plain_one():
    layer, plain = DeconvConv(4, (3, 3), update_whitener=False), nn.Conv(4, (3, 3))
    variables: Any = layer.init(jax.random.key(1), X, True)
    y, _ = layer.apply(variables, X, False, mutable=["batch_stats"])
    expected: Any = plain.apply({"params": variables["params"]}, X)
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-5)


def test_the_count_of_a_freeze_schedule_goes_on_and_the_first_batch_of_a_channel_layer_waits():
    layer = DeconvConv(4, (3, 3), freeze_schedule=(2, 3))
    variables = trained(layer, steps=1)
    after = reused(layer, variables, X)[1]["batch_stats"]
    assert (variables["batch_stats"]["step"], after["step"]) == (1, 2)
    equal({**after, "step": 0}, {**variables["batch_stats"], "step": 0})
    channel = ChannelDeconv(block_size=3)
    fresh = trained(channel, steps=0)
    fresh |= reused(channel, fresh, X)[1]
    fresh |= channel.apply(fresh, X, False, mutable=["batch_stats"])[1]
    equal(fresh["batch_stats"], trained(channel, steps=1)["batch_stats"])


def test_here_or_in_the_call_but_not_in_both():
    layer = DeconvConv(4, (3, 3), update_whitener=True)
    variables = trained(DeconvConv(4, (3, 3)))
    with pytest.raises(ValueError, match="`update_whitener` must be given to the constructor or"):
        reused(layer, variables, X)
    here = DeconvConv(4, (3, 3), update_whitener=False)
    equal(
        here.apply(variables, X, False, mutable=["batch_stats"]),
        reused(DeconvConv(4, (3, 3)), variables, X),
    )


@pytest.mark.parametrize("name", TWINS)
def test_nnx_reuses_in_a_view_of_the_model_and_in_the_call_what_linen_does(name):
    layer, twin = TWINS[name](), LAYERS[name]()
    layer(X)
    view = nnx.view(layer, update_whitener=False)
    variables = {"params": {}, **variables_of(layer)}
    expected, updates = reused(twin, variables, 2 * X)
    np.testing.assert_array_equal(view(2 * X), expected)
    np.testing.assert_array_equal(layer(2 * X, update_whitener=False), expected)
    equal(updates["batch_stats"], variables["batch_stats"])
    equal(variables_of(layer)["batch_stats"], variables["batch_stats"])
    assert layer.update_whitener
    view(2 * X, update_whitener=True)  # the call goes before the attribute; variables are shared
    moved = twin.apply(variables, 2 * X, False, mutable=["batch_stats"])[1]["batch_stats"]
    equal(variables_of(layer)["batch_stats"], moved)


def test_an_nnx_step_that_is_jitted_alternates_between_two_programs():
    layer = dnnx.DeconvConv(6, 4, (3, 3), rngs=nnx.Rngs(0))
    traced = []

    @nnx.jit
    def step(layer, x):
        traced.append(layer.update_whitener)
        return layer(x)

    view = nnx.view(layer, update_whitener=False)
    for _ in range(2):
        step(layer, X)
        before = variables_of(layer)
        step(view, X)
        equal(variables_of(layer), before)
    assert traced == [True, False]


@pytest.mark.parametrize(
    "name",
    ["cnn", *(pytest.param(n, marks=pytest.mark.slow) for n in ("mlp", "lenet", "resnet18"))],
)
def test_the_argument_of_a_network_reaches_all_of_its_layers(name):
    model = models.create(name, spec=WhiteningSpec(block_size=4, num_iters=2), width=0.25)
    x = jax.random.normal(jax.random.key(0), (4, 16, 16, 3))
    variables = jax.jit(model.init)(jax.random.key(0), x)

    @jax.jit
    def step(variables):
        return model.apply(variables, x, train=True, update_whitener=False, mutable=["batch_stats"])

    variables |= model.apply(variables, x, train=True, mutable=["batch_stats"])[1]
    logits, updates = step(variables)
    expected: Any = model.apply(variables, x)
    equal(updates["batch_stats"], variables["batch_stats"])
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", {type(models.create(n)): n for n in models.list()}.values())
def test_every_network_hands_the_argument_on(name):
    model = models.create(name, width=0.1)
    seen = []

    def note(run, args, kwargs, context):
        if isinstance(context.module, DeconvConv | DeconvDense):
            seen.append(context.module.update_whitener)
        return run(*args, **kwargs)

    with nn.intercept_methods(note):
        x = jax.ShapeDtypeStruct((2, info(name).size, info(name).size, 3), jnp.float32)
        jax.eval_shape(
            lambda key, x: model.init(key, x, update_whitener=False), jax.random.key(0), x
        )
    assert seen
    assert not any(seen)


def test_batch_norms_of_the_same_network_go_on_taking_the_batch_s():
    class Both(Network):
        @nn.compact
        def __call__(self, x, train=False, update_whitener=True):
            units = self.units(x, train, update_whitener)
            x = units.conv(4, 3, name="conv")(x)
            return units.in_original(deconv="batch").norm(name="norm")(x)

    model = Both(layout="original")
    variables: Any = model.init(jax.random.key(0), X)
    _, updates = model.apply(variables, X, True, update_whitener=False, mutable=["batch_stats"])
    equal(updates["batch_stats"]["conv"], variables["batch_stats"]["conv"])
    moved = np.abs(
        updates["batch_stats"]["norm"]["mean"] - variables["batch_stats"]["norm"]["mean"]
    )
    assert moved.min() > 0


def test_microbatches_of_a_step_that_reuses_leave_the_statistics_alone():
    told: Any = {"use_running_average": False, "update_whitener": False}
    channel = ChannelDeconv(block_size=4, **told)
    model = nn.Sequential([channel, DeconvDense(2, freeze_schedule=(1, 9), **told)])
    variables: Any = model.init(jax.random.key(0), X)

    def loss_fn(variables, x, mutable):
        y, updates = model.apply(variables, x, mutable=mutable)
        return jnp.mean(jnp.sin(y)), (updates, None)

    def of_params(params):
        return loss_fn({**variables, "params": params}, X, ["batch_stats"])[0]

    parts = X.reshape(3, 2, *X.shape[1:])
    _, grads, stats = interop.accumulate(loss_fn, variables, parts)
    whole = jax.grad(of_params)(variables["params"])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6), grads, whole)
    assert stats["layers_1"].pop("step") == 1
    before = jax.tree.map(jnp.asarray, variables["batch_stats"])
    del before["layers_1"]["step"]
    equal(stats, before)


def test_moments_and_diagnostics_of_a_step_that_reuses_are_of_no_samples():
    layer = DeconvConv(4, (3, 3))
    _, found = layer.apply(
        trained(layer), X, False, update_whitener=False, mutable=["moments", "diagnostics"]
    )
    assert found["moments"]["count"] == 0
    assert found["diagnostics"]["rows_per_dim"] == (0,)
