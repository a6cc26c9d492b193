"""Precise statistics: the plain mean of every batch's own, whatever the layer and its momentum."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from netdeconv_jax import ChannelDeconv, DeconvConv, DeconvDense, deconvolve, models
from netdeconv_jax.interop import recalibrate

X = np.random.default_rng(0).standard_normal((24, 6, 6, 3)).astype(np.float32)
X *= np.arange(1, 25, dtype=np.float32)[:, None, None, None] / 8
PARTS = list(X.reshape(3, 8, 6, 6, 3))
FLAGS: Any = {"apply_kwargs": {"use_running_average": False}}

# Whose first step from nothing is (1 - momentum) of the batch's mean.
LAYERS = {
    "batch norm": (nn.BatchNorm(momentum=0.99), 0.99),
    "conv": (DeconvConv(4, (3, 3), momentum=0.8), 0.8),
    "conv without momentum": (DeconvConv(4, (3, 3), momentum=0.0), 0.0),
    "conv on a schedule": (DeconvConv(4, (3, 3), freeze_schedule=(1, 5)), 0.9),
    "channel": (ChannelDeconv(block_size=2), 0.0),
    "dense": (DeconvDense(4), 0.9),
}


def start(layer, x=X) -> Any:
    return {"params": {}, **layer.init(jax.random.key(0), x, True)}


def step(layer, variables, x) -> Any:
    _, updates = layer.apply(variables, x, False, mutable=["batch_stats"])
    return {**variables, **updates}


def own(layer, momentum, x):
    """The statistics of one batch, from one step of fresh running ones."""
    before = start(layer)["batch_stats"]
    after = step(layer, start(layer), x)["batch_stats"]
    return {
        name: (after[name] - momentum * before[name]) / (1 - momentum)
        for name in after
        if name != "step"
    }


def assert_close(actual, expected, tolerance=1e-4):
    assert set(actual) == set(expected)
    for name in expected:
        scale = max(1e-2, float(jnp.abs(expected[name]).max()))
        np.testing.assert_allclose(actual[name], expected[name], rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("name", LAYERS)
def test_statistics_are_the_mean_of_the_batches_own(name):
    layer, momentum = LAYERS[name]
    variables = start(layer)
    for x in (100 * X, 3 - X):  # which must leave no trace
        variables = step(layer, variables, x)
    new = recalibrate(layer, variables, iter(PARTS), **FLAGS)
    each = [own(layer, momentum, x) for x in PARTS]
    expected = {name: sum(stats[name] for stats in each) / 3 for name in each[0]}
    if "step" in variables["batch_stats"]:
        assert new["batch_stats"].pop("step") == variables["batch_stats"]["step"] == 2
    assert_close(new["batch_stats"], expected, 2e-3 if momentum == 0.99 else 1e-4)
    assert {leaf.dtype for leaf in jax.tree.leaves(new["batch_stats"])} == {jnp.dtype("float32")}
    assert new["params"] is variables["params"]


def test_float64_statistics_stay_float64(x64):
    layer = DeconvConv(4, (3, 3), param_dtype=jnp.float64)
    parts = [x.astype(np.float64) for x in PARTS]
    new = recalibrate(layer, start(layer, parts[0]), parts, **FLAGS)["batch_stats"]
    each = [own(layer, 0.9, x) for x in parts]
    assert new["mean"].dtype == jnp.float64
    np.testing.assert_allclose(new["mean"], sum(s["mean"] for s in each) / 3, atol=1e-12)


def test_batches_weigh_what_they_hold():
    layer, momentum = LAYERS["dense"]
    parts = [X[:16], X[16:18], X[18:]]
    new = recalibrate(layer, start(layer), parts, **FLAGS)["batch_stats"]
    shares = [len(x) / 24 for x in parts]
    each = [own(layer, momentum, x) for x in parts]
    expected = {n: sum(w * s[n] for w, s in zip(shares, each, strict=True)) for n in each[0]}
    assert_close(new, expected)
    np.testing.assert_allclose(new["mean"], X.mean((0, 1, 2)), atol=1e-5)


class Odd(nn.Module):
    """Keeps what is no average, normalizes by fixed statistics, and then by those of the batch."""

    @nn.compact
    def __call__(self, x, train: bool):
        largest = self.variable("batch_stats", "largest", lambda: jnp.zeros(()))
        if train and not self.is_initializing():
            largest.value = jnp.maximum(largest.value, jnp.abs(x).max())
        x = nn.BatchNorm(use_running_average=True, name="fixed")(x)
        x = nn.BatchNorm(use_running_average=not train, name="moving")(x)
        return nn.Dropout(0.5, deterministic=not train)(x)


def test_what_is_no_average_and_what_is_fixed_stays():
    model = Odd()
    variables: Any = model.init(jax.random.key(0), X, train=False)
    variables["batch_stats"]["fixed"] = {"mean": jnp.full(3, 2.0), "var": jnp.full(3, 4.0)}
    variables["batch_stats"]["largest"] = jnp.array(0.5)
    rngs = {"dropout": jax.random.key(1)}
    new: Any = recalibrate(model, variables, PARTS, rngs=rngs)["batch_stats"]
    assert new["largest"] == 0.5
    np.testing.assert_allclose(new["fixed"]["mean"], 2.0, rtol=1e-4)
    np.testing.assert_allclose(new["fixed"]["var"], 4.0, rtol=1e-4)
    expected = ((X - 2) / np.sqrt(4 + 1e-5)).mean((0, 1, 2))
    np.testing.assert_allclose(new["moving"]["mean"], expected, atol=1e-4)


@pytest.mark.parametrize("norm", ["batch", "deconv", "channel"])
def test_a_zoo_network_evaluates_as_it_trains(norm):
    model = models.create("cnn", norm, width=0.25)
    variables = model.init(jax.random.key(0), X)
    given = jax.tree.map(jnp.copy, variables)
    new = recalibrate(model, variables, [X])
    trained, _ = model.apply(variables, X, train=True, mutable=["batch_stats"])
    after: Any = model.apply(new, X, train=False)
    np.testing.assert_allclose(after, trained, atol=2e-3)
    before: Any = model.apply(variables, X, train=False)
    assert float(jnp.abs(before - trained).max()) > 0.1
    jax.tree.map(np.testing.assert_array_equal, variables, given)


def test_a_second_batch_of_a_shape_and_a_second_call_trace_nothing():
    traces = []

    class Counting(nn.Module):
        @nn.compact
        def __call__(self, x, train: bool):
            traces.append(x.shape)
            return nn.BatchNorm(use_running_average=not train)(x)

    model = Counting()
    variables = model.init(jax.random.key(0), X, train=False)
    traces.clear()
    recalibrate(model, variables, PARTS)
    assert len(traces) == 2  # for the values, and to see which modules there are
    recalibrate(model, variables, PARTS)
    assert len(traces) == 2


@pytest.mark.parametrize("norm", ["batch", "deconv"])
def test_sharded_batches_give_the_statistics_of_one_device(norm):
    model = models.create("cnn", norm, width=0.25)
    variables = model.init(jax.random.key(0), X)
    expected = recalibrate(model, variables, PARTS)["batch_stats"]
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    parts = [jax.device_put(x, NamedSharding(mesh, P("data"))) for x in PARTS]
    replicated = jax.device_put(variables, NamedSharding(mesh, P()))
    new = recalibrate(model, replicated, parts)["batch_stats"]
    for a, b in zip(jax.tree.leaves(new), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-3 * max(1e-2, float(jnp.abs(b).max())))


def test_a_model_without_statistics_is_returned_as_it_is():
    model = models.create("cnn", "none", width=0.25)
    variables = model.init(jax.random.key(0), X)
    assert recalibrate(model, variables, []) == variables


def test_no_batches_are_refused():
    layer, _ = LAYERS["dense"]
    with pytest.raises(ValueError, match="`batches` must hold at least one batch"):
        recalibrate(layer, start(layer), [], **FLAGS)


@pytest.mark.parametrize(
    ("model", "variables", "message"),
    [
        (None, {}, "`model` must be a Linen module, .* got NoneType"),
        (DeconvDense, {}, "`model` must be a Linen module, .* got DeconvDense"),
        (nnx.Linear(1, 1, rngs=nnx.Rngs(0)), {}, "`model` must be a Linen module, .* got Linear"),
        (DeconvDense(4), None, "`variables` must be nested dicts of arrays, got NoneType"),
    ],
)
def test_what_is_no_model_and_what_are_no_variables_are_refused(model, variables, message):
    with pytest.raises(TypeError, match=message):
        recalibrate(model, variables, PARTS, **FLAGS)


class Twice(nn.Module):
    """A layer that is called twice, behind one that evaluates."""

    layer: Any
    remat: bool = False

    @nn.compact
    def __call__(self, x, train: bool):
        x = nn.BatchNorm(use_running_average=True, name="fixed")(x)
        run = nn.remat(lambda layer, x: layer(x, not train)) if self.remat else None
        for _ in range(2):
            x = 2 * (run(self.layer, x) if run else self.layer(x, not train)) + 1
        return x


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize(
    "layer",
    [nn.BatchNorm(momentum=0.9), DeconvConv(3, (3, 3), momentum=0.8), ChannelDeconv(block_size=2)],
)
def test_a_layer_that_is_called_twice_keeps_nothing_of_the_old(layer, remat):
    model = Twice(layer, remat)
    fresh: Any = model.init(jax.random.key(0), X, train=False)
    far = {**fresh, "batch_stats": jax.tree.map(lambda s: s, fresh["batch_stats"])}
    shift = {"layer": jax.tree.map(lambda s: 50 * s + 7, fresh["batch_stats"]["layer"])}
    far["batch_stats"] = {**fresh["batch_stats"], **shift}
    zero = {"layer": jax.tree.map(jnp.zeros_like, fresh["batch_stats"]["layer"])}
    _, updates = model.apply(
        {**fresh, "batch_stats": {**fresh["batch_stats"], **zero}},
        X,
        train=True,
        mutable=["batch_stats"],
    )
    # From nothing a step of momentum m leaves 1 - m of the batch, two leave 1 - m^2; a channel deconv all.
    momentum = 0.0 if isinstance(layer, ChannelDeconv) else layer.momentum
    expected = jax.tree.map(lambda s: s / (1 - momentum**2), updates["batch_stats"]["layer"])
    new: Any = recalibrate(model, far, [X])["batch_stats"]
    assert new["layer"].pop("step", 0) == far["batch_stats"]["layer"].get("step", 0)
    expected.pop("step", None)
    assert_close(new["layer"], expected, 1e-3)
    assert_close(new["fixed"], fresh["batch_stats"]["fixed"], 1e-6)


def test_layers_in_a_loop_take_as_many_steps_as_it_has():
    class Loop(nn.Module):
        @nn.compact
        def __call__(self, x, train: bool):
            def body(layer, x, _):
                return 2 * layer(x) + 1, None

            scan = nn.scan(
                body,
                variable_carry="batch_stats",
                variable_broadcast="params",
                split_rngs={"params": False},
                length=3,
            )
            run: Any = scan
            return run(nn.BatchNorm(not train, momentum=0.9, name="norm"), x, None)[0]

    norm: Any = nn.BatchNorm(True).init(jax.random.key(0), X)
    model, variables = Loop(), {kind: {"norm": leaves} for kind, leaves in norm.items()}
    x = X - X.mean((0, 1, 2))
    far = {**variables, "batch_stats": jax.tree.map(lambda s: s + 100, variables["batch_stats"])}
    new = [recalibrate(model, given, [x])["batch_stats"]["norm"] for given in (variables, far)]
    assert_close(new[0], new[1], 1e-3)
    # Means of 0, 1 and 1, of which the last step weighs 0.1, the one before it 0.09.
    np.testing.assert_allclose(new[0]["mean"], 0.19 / 0.271, rtol=1e-3)


def test_a_second_batch_traces_nothing_of_a_model_with_lists_in_its_fields():
    traces = []

    def count(x):
        traces.append(x.shape)
        return x

    model = nn.Sequential([count, nn.BatchNorm(use_running_average=False)])
    variables = model.init(jax.random.key(0), X)
    traces.clear()
    new: Any = recalibrate(model, variables, PARTS, apply_kwargs={})["batch_stats"]
    assert len(traces) == 2
    np.testing.assert_allclose(new["layers_1"]["mean"], X.mean((0, 1, 2)), atol=1e-4)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = DeconvConv(3, (3, 3), block_size=3, use_running_average=not train, name="conv")(x)
        norm = nn.BatchNorm(momentum=0.9, name="norm")
        return norm(2 * norm(x, not train) + x, not train)


JittedBlock = nn.jit(Block, static_argnums=(2,))


class Blocks(nn.Module):
    jitted: bool

    @nn.compact
    def __call__(self, x, train: bool = False):
        block = JittedBlock if self.jitted else Block
        for i in range(2):  # of which `nn.jit` traces one
            x = block(name=f"block{i}")(x, train)
        return x


def test_blocks_that_are_jitted_are_met_each_time():
    plain, jitted = Blocks(False), Blocks(True)
    variables = plain.init(jax.random.key(0), X)
    _, trained = plain.apply(variables, X, True, mutable=["batch_stats"])
    expected = recalibrate(plain, variables, [X])["batch_stats"]
    _, updates = jitted.apply(variables, X, True, mutable=["batch_stats"])
    new = recalibrate(jitted, variables, [X])["batch_stats"]
    for a, b in zip(jax.tree.leaves(new), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-3 * max(1e-2, float(jnp.abs(b).max())))
    _, after = jitted.apply(variables, X, True, mutable=["batch_stats"])
    for a, b, c in zip(*map(jax.tree.leaves, (updates, after, trained)), strict=True):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_allclose(a, c, rtol=1e-3, atol=1e-4)


def test_a_norm_that_never_moves_stays_as_it_is():
    norm = nn.BatchNorm(use_running_average=False, momentum=1.0)
    variables = norm.init(jax.random.key(0), X)
    new = recalibrate(norm, variables, PARTS, apply_kwargs={})
    jax.tree.map(np.testing.assert_array_equal, new, variables)


def test_converted_models_with_arrays_in_their_fields_are_no_trouble_to_tell_apart():
    class Shifted(nn.Module):
        shift: Any

        @nn.compact
        def __call__(self, x):
            return nn.Conv(2, (1, 1))(x + self.shift)

    means = []
    for shift in (1.0, 1.0, 3.0):
        model = deconvolve(Shifted(np.full((1, 1, 1, 3), shift, np.float32)))
        variables: Any = model.init(jax.random.key(0), X)
        new = recalibrate(model, variables, PARTS, apply_kwargs={})["batch_stats"]
        means.append(new["Conv_0"]["mean"])
    np.testing.assert_array_equal(means[0], means[1])
    np.testing.assert_allclose(means[2], means[0] + 2, atol=1e-5)


class Modulated(nn.Module):
    """A model of two arrays."""

    @nn.compact
    def __call__(self, x, shift, train: bool):
        return nn.BatchNorm(not train)(x + shift)


def test_models_may_take_several_arrays():
    model, shift = Modulated(), np.arange(24, dtype=np.float32).reshape(24, 1, 1, 1)
    variables = model.init(jax.random.key(0), X, shift, train=False)
    pairs = [(X[:16], shift[:16]), (X[16:], shift[16:])]
    new: Any = recalibrate(model, variables, pairs)["batch_stats"]
    np.testing.assert_allclose(new["BatchNorm_0"]["mean"], (X + shift).mean((0, 1, 2)), atol=1e-4)
    for same in (shift[:8], jnp.asarray(shift[8:16])):  # other values, the same program
        given: Any = {"shift": same, "train": True}
        new = recalibrate(model, variables, PARTS, apply_kwargs=given)["batch_stats"]
        expected = X.mean((0, 1, 2)) + same.mean()
        np.testing.assert_allclose(new["BatchNorm_0"]["mean"], expected, atol=1e-4)
    with pytest.raises(ValueError, match=r"arrays and hashable values, got \[1\] for 'shift'"):
        recalibrate(model, variables, PARTS, apply_kwargs={"shift": [1]})
