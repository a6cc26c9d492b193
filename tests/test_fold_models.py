"""A folded network of the zoo is the plain one: the same logits, and nothing left of the whitening."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import traverse_util
from jax.extend.core import jaxprs_in_params

from netdeconv_jax import DeconvConv, WhiteningSpec, models
from netdeconv_jax.interop import FoldedModel, fold

KERNELS_OF_WHITENING = {"cholesky", "eigh", "rsqrt", "sqrt", "while", "scan", "cond"}
# Padding, strides, groups, 1x1 kernels, gates, dense layers; one of them with other groups.
NARROW = {
    "cnn": {},
    "lenet": {"width": 0.5, "spec": WhiteningSpec(shared_whitener=False, block_size=16)},
    "resnet18": {"spec": WhiteningSpec(grouping="contiguous", block_size=16)},
    "mobilenetv2": {"width": 0.125},
    "senet18": {"norm": "channel"},
    "resnet18_imagenet": {"layout": "original"},
}
NORM_FIRST = ("preact_resnet", "senet", "densenet", "linear")


def images(size=32, dtype=jnp.float32):
    return 0.5 + jax.random.normal(jax.random.key(0), (4, size, size, 3), dtype)


def random_variables(model, x) -> Any:
    """Variables that no symmetry saves from a wrong index."""
    shapes, rng = jax.eval_shape(model.init, jax.random.key(0), x), np.random.default_rng(0)

    def leaf(path, like):
        kind, noise = path[-1].key, rng.normal(size=like.shape)
        if kind == "kernel":
            return noise / np.sqrt(np.prod(like.shape[:-1]))
        if kind == "whitener":
            return np.eye(like.shape[-1]) + noise / np.sqrt(like.shape[-1])
        return np.abs(noise) + 0.5 if kind in ("var", "scale") else noise / 2

    return jax.tree.map_with_path(
        lambda path, like: jnp.asarray(leaf(path, like), like.dtype), shapes
    )


def made_up(name, norm="deconv", width=0.0625, dtype=jnp.float32, **settings) -> Any:
    """A narrow network, its variables, and images."""
    model = models.create(name, norm, width=width, param_dtype=dtype, **settings)
    x = images(dtype=dtype)
    return model, random_variables(model, x), x


def trained(name, norm, size, layout) -> Any:
    """A narrow network, its variables after two steps of training, and images."""
    model, x = models.create(name, norm, width=0.0625, layout=layout), images(size)
    variables = jax.jit(model.init)(jax.random.key(1), x)

    @jax.jit
    def step(variables, key):
        def loss(params):
            logits, updates = model.apply(
                {**variables, "params": params},
                x,
                train=True,
                mutable=["batch_stats"],
                rngs={"dropout": key},
            )
            return jnp.mean(jnp.sin(3 * logits)), updates

        params = variables["params"]
        grads, updates = jax.grad(loss, has_aux=True)(params)
        return {"params": jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), **updates}

    for key in jax.random.split(jax.random.key(2)):
        variables = step(variables, key)
    return model, variables, x


def primitives(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn.primitive.name
        for inner in jaxprs_in_params(eqn.params):
            yield from primitives(inner)


def check_folded(model, variables, x, tolerance):
    plain, folded = fold(model, variables)
    assert plain.norm == "none"
    assert set(folded) == {"params"}
    shapes = jax.eval_shape(plain.init, jax.random.key(0), x)
    assert jax.tree.map(jnp.shape, folded) == jax.tree.map(jnp.shape, shapes)
    expected = jax.jit(model.apply)(variables, x)
    found = jax.jit(plain.apply)(folded, x)
    assert found.dtype == expected.dtype
    expected = np.asarray(expected)
    assert (
        np.ptp(expected, axis=0).max() > 1e-4 * np.abs(expected).max()
    )  # images make a difference
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * np.abs(expected).max())
    # Layer norms and the like there are none: what is left is what a plain network has.
    assert not KERNELS_OF_WHITENING & set(primitives(jax.make_jaxpr(plain.apply)(folded, x).jaxpr))


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n == "senet18" else ()) for n in NARROW]
)
def test_a_folded_network_gives_the_same_logits(name):
    check_folded(*made_up(name, **NARROW[name]), tolerance=1e-5)


EVERY = [
    (name, norm, layout)
    for name in models.list()
    for norm in ("deconv", "channel", "batch")
    for layout in ("full", "original")
    if not (norm == "batch" and name.startswith(NORM_FIRST))
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "norm", "layout"), EVERY)
def test_every_network_folds(name, norm, layout):
    size = 64 if "imagenet" in name else 32
    check_folded(*trained(name, norm, size, layout), tolerance=1e-5)


@pytest.mark.parametrize("name", ["lenet", pytest.param("efficientnet_b0", marks=pytest.mark.slow)])
def test_in_float64_folding_is_exact(x64, name):
    check_folded(*made_up(name, width=0.5, dtype=jnp.float64, layout="original"), tolerance=1e-10)


def test_a_folded_network_costs_what_a_plain_one_costs():
    model, variables, x = made_up("cnn", width=0.25)
    plain, folded = fold(model, variables)
    never = models.create("cnn", "none", width=0.25)
    fresh = jax.eval_shape(never.init, jax.random.key(0), x)
    flops: list[Any] = [
        jax.jit(net.apply).lower(given, x).cost_analysis()
        for net, given in ((plain, folded), (never, fresh), (model, variables))
    ]
    assert flops[0]["flops"] == flops[1]["flops"] < flops[2]["flops"]


def test_in_bfloat16_the_bias_is_of_the_rounded_kernel():
    model, variables, x = made_up("cnn", width=0.25)
    low = model.clone(dtype=jnp.bfloat16)
    plain, folded = fold(low, variables)
    kernel = folded["params"]["conv1"]["kernel"]
    assert kernel.dtype == jnp.float32
    np.testing.assert_array_equal(kernel, kernel.astype(jnp.bfloat16).astype(jnp.float32))
    expected = low.apply(variables, x)
    error = np.abs(plain.apply(folded, x) - expected)
    assert error.max() < 0.03 * np.abs(expected).max()
    assert np.abs(error.mean(0)).max() < 0.02 * np.abs(expected).max()


def test_numpy_arrays_and_boxed_parameters_are_folded_too():
    model, variables, _ = made_up("lenet")
    arrays = jax.tree.map(np.asarray, variables)
    boxed = {**arrays, "params": jax.tree.map(lambda a: nn.Partitioned(a, ()), arrays["params"])}
    _, expected = fold(model, variables)
    for given in (arrays, boxed):
        jax.tree.map(np.testing.assert_array_equal, fold(model, given)[1], expected)


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("preact_resnet18", "original"),
        pytest.param("senet18", "full", marks=pytest.mark.slow),
        pytest.param("densenet121", "full", marks=pytest.mark.slow),
    ],
)
def test_a_batch_norm_before_its_convolution_stays_as_scale_and_bias(name, layout):
    model, variables, x = made_up(name, "batch", layout=layout)
    plain, folded = fold(model, variables)
    assert isinstance(plain, FoldedModel)
    assert set(folded) == {"params"}
    leaves: Any = traverse_util.flatten_dict(folded["params"])
    norms = [path for path in leaves if path[-1] == "scale"]
    assert norms
    assert all((*path[:-1], "bias") in leaves for path in norms)
    expected = jax.jit(model.apply)(variables, x)
    found = jax.jit(plain.apply)(folded, x)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    assert not KERNELS_OF_WHITENING & set(primitives(jax.make_jaxpr(plain.apply)(folded, x).jaxpr))


@pytest.mark.parametrize(
    ("name", "layout"),
    [("lenet", "full"), pytest.param("efficientnet_b0", "original", marks=pytest.mark.slow)],
)
def test_samples_that_are_normalized_still_are_in_a_folded_network(name, layout):
    spec = WhiteningSpec(local_norm="layer")
    model, variables, x = made_up(name, layout=layout, width=0.25, spec=spec)
    plain, folded = fold(model, variables)
    assert isinstance(plain, FoldedModel)
    assert set(folded) == {"params"}
    expected = jax.jit(model.apply)(variables, x)
    found = jax.jit(plain.apply)(folded, x)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    left = KERNELS_OF_WHITENING & set(primitives(jax.make_jaxpr(plain.apply)(folded, x).jaxpr))
    assert left == {"rsqrt"}
    batch, _ = fold(*made_up(name, "batch", spec=spec)[:2])  # in which nothing whitens
    assert batch.norm == "none"


def test_missing_statistics_and_left_over_parameters_are_refused():
    model, variables, _ = made_up("lenet")
    with pytest.raises(ValueError, match="no `batch_stats` of the layer 'conv1'"):
        fold(model, {"params": variables["params"]})
    more = {**variables, "params": {**variables["params"], "extra": {"kernel": jnp.ones(3)}}}
    with pytest.raises(ValueError, match="'extra/kernel' is left over"):
        fold(model, more)


# Networks that users write


def close(found, expected, tolerance=1e-5):
    expected = np.asarray(expected, np.float32)
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * np.abs(expected).max())


class TwoReaders(models.Network):
    """Two norms, or a norm and a layer, that read one convolution."""

    second: str = "norm"

    @nn.compact
    def __call__(self, x, train=False, update_whitener=True):
        units = self.units(x, train, update_whitener)
        y = units.conv(4, 3, name="conv1")(x)
        other = (
            units.norm(name="norm2") if self.second == "norm" else units.conv(4, 3, name="conv2")
        )
        y = nn.relu(units.norm(name="norm1")(y)) + jnp.tanh(other(y))
        return units.classifier(3, name="head")(y.mean((1, 2)))


@pytest.mark.parametrize("second", ["norm", "layer"])
def test_a_norm_that_does_not_read_alone_is_not_folded_into_the_convolution(second):
    model, x = (
        TwoReaders(norm="batch", second=second),
        jax.random.normal(jax.random.key(0), (4, 6, 6, 3)),
    )
    variables = random_variables(model, x)
    plain, folded = fold(model, variables)
    assert isinstance(plain, FoldedModel)
    close(plain.apply(folded, x), model.apply(variables, x))


class Named(models.Network):
    """Layers that are named after their class, of which the user's may always whiten."""

    own: Any = None

    @nn.compact
    def __call__(self, x, train=False, update_whitener=True):
        units = self.units(x, train, update_whitener)
        x = nn.relu(units.norm()(units.conv(4, 3, use_bias=False)(x)))
        if self.own:
            x = self.own(4, (3, 3), use_running_average=not train, name="own")(x)
            x = units.norm()(units.conv(4, 3, name="last")(x))
        return units.classifier(3)(x.mean((1, 2)))


@pytest.mark.parametrize("norm", ["deconv", "batch"])
@pytest.mark.parametrize("own", [None, DeconvConv])
def test_a_network_whose_twin_has_other_layers_folds_as_any_module(norm, own):
    model, x = Named(norm=norm, own=own), jax.random.normal(jax.random.key(0), (4, 6, 6, 3))
    variables = random_variables(model, x)
    plain, folded = fold(model, variables)
    assert set(folded) == {"params"}
    assert isinstance(plain, FoldedModel)
    close(plain.apply(folded, x), model.apply(variables, x))


def test_a_network_of_the_zoo_is_compared_where_there_is_an_input():
    class Odd(models.Network):
        @nn.compact
        def __call__(self, x, train=False, update_whitener=True):
            units = self.units(x, train, update_whitener)
            y = units.conv(4, 1, name="conv")(x).mean((1, 2))
            return y if self.norm != "none" else 2 * y

    model, x = Odd(), jnp.ones((2, 4, 4, 3))
    variables = random_variables(model, x)
    with pytest.raises(ValueError, match="something else after folding"):
        fold(model, variables, x)


@pytest.mark.parametrize("norm", ["deconv", "batch"])
def test_networks_of_half_parameters_keep_the_precision_of_their_images(norm):
    model = models.create("lenet", norm, param_dtype=jnp.bfloat16, width=0.25)
    x = 1 + jax.random.normal(jax.random.key(0), (4, 28, 28, 1))
    variables = random_variables(model, x)
    plain, folded = fold(model, variables)
    assert plain.norm == "none"
    close(plain.apply(folded, x), model.apply(variables, x))


class Standardized(nn.Conv):
    def __call__(self, inputs):
        return 2 * super().__call__(inputs)


def test_a_norm_behind_an_heir_that_does_something_else_stays():
    class Own(models.Network):
        @nn.compact
        def __call__(self, x, train=False, update_whitener=True):
            units = self.units(x, train, update_whitener)
            x = Standardized(4, (3, 3), use_bias=False, name="conv")(x)
            return units.norm(name="norm")(x).mean((1, 2))

    model, x = Own(norm="batch"), jax.random.normal(jax.random.key(0), (4, 6, 6, 3))
    variables = random_variables(model, x)
    plain, folded = fold(model, variables)
    close(plain.apply(folded, x), model.apply(variables, x))
