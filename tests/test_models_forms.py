"""Every network with every norm: shapes of all of them, and the real thing at reduced width."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from netdeconv_jax import WhiteningSpec, models
from netdeconv_jax.models.registry import info
from netdeconv_jax.models.units import NORMS

NAMES = list(models.list())
REPRESENTATIVES = (
    "mlp",
    "lenet",
    "resnet18",
    "preact_resnet18",
    "mobilenetv2",
    "efficientnet_b0",
)
# The smallest sizes that leave a 2x2 map or so: deep strides over small maps are slow on CPUs.
REAL_SIZES = {"vgg11_imagenet": 32, "vgg16_imagenet": 32, "densenet121_imagenet": 32}


def small(name, norm, **options):
    """A narrow form of a network, and eight small images."""
    size = REAL_SIZES.get(name) or max(16, info(name).make.__dict__.get("minimum_size", 0))
    if name.startswith("vgg"):
        size = 32
    spec = WhiteningSpec(block_size=8)
    width = 0.25 if info(name).parameters > 1e5 else 1.0
    model = models.create(name, norm, 5, spec, width=width, **options)
    x = jax.random.normal(jax.random.key(1), (8, size, size, 3))
    return model, x


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


@functools.cache
def step_of(model):
    """One compiled training step: plain SGD."""

    @jax.jit
    def step(params, state, x, labels):
        loss = functools.partial(loss_and_updates, model)
        (_, (logits, updates)), gradients = jax.value_and_grad(loss, has_aux=True)(
            params, state, x, labels
        )
        params = jax.tree.map(lambda p, g: p - 0.01 * g, params, gradients)
        return params, {**state, **updates}, logits, gradients

    return step


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", NAMES)
def test_shapes_of_every_network_with_every_norm(name, norm):
    model = models.create(name, norm, num_classes=7, dtype=jnp.bfloat16)
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
    assert (state == {}) == (norm == "none")


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n in REPRESENTATIVES else pytest.mark.slow) for n in NAMES],
)
def test_a_narrow_network_trains_and_evaluates(name, norm):
    model, x = small(name, norm)
    labels = jnp.arange(8) % 5
    variables = jax.jit(model.init)(jax.random.key(0), x)
    params, state = variables["params"], {k: v for k, v in variables.items() if k != "params"}

    step = step_of(model)
    new_params, new_state, logits, gradients = step(params, state, x, labels)
    step(new_params, new_state, x + 1, labels)
    assert step._cache_size() == 1
    assert logits.shape == (8, 5)
    assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(gradients))
    assert all(
        bool((old != new).any())
        for old, new in zip(jax.tree.leaves(state), jax.tree.leaves(new_state), strict=True)
        if old.size > 1 or norm == "batch"
    )

    evaluate = jax.jit(functools.partial(model.apply, mutable=["batch_stats"]))
    logits, untouched = evaluate({"params": params, **new_state}, x)
    assert logits.shape == (8, 5)
    assert bool(jnp.isfinite(logits).all())
    jax.tree.map(np.testing.assert_array_equal, untouched, new_state)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", ["resnet18", "mobilenetv2"])
def test_bfloat16_stays_near_float32(name, norm):
    logits = {}
    for dtype in (jnp.float32, jnp.bfloat16):
        model, x = small(name, norm, dtype=dtype)
        variables = jax.jit(model.init)(jax.random.key(0), x)
        apply = functools.partial(model.apply, train=True, mutable=["batch_stats"])
        logits[dtype], _ = jax.jit(apply)(variables, x)
    assert logits[jnp.bfloat16].dtype == jnp.float32
    scale = jnp.abs(logits[jnp.float32]).max()
    assert jnp.abs(logits[jnp.float32] - logits[jnp.bfloat16]).max() < 0.2 * scale


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n == "resnet18" else pytest.mark.slow) for n in REPRESENTATIVES],
)
def test_eight_devices_agree_with_one(name, norm):
    model, x = small(name, norm)
    labels = jnp.arange(8) % 5
    variables = jax.jit(model.init)(jax.random.key(0), x)
    params, state = variables["params"], {k: v for k, v in variables.items() if k != "params"}
    alone = step_of(model)(params, state, x, labels)

    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    everywhere = NamedSharding(mesh, PartitionSpec())
    split = NamedSharding(mesh, PartitionSpec("data"))
    params, state = jax.device_put((params, state), everywhere)
    together = step_of(model)(params, state, *jax.device_put((x, labels), split))
    for one, eight in zip(jax.tree.leaves(alone), jax.tree.leaves(together), strict=True):
        scale = max(1e-3, float(jnp.abs(one).max()))
        np.testing.assert_allclose(one, eight, atol=2e-3 * scale)
