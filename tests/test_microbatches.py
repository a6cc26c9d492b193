"""Gradient accumulation: what a loop over microbatches gives, in one trace, and one step of the statistics.

All in float64: a loop and a scan round differently, and batch norm makes much of it.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from netdeconv_jax import ChannelDeconv, DeconvConv, DeconvDense, models
from netdeconv_jax.interop import accumulate, merge_batch_norm

pytestmark = pytest.mark.usefixtures("x64")

X = (
    np.random.default_rng(0).standard_normal((24, 6, 6, 3))
    * np.arange(1, 25)[:, None, None, None]
    / 8
)
PARTS = X.reshape(3, 8, 6, 6, 3)


class Net(nn.Module):
    """Every kind of layer that keeps statistics, two of them nested, one on a freeze schedule."""

    axis_name: Any = None

    @nn.compact
    def __call__(self, x):
        shared: Any = {
            "use_running_average": False,
            "axis_name": self.axis_name,
            "param_dtype": jnp.float64,
        }
        x = nn.relu(DeconvConv(6, (3, 3), freeze_schedule=(1, 3), **shared)(x))
        x = Block(self.axis_name, name="block")(x)
        x = ChannelDeconv(block_size=4, **shared)(x)
        return DeconvDense(2, **shared)(x.mean((1, 2)))


class Block(nn.Module):
    axis_name: Any

    @nn.compact
    def __call__(self, x):
        norm = functools.partial(
            nn.BatchNorm,
            use_running_average=False,
            axis_name=self.axis_name,
            param_dtype=jnp.float64,
            force_float32_reductions=False,
        )
        x = nn.Conv(6, (3, 3), param_dtype=jnp.float64)(x)
        x = nn.relu(norm(momentum=0.99, name="slow")(x))
        return norm(momentum=0.8, name="quick")(x)


def loss_of(model, total=lambda loss: loss):
    def loss_fn(variables, x, mutable):
        y, updates = model.apply(variables, x, mutable=mutable)
        return total(jnp.mean(jnp.sin(3 * y))), (updates, y)

    return loss_fn


@functools.cache
def initialized(model: Any) -> Any:
    return jax.jit(model.init)(jax.random.key(1), PARTS[0])


start: Any = initialized  # Linen modules are hashable; the checker does not believe it


def assert_close(actual, expected, tolerance=1e-9):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(1e-2, np.abs(b).max()))


def by_hand(model, variables, parts):
    """Loss, outputs and gradients in a loop; statistics of the layers' own collections."""
    losses, outputs, grads, stats, moments = [], [], [], [], {}
    loss_fn = loss_of(model)
    for x in parts:
        given = {**variables, **moments}

        def of_params(params, given=given, x=x):
            return loss_fn({**given, "params": params}, x, ["moments", "batch_stats"])

        (loss, (updates, y)), grad = jax.value_and_grad(of_params, has_aux=True)(
            variables["params"]
        )
        moments = {"moments": updates["moments"]}
        losses.append(loss)
        outputs.append(y)
        grads.append(grad)
        stats.append(updates["batch_stats"])
    _, (updates, _) = loss_fn({**variables, **moments}, parts[0], ["batch_stats"])
    new = updates["batch_stats"]
    new["block"] = {
        name: merge_batch_norm(
            jax.tree.map(lambda *leaves: jnp.stack(leaves), *(s["block"][name] for s in stats)),
            momentum,
        )
        for name, momentum in {"slow": 0.99, "quick": 0.8}.items()
    }
    mean = jax.tree.map(lambda *leaves: sum(leaves) / len(leaves), *grads)
    return (sum(losses) / len(losses), jnp.stack(outputs)), mean, new


@functools.cache
def expected_steps():
    """Two steps: in the second, the schedule of the first layer freezes it."""
    variables = start(Net())
    steps = []
    for _ in range(2):
        steps.append(by_hand(Net(), variables, PARTS))
        variables = {**variables, "batch_stats": steps[-1][2]}
    return steps


def test_a_scan_over_microbatches_is_the_loop_by_hand():
    step = jax.jit(functools.partial(accumulate, loss_of(Net())))
    variables = start(Net())
    for number, expected in enumerate(expected_steps(), 1):
        result = step(variables, PARTS)
        assert_close(result, expected)
        variables = {**variables, "batch_stats": result[2]}
        assert result[2]["DeconvConv_0"]["step"] == number
        assert result[2]["ChannelDeconv_0"]["step"] == number
    first, second = (step[2]["DeconvConv_0"] for step in expected_steps())
    np.testing.assert_array_equal(first["whitener"], second["whitener"])


def test_one_microbatch_is_a_plain_step():
    loss_fn, variables = loss_of(Net()), start(Net())

    def of_params(params):
        return loss_fn({**variables, "params": params}, X, ["batch_stats"])

    (loss, (updates, y)), grads = jax.value_and_grad(of_params, has_aux=True)(variables["params"])
    expected = (loss, y[None]), grads, updates["batch_stats"]
    assert_close(accumulate(loss_fn, variables, X[None]), expected)


@pytest.mark.parametrize(
    "norm", ["batch", pytest.param("channel", marks=pytest.mark.slow), "deconv", "none"]
)
def test_equal_microbatches_of_a_zoo_network_are_as_good_as_one(norm):
    model = models.create("cnn", norm, width=0.25, param_dtype=jnp.float64)
    variables = model.init(jax.random.key(0), X)

    def loss_fn(variables, x, mutable):
        y, updates = model.apply(variables, x, train=True, mutable=mutable)
        return jnp.mean(jnp.sin(y)), (updates, ())

    step = jax.jit(functools.partial(accumulate, loss_fn))
    result, expected = step(variables, jnp.stack([X, X])), step(variables, X[None])
    assert bool(result[2]) == (norm != "none")
    assert_close(result[0][0], expected[0][0])
    assert_close(result[1:], expected[1:])


DECONV: Any = {"use_running_average": False, "param_dtype": jnp.float64}
BATCH: Any = {**DECONV, "force_float32_reductions": False}


@pytest.mark.parametrize(
    "layer",
    [
        nn.BatchNorm(momentum=0.9, **BATCH),
        nn.BatchNorm(momentum=0.99, **BATCH),
        DeconvConv(4, (3, 3), **DECONV),
    ],
)
def test_the_statistics_of_a_first_layer_are_those_of_the_whole_batch(layer):
    loss_fn, variables = loss_of(layer), layer.init(jax.random.key(0), X)
    for _ in range(2):
        *_, stats = accumulate(loss_fn, variables, PARTS)
        _, whole = layer.apply(variables, X, mutable=["batch_stats"])
        assert_close(stats, whole["batch_stats"])
        variables = {**variables, "batch_stats": stats}


@pytest.mark.parametrize("momentum", [0.0, 0.9, 0.99])
def test_merged_batch_norms_are_those_of_the_whole_batch(momentum):
    layer = nn.BatchNorm(momentum=momentum, **BATCH)
    x = X + 2
    variables = layer.init(jax.random.key(0), x)

    def update(x):
        return layer.apply(variables, x, mutable=["batch_stats"])[1]["batch_stats"]

    new = jax.vmap(update)(x.reshape(PARTS.shape))
    assert_close(merge_batch_norm(new, momentum), update(x), 1e-12)
    means = jax.tree.map(lambda leaf: leaf.mean(0), new)
    # The mean of the variances alone would be another.
    assert float(jnp.abs(means["var"] - update(x)["var"]).max()) > 1e-6


def test_counts_of_steps_are_not_averaged():
    merged = merge_batch_norm(
        {"step": jnp.array([3, 3], jnp.int32), "scale": jnp.array([1.0, 2.0])}
    )
    assert merged["step"] == 3
    assert merged["step"].dtype == jnp.int32
    assert merged["scale"] == 1.5


def test_the_loss_is_traced_as_often_for_many_microbatches_as_for_few():
    traces = []
    inner = loss_of(Net())

    def loss_fn(variables, x, mutable):
        traces.append(mutable)
        return inner(variables, x, mutable)

    counts = []
    for parts in (X.reshape(2, 12, 6, 6, 3), X.reshape(8, 3, 6, 6, 3)):
        traces.clear()
        jax.eval_shape(functools.partial(accumulate, loss_fn), start(Net()), parts)
        counts.append(len(traces))
    assert counts[0] == counts[1] <= 3


def test_each_microbatch_has_its_own_random_key():
    drop = nn.Dropout(0.5, deterministic=False)

    def loss_fn(variables, batch, mutable):
        y, updates = drop.apply(
            variables, batch["x"], mutable=mutable, rngs={"dropout": batch["key"]}
        )
        return jnp.mean(y), (updates, y)

    batches = {"x": jnp.ones((3, 64)), "key": jax.random.split(jax.random.key(0), 3)}
    (loss, y), grads, stats = accumulate(loss_fn, {"params": {}}, batches)
    assert len({tuple(row.tolist()) for row in y}) == 3
    assert abs(float(loss) - float(y.mean())) < 1e-6
    assert (grads, stats) == ({}, {})


def test_a_batch_norm_behind_a_cached_trace_must_have_its_momentum_given():
    layer = nn.BatchNorm(momentum=0.7, **BATCH)
    variables = layer.init(jax.random.key(0), PARTS[0])
    cached = jax.jit(loss_of(layer), static_argnums=2)

    def loss_fn(variables, x, mutable):
        return cached(variables, x, tuple(mutable))

    expected = accumulate(loss_of(layer), variables, PARTS)
    assert_close(accumulate(loss_fn, variables, PARTS, momentum=0.7), expected)
    with pytest.raises(ValueError, match=r"`momentum` of the batch norm is not to be found"):
        accumulate(loss_fn, variables, PARTS)


def test_a_batch_norm_that_is_called_twice_is_refused():
    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x):
            norm = nn.BatchNorm(name="norm", **BATCH)
            return norm(norm(x) + 1)

    loss_fn, variables = loss_of(Twice()), Twice().init(jax.random.key(0), X)
    accumulate(loss_fn, variables, X[None])
    with pytest.raises(ValueError, match="batch norm norm is called more than once in a pass"):
        accumulate(loss_fn, variables, PARTS)


def test_batch_norms_in_a_loop_of_layers_are_not_taken_for_one():
    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x):
            axes: Any = {"params": 0, "batch_stats": 0, "moments": 0}
            stack = nn.scan(
                lambda norm, x, _: (norm(x), None),
                variable_axes=axes,
                split_rngs={"params": True},
                length=2,
            )
            return stack(nn.BatchNorm(name="norm", **BATCH), x, None)[0]

    loss_fn, variables = loss_of(Stack()), Stack().init(jax.random.key(0), X)
    *_, stats = accumulate(loss_fn, variables, jnp.stack([X, X]))
    assert_close(stats, accumulate(loss_fn, variables, X[None])[2])


@pytest.mark.parametrize("momentum", [1.0, -0.1])
def test_a_momentum_out_of_range_is_refused(momentum):
    new = {"mean": jnp.ones((2, 3)), "var": jnp.ones((2, 3))}
    with pytest.raises(ValueError, match=rf"`momentum` must be in \[0, 1\), got {momentum}"):
        merge_batch_norm(new, momentum)


def test_a_module_without_a_momentum_is_named():
    new = {"stem": {"norm": {"mean": jnp.ones((2, 3)), "var": jnp.ones((2, 3))}}}
    with pytest.raises(ValueError, match=r"for \('stem', 'norm'\), got \{\}"):
        merge_batch_norm(new, {})
    wrong: Any = {("stem", "norm"): "0.9"}
    with pytest.raises(ValueError, match=r"`momentum` must have a number .*: '0.9'\}"):
        merge_batch_norm(new, wrong)


@pytest.mark.parametrize(
    "batches", [(), jnp.ones(()), (jnp.ones((2, 3)), jnp.ones(3)), jnp.ones((0, 3))]
)
def test_batches_without_a_number_of_microbatches_are_refused(batches):
    with pytest.raises(ValueError, match=r"`batches` must be arrays \[k, \.\.\.\]"):
        accumulate(loss_of(Net()), {}, batches)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda wrong: accumulate(wrong, {}, X[None]), "`loss_fn` must be a function, got None"),
        (lambda wrong: accumulate(loss_of(Net()), wrong, X[None]), "`variables` .* got NoneType"),
        (lambda wrong: merge_batch_norm(wrong, wrong), "`new` .* dicts of arrays, got NoneType"),
        (lambda wrong: merge_batch_norm({}, wrong), "`momentum` must be a number, .* got None"),
    ],
)
def test_arguments_of_the_wrong_type_are_refused(call, message):
    with pytest.raises(TypeError, match=message):
        call(None)


# On eight devices.


def second_step(variables):
    return {**variables, "batch_stats": expected_steps()[0][2]}


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_sharded_microbatches_under_jit_equal_one_device(axis_type):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(axis_type,))
    # nn.Conv knows no explicit axes: there the layers of this package stand alone.
    model = Net() if axis_type == AxisType.Auto else DeconvConv(4, (3, 3), **DECONV)
    expected = jax.jit(functools.partial(accumulate, loss_of(model)))(start(model), PARTS)
    with jax.set_mesh(mesh):
        parts = jax.device_put(PARTS, NamedSharding(mesh, P(None, "data")))
        variables = jax.device_put(start(model), NamedSharding(mesh, P()))
        step = jax.jit(functools.partial(accumulate, loss_of(model)))
        assert_close(step(variables, parts), expected)


@pytest.mark.parametrize("number", [0, 1])
def test_shard_map_equals_one_device(number):
    variables = second_step(start(Net())) if number else start(Net())
    loss_fn = loss_of(Net("data"), lambda loss: jax.lax.pmean(loss, "data"))
    step = jax.shard_map(
        functools.partial(accumulate, loss_fn),
        mesh=jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,)),
        in_specs=(P(), P(None, "data")),
        out_specs=((P(), P(None, "data")), P(), P()),
    )
    assert_close(jax.jit(step)(variables, PARTS), expected_steps()[number])


def test_statistics_of_each_device_work_under_shard_map():
    variables = start(Net())

    def losses(variables, parts):
        (loss, y), *_ = accumulate(loss_of(Net()), variables, parts)
        return (loss[None], y), None

    step = jax.shard_map(
        lambda variables, parts: losses(variables, parts)[0],
        mesh=jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,)),
        in_specs=(P(), P(None, "data")),
        out_specs=(P("data"), P(None, "data")),
    )
    loss, y = jax.jit(step)(variables, PARTS)
    halves = [losses(variables, half)[0] for half in (PARTS[:, :4], PARTS[:, 4:])]
    assert_close(loss, jnp.concatenate([half[0] for half in halves]))
    assert_close(y, jnp.concatenate([half[1] for half in halves], 1))


def test_pmap_equals_one_device():
    step = jax.pmap(
        functools.partial(accumulate, loss_of(Net("data"))), axis_name="data", in_axes=(None, 1)
    )
    (loss, y), grads, stats = step(start(Net()), PARTS.reshape(3, 8, 1, 6, 6, 3))
    mean = functools.partial(jax.tree.map, lambda leaf: leaf.mean(0))
    result = (loss.mean(), jnp.moveaxis(y[:, :, 0], 0, 1)), mean(grads), stats
    result = *result[:2], jax.tree.map(lambda leaf: leaf[3], stats)
    assert_close(result, expected_steps()[0])
