"""`local_norm="layer"`: each sample is centred and scaled by itself before it is whitened with the others."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy_oracle as oracle
import pytest
from flax import linen as nn
from flax import nnx
from jax.extend.core import jaxprs_in_params
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads
from nnx_twins import compare, variables_of

import netdeconv_jax
from netdeconv_jax import DeconvConv, DeconvConvTranspose, DeconvDense, WhiteningSpec, ops
from netdeconv_jax import nnx as dnnx

ON: Any = {"local_norm": "layer"}
FEW: Any = {"block_size": 2, "sampling_stride": 1}
LAYERS: Any = {
    "conv": (lambda **kw: DeconvConv(5, (3, 3), **FEW, **kw), (4, 5, 4, 3)),
    "conv 1x1": (lambda **kw: DeconvConv(5, (1, 1), **FEW, **kw), (4, 5, 4, 3)),
    "circular": (lambda **kw: DeconvConv(5, (3, 3), padding="CIRCULAR", **kw), (4, 5, 4, 3)),
    "transposed": (lambda **kw: DeconvConvTranspose(5, (3, 3), 2, **FEW, **kw), (4, 5, 4, 3)),
    "dense": (lambda **kw: DeconvDense(5, **kw), (4, 6, 3)),
}


def images(shape=(4, 5, 4, 3), seed=0, dtype: Any = np.float32) -> Any:
    """Samples of unlike brightness and contrast."""
    rng = np.random.default_rng(seed)
    size = (shape[0],) + (1,) * (len(shape) - 1)
    return (rng.normal(size=shape) * rng.uniform(1, 9, size) + rng.normal(size=size) * 5).astype(
        dtype
    )


def mask_of(x):
    """Weights of pixels: the last rows of each image are padding, one weighs half."""
    mask = np.ones((*x.shape[:-1], 1), x.dtype)
    mask[:, -1] = 0
    mask[:, 0] = 0.5
    return mask


def start(layer, x) -> Any:
    return layer.init(jax.random.key(1), x, True)


def train(layer, variables, x, **kwargs) -> Any:
    return layer.apply(variables, x, False, mutable=["batch_stats"], **kwargs)


def close(found, expected, tolerance=1e-5):
    def check(a, b):
        scale = max(1, np.abs(b).max())
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * scale)

    jax.tree.map(check, found, expected)


# The op


@pytest.mark.parametrize("jit", [True, False])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("shape", [(3, 5, 4, 3), (3, 7, 2), (4, 6), (2, 3, 2, 2, 2), (2, 1, 1, 1)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float64])
def test_it_is_what_numpy_finds_sample_by_sample(x64, dtype, shape, masked, jit):
    x = jnp.asarray(images(shape), dtype)
    mask = mask_of(np.asarray(x, np.float64)) if masked and len(shape) > 2 else None
    if mask is not None:
        mask[-1] = 0  # a sample that weighs nothing is one without a mask
    run = jax.jit(ops.local_norm, static_argnames="axes") if jit else ops.local_norm
    found = run(x, None if mask is None else jnp.asarray(mask), axes=tuple(range(1, len(shape))))
    assert found.dtype == dtype
    expected = oracle.local_norm(x, None if mask is None else mask[..., 0])
    tolerance = {jnp.float32: 2e-6, jnp.bfloat16: 0.01, jnp.float64: 1e-12}[dtype]
    close(np.asarray(found, np.float64), expected, tolerance)


def test_statistics_of_half_precision_are_float32_and_only_the_result_is_rounded():
    x = jnp.asarray(300 + images((4, 9, 9, 8)), jnp.bfloat16)
    exact = ops.local_norm(x, axes=(1, 2, 3), dtype=jnp.float32)
    assert exact.dtype == jnp.float32
    close(exact, oracle.local_norm(np.asarray(x, np.float64)), 1e-4)
    np.testing.assert_array_equal(ops.local_norm(x, axes=(1, 2, 3)), exact.astype(jnp.bfloat16))


@pytest.mark.parametrize("masked", [True, False])
def test_it_has_derivatives_to_second_order_forward_and_reverse(x64, masked):
    x = jnp.asarray(images((2, 3, 2, 2), dtype=np.float64))
    mask = jnp.asarray(mask_of(np.asarray(x))) if masked else None
    check_grads(
        jax.jit(lambda x: ops.local_norm(x, mask, axes=(1, 2, 3))), (x,), order=2, rtol=1e-5
    )


# The layers


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_whitens_the_normalized_samples_as_another_whitens_what_it_gets(name, masked):
    make, shape = LAYERS[name]
    x = images(shape)
    mask = mask_of(x) if masked else None
    if len(shape) == 3:  # a sample of a dense layer is one vector
        normal = oracle.local_norm(x.reshape(-1, shape[-1])).reshape(shape)
    else:
        normal = oracle.local_norm(x, None if mask is None else mask[..., 0])
    layer, other = make(**ON), make()
    variables = start(other, x)
    jax.tree.map(np.testing.assert_array_equal, start(layer, x), variables)
    found = train(layer, variables, x, mask=mask)
    expected = train(other, variables, normal.astype(np.float32), mask=mask)
    close(found, expected, 2e-5)
    stats = {**variables, **found[1]}
    evaluated = layer.apply(stats, x, True, mask=mask)
    close(evaluated, other.apply(stats, normal.astype(np.float32), True), 2e-5)
    assert np.abs(evaluated - other.apply(stats, x, True)).max() > 0.1


@pytest.mark.parametrize("name", LAYERS)
def test_a_sample_that_is_multiplied_by_7_changes_nothing(name):
    make, shape = LAYERS[name]
    x = images(shape)
    brighter = x.copy()
    brighter[2] = 7 * brighter[2] + 3
    layer = make(**ON)
    variables = start(layer, x)
    close(train(layer, variables, brighter), train(layer, variables, x), 2e-5)
    plain = make()
    one, other = (train(plain, variables, seen)[0][0] for seen in (brighter, x))
    assert np.abs(one - other).max() > 0.05  # else all of the batch is whitened otherwise


@pytest.mark.parametrize("garbage", [1e4, np.nan])
@pytest.mark.parametrize("name", LAYERS)
def test_garbage_in_the_padding_changes_nothing_else(name, garbage):
    make, shape = LAYERS[name]
    x = images(shape)
    mask = mask_of(x)
    spoilt = np.where(mask > 0, x, np.float32(garbage))
    layer = make(**ON)
    variables = start(layer, x)
    (y, stats), (expected, expected_stats) = (
        train(layer, variables, seen, mask=mask) for seen in (spoilt, x)
    )
    close(stats, expected_stats, 1e-6)
    keep = slice(1, {"transposed": 6, "dense": 5}.get(name, 3))  # what sees no padded pixel
    close(y[:, keep], expected[:, keep], 1e-6)


def twin_of(name, features, **settings) -> Any:
    """The NNX layer of the same name."""
    rngs = nnx.Rngs(0)
    if name == "dense":
        return dnnx.DeconvDense(features, 5, rngs=rngs, **settings)
    if name == "transposed":
        return dnnx.DeconvConvTranspose(features, 5, (3, 3), 2, rngs=rngs, **FEW, **settings)
    settings |= {"padding": "CIRCULAR"} if name == "circular" else FEW
    size = (1, 1) if name == "conv 1x1" else (3, 3)
    return dnnx.DeconvConv(features, 5, size, rngs=rngs, **settings)


@pytest.mark.parametrize(
    ("name", "dtype", "masked"),
    [
        ("conv", None, True),
        ("conv 1x1", jnp.bfloat16, False),
        ("circular", jnp.bfloat16, True),
        ("transposed", None, True),
        ("dense", jnp.bfloat16, False),
        ("dense", None, True),
    ],
)
def test_the_nnx_layer_is_its_linen_twin_array_for_array(name, dtype, masked):
    make, shape = LAYERS[name]
    x = images(shape)
    settings = {"dtype": dtype, "spec": WhiteningSpec(**ON)} | ({} if dtype else ON)
    mask = jnp.asarray(mask_of(x)) if masked else None
    compare(twin_of(name, shape[-1], **settings), make(**settings), jnp.asarray(x), mask)


@pytest.mark.parametrize("name", ["conv", "transposed", "dense"])
def test_layers_have_derivatives_to_second_order(x64, name):
    make, shape = LAYERS[name]
    x = jnp.asarray(images((2, *shape[1:]), dtype=np.float64))
    layer = make(param_dtype=jnp.float64, eps=0.1, num_iters=2, **ON)
    variables = start(layer, x)
    assert train(layer, variables, x)[0].dtype == jnp.float64

    @jax.jit
    def forward(params, x):
        return jnp.sum(jnp.sin(train(layer, {**variables, "params": params}, x)[0]))

    check_grads(forward, (variables["params"], x), order=2, modes=("rev",), rtol=1e-4)


@pytest.mark.parametrize("name", LAYERS)
def test_samples_without_contrast_give_finite_outputs_and_gradients(name):
    make, shape = LAYERS[name]
    x = images(shape)
    layer = make(**ON)
    variables = start(layer, x)

    @jax.jit
    def run(params, x):
        def loss(params, x):
            y, updates = train(layer, {**variables, "params": params}, x)
            return jnp.mean(jnp.cos(y)), (y, updates)

        return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, x)

    one_flat, one_zero = x.copy(), x.copy()
    one_flat[1], one_zero[1] = 3, 0
    for seen in (one_flat, one_zero, 0 * x, 0 * x + 3, 1e-12 * x, 1e4 * x):
        for leaf in jax.tree.leaves(run(variables["params"], seen)):
            assert np.isfinite(leaf).all()


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_a_sharded_batch_with_a_mask_equals_one_device(axis_type):
    x = images((8, 5, 4, 3))
    mask = mask_of(x)
    layer = LAYERS["conv"][0](**ON)
    variables = start(layer, x)
    step = jax.jit(lambda variables, x, mask: train(layer, variables, x, mask=mask))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(axis_type,))
    with jax.set_mesh(mesh):
        parts = [jax.device_put(a, NamedSharding(mesh, P("data"))) for a in (x, mask)]
        found = step(jax.device_put(variables, NamedSharding(mesh, P())), *parts)
        alone = jax.jit(lambda x, mask: ops.local_norm(x, mask, axes=(1, 2, 3)))
        assert alone(*parts).sharding.is_equivalent_to(parts[0].sharding, 4)
        program = str(alone.lower(*parts).compile().as_text())
        assert "all-" not in program  # no device asks another
    close(found, train(layer, variables, x, mask=mask))


def test_it_works_under_vmap_and_with_any_number_of_batch_axes():
    x = images((6, 5, 4, 3)).reshape(2, 3, 5, 4, 3)
    layer = LAYERS["conv"][0](**ON)
    variables = start(layer, x[0])
    mapped = jax.vmap(lambda x: train(layer, variables, x)[0])(x)
    close(mapped, np.stack([train(layer, variables, part)[0] for part in x]))
    together, _ = train(layer, variables, x)
    flat, _ = train(layer, variables, x.reshape(6, 5, 4, 3))
    np.testing.assert_array_equal(together.reshape(flat.shape), flat)
    alone = layer.apply(variables, x[0, 0], True)
    close(alone, layer.apply(variables, x[0], True)[0])


def test_converted_models_take_it_from_the_spec():
    x, spec = images(), WhiteningSpec(**ON)
    net: Any = nn.Sequential([nn.Conv(4, (3, 3)), nn.BatchNorm(True), nn.Dense(2)])
    model = netdeconv_jax.deconvolve(net, spec, dense=True)
    variables = model.init(jax.random.key(1), x)
    y, updates = model.apply(variables, x, mutable=["batch_stats"])
    inner = {name: tree["layers_0"] for name, tree in variables.items()}
    hidden, stats = train(DeconvConv(4, (3, 3), **ON), inner, x)
    inner = {name: tree["layers_2"] for name, tree in variables.items()}
    expected, _ = train(DeconvDense(2, **ON), inner, hidden)
    close(y, expected)
    close(updates["batch_stats"]["layers_0"], stats["batch_stats"])
    ours: Any = dnnx.deconvolve(nnx.Conv(3, 4, (3, 3), rngs=nnx.Rngs(0)), spec)
    twin = variables_of(ours)
    close(ours(x), train(DeconvConv(4, (3, 3), **ON), twin, x)[0])


def count(jaxpr, name):
    inner = (jaxpr for eqn in jaxpr.eqns for jaxpr in jaxprs_in_params(eqn.params))
    own = sum(eqn.primitive.name == name for eqn in jaxpr.eqns)
    return own + sum(count(jaxpr, name) for jaxpr in inner)


@pytest.mark.parametrize("name", LAYERS)
def test_it_is_off_unless_asked_for_and_one_normalization_where_it_is(name):
    make, shape = LAYERS[name]
    x = images(shape)
    variables = start(make(), x)
    for layer, expected in ((make(), 0), (make(spec=WhiteningSpec()), 0), (make(**ON), 1)):
        for evaluating in (True, False):
            program = jax.make_jaxpr(
                lambda x, layer=layer, e=evaluating: layer.apply(
                    variables, x, e, mutable=["batch_stats"]
                )
            )(x)
            assert count(program.jaxpr, "rsqrt") == expected
    assert WhiteningSpec().local_norm is None
    assert make(spec=WhiteningSpec(**ON)).resolved_spec().local_norm == "layer"
    assert WhiteningSpec(**ON).replace(local_norm=None) == WhiteningSpec()
