"""Every network with every norm: shapes of all of them, and the real thing at reduced width."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from jax.sharding import NamedSharding, PartitionSpec

from netdeconv_jax import WhiteningSpec, models
from netdeconv_jax.models.registry import info
from netdeconv_jax.models.units import NORMS

NAMES = list(models.list())
REPRESENTATIVES = ("mlp", "cnn", "lenet", "vgg11", "resnet18", "senet18")
CHEAP = ("mlp", "cnn", "lenet", "resnet18")
# Compiling is what these tests cost; optimizing what runs once or twice is not worth it. Level 0 would be
# quicker still, but computes wrong gradients.
QUICK = {"xla_backend_optimization_level": 1, "xla_llvm_disable_expensive_passes": True}


MAIN_NORMS = [
    pytest.param(n, marks=() if n in ("batch", "deconv") else pytest.mark.slow) for n in NORMS
]


def slow_unless(names):
    return [pytest.param(n, marks=() if n in names else pytest.mark.slow) for n in NAMES]


def small(name, norm, **options):
    """A narrow form of a network, its variables, eight small images and their labels."""
    width = 0.25 if info(name).parameters > 1e6 else 1.0
    spec = WhiteningSpec(block_size=8, num_iters=2)  # fewer steps, less to compile
    model = models.create(name, norm, 5, spec, width=width, **options)
    size = max(16, model.minimum_size or 0)
    x = jax.random.normal(jax.random.key(1), (8, size, size, 3))
    init = jax.jit(model.init, compiler_options=QUICK)
    variables = init(jax.random.key(0, impl="rbg"), x)
    return model, variables, x, jnp.arange(8) % 5


def loss_and_updates(model, params, state, x, labels):
    logits, updates = model.apply(
        {"params": params, **state},
        x,
        train=True,
        mutable=["batch_stats"],
        rngs={"dropout": jax.random.key(2)},
    )
    loss = -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1).mean()
    return loss, (logits, updates)


def compiled_step(model):
    """Plain SGD, and an evaluation behind it."""

    def step(variables, x, labels):
        state = {k: v for k, v in variables.items() if k != "params"}
        params = variables["params"]
        loss = functools.partial(loss_and_updates, model)
        (_, (logits, updates)), gradients = jax.value_and_grad(loss, has_aux=True)(
            params, state, x, labels
        )
        params = jax.tree.map(lambda p, g: p - 0.01 * g, params, gradients)
        variables = {"params": params, **state, **updates}
        evaluated, untouched = model.apply(variables, x, mutable=["batch_stats"])
        return variables, logits, gradients, evaluated, untouched

    return jax.jit(step, compiler_options=QUICK)


def over_eight_devices(variables, x, labels):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    split = NamedSharding(mesh, PartitionSpec("data"))
    everywhere = NamedSharding(mesh, PartitionSpec())
    return jax.device_put((variables, x, labels), (everywhere, split, split))


@pytest.mark.parametrize(
    ("name", "norm"),
    [
        # Large twins of networks that are seen with this norm at 32x32.
        pytest.param(
            name,
            norm,
            marks=pytest.mark.slow if (name[-9:], norm) == ("_imagenet", "channel") else (),
        )
        for name in NAMES
        for norm in NORMS
    ],
)
def test_shapes_of_every_network_with_every_norm(name, norm):
    spec = WhiteningSpec(num_iters=1)  # shapes are the same, and there is less to trace
    model = models.create(name, norm, num_classes=7, spec=spec, dtype=jnp.bfloat16)
    size = info(name).size
    x = jax.ShapeDtypeStruct((2, size, size, 3), jnp.float32)

    def train(key, x):
        variables = model.init(key, x)
        params = variables.pop("params")
        loss = functools.partial(loss_and_updates, model)
        labels = jnp.zeros(2, jnp.int32)
        gradients, (logits, updates) = jax.grad(loss, has_aux=True)(params, variables, x, labels)
        return params, gradients, variables, updates, logits

    params, gradients, state, updates, logits = jax.eval_shape(train, jax.random.key(0), x)
    assert logits.shape == (2, 7)
    assert logits.dtype == jnp.float32
    assert gradients == params
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}
    assert updates == state
    assert bool(state) == (norm != "none")


@pytest.mark.parametrize("norm", MAIN_NORMS)
@pytest.mark.parametrize("name", slow_unless(CHEAP[:-1]))
def test_a_narrow_network_trains_and_evaluates_on_eight_devices(name, norm):
    model, variables, x, labels = small(name, norm)
    check_step(model, norm, *over_eight_devices(variables, x, labels))


@pytest.mark.parametrize(
    "norm",
    MAIN_NORMS,
)
@pytest.mark.parametrize("name", slow_unless(CHEAP))
def test_a_narrow_network_trains_and_evaluates_in_bfloat16(name, norm):
    model, variables, x, labels = small(name, norm, dtype=jnp.bfloat16)
    check_step(model, norm, variables, x, labels)


def check_step(model, norm, variables, x, labels):
    step: Any = compiled_step(model)
    new, logits, gradients, evaluated, untouched = step(variables, x, labels)
    assert step(new, x + 1, labels)[1].shape == (8, 5)
    assert step._cache_size() == 1

    for outputs in (logits, evaluated):
        assert outputs.shape == (8, 5)
        assert outputs.dtype == jnp.float32
        assert bool(jnp.isfinite(outputs).all())
    assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(gradients))
    if norm == "none":
        assert set(new) == {"params"}
        return
    old_stats, new_stats = variables.get("batch_stats", {}), new.get("batch_stats", {})
    changed = jax.tree.map(lambda a, b: bool((a != b).any()), old_stats, new_stats)
    layers: dict[tuple[str, ...], list[bool]] = {}
    for path, is_changed in traverse_util.flatten_dict(changed).items():
        layers.setdefault(path[:-1], []).append(bool(is_changed))
    # Not every statistic: the mean of a narrow network's dead ReLU stays 0.
    assert all(map(any, layers.values())), changed
    jax.tree.map(np.testing.assert_array_equal, untouched.get("batch_stats", {}), new_stats)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n == "lenet" else pytest.mark.slow) for n in REPRESENTATIVES],
)
def test_eight_devices_agree_with_one(name, norm, x64):
    # In float32 rounding turns a ReLU here and there, and moves an entry by a hundredth.
    model, variables, x, labels = small(name, norm, param_dtype=jnp.float64)
    arguments = variables, x.astype(jnp.float64), labels
    alone = compiled_step(model)(*arguments)
    together = compiled_step(model)(*over_eight_devices(*arguments))
    for one, eight in zip(jax.tree.leaves(alone), jax.tree.leaves(together), strict=True):
        scale = max(1e-2, float(jnp.abs(one).max()))
        np.testing.assert_allclose(one, eight, rtol=0, atol=1e-9 * scale)
