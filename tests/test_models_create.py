"""Building networks by name: what is there, what is refused, and how parameters start."""

import math
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from netdeconv_jax import WhiteningSpec, models
from netdeconv_jax.models import initializers
from netdeconv_jax.models.pooling import AvgPool, MaxPool, adaptive_average
from netdeconv_jax.models.registry import info
from netdeconv_jax.models.summary import layer_table
from netdeconv_jax.models.units import NORMS
from netdeconv_jax.whitening import Contiguous, Eigh

NAMES = list(models.list())


def shapes(model, size, channels=3):
    x = jax.ShapeDtypeStruct((2, size, size, channels), jnp.float32)
    return jax.eval_shape(model.init, jax.random.key(0), x)


@pytest.mark.parametrize("name", NAMES)
def test_listed_parameters_are_those_of_the_deconv_form(name):
    params = shapes(models.create(name), info(name).size)["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == info(name).parameters


def test_the_list_prints_a_line_for_every_network():
    lines = str(models.list()).splitlines()
    assert len(lines) == len(NAMES) == 29
    assert all(line.startswith(name) for line, name in zip(lines, NAMES, strict=True))


def test_the_list_is_a_copy():
    models.list().clear()
    assert "resnet18" in models.list()


@pytest.mark.parametrize(
    ("wrong", "right"),
    [("resnet-18", "resnet18"), ("VGG16", "vgg16"), ("densnet121", "densenet121")],
)
def test_a_wrong_name_suggests_the_nearest(wrong, right):
    with pytest.raises(ValueError, match=f"`name` .*{wrong}.* did you mean .*'{right}'"):
        models.create(wrong)


def test_a_name_like_no_other_lists_all():
    with pytest.raises(ValueError, match=r"known are .*'dpn92'"):
        models.create("????")


@pytest.mark.parametrize(
    ("error", "settings", "message"),
    [
        (ValueError, {"norm": "layer"}, "`norm` must be one of .*'layer'"),
        (ValueError, {"layout": "mine"}, "`layout` must be one of .*'mine'"),
        (ValueError, {"num_classes": 0}, "`num_classes` must be at least 1, got 0"),
        (TypeError, {"num_classes": "a"}, "`num_classes` must be an int, got 'a'"),
        (ValueError, {"width": -1.0}, "`width` must be greater than 0, got -1.0"),
        (ValueError, {"width": math.inf}, "`width` must be finite, got inf"),
        (TypeError, {"width": "a"}, "`width` must be a number, got 'a'"),
        (TypeError, {"spec": "fast"}, "`spec` must be a WhiteningSpec, got 'fast'"),
        (TypeError, {"spec": ""}, "`spec` must be a WhiteningSpec, got ''"),
        (TypeError, {"dtype": int}, "`dtype` must be a floating point dtype, got .*int"),
        (TypeError, {"dtype": "foo"}, "`dtype` must be a floating point dtype, got 'foo'"),
        (TypeError, {"param_dtype": "int32"}, "`param_dtype` must be a .* dtype, got 'int32'"),
    ],
)
def test_a_wrong_setting_is_named(error, settings, message):
    with pytest.raises(error, match=message):
        models.create("lenet", **settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"num_classes": np.int64(3), "width": np.float32(0.5)},
        {"dtype": "bfloat16", "param_dtype": jnp.bfloat16},
        {"dtype": np.dtype("float16"), "param_dtype": float},
    ],
)
def test_settings_may_be_numpys_and_dtypes_names(settings):
    model = models.create("lenet", **settings)
    assert {name: getattr(model, name) for name in settings} == settings


@pytest.mark.parametrize("name", [n for n in NAMES if models.create(n).minimum_size is not None])
def test_the_smallest_size_works_and_a_smaller_one_is_refused_with_it(name, monkeypatch):
    model = models.create(name, "none")
    least = model.minimum_size
    assert least is not None
    assert min(min(row.out_shape) for row in layer_table(model, (1, least, least, 3))) == 1
    if least == 1:
        return
    with pytest.raises(ValueError, match=f"smallest that works is {least}x{least}"):
        shapes(model, least - 1)
    monkeypatch.setattr(type(model), "minimum_size", 1)
    assert loses_everything(model, least - 1)


def loses_everything(model, size):
    try:
        rows = layer_table(model, (1, size, size, 3))
    except ZeroDivisionError:  # a dense layer cannot scale its start by no inputs
        return True
    return min(min(row.out_shape) for row in rows) == 0


def test_an_image_without_a_batch_is_refused():
    with pytest.raises(ValueError, match=r"`x` must be \[batch, height, width, channels\]"):
        models.create("resnet18").init(jax.random.key(0), jnp.ones((32, 32, 3)))


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("name", ["vgg11", "resnet18", "mobilenetv2", "resnext29_32x4d"])
def test_any_number_of_input_channels_will_do(name, channels):
    shapes(models.create(name), 32, channels)


@pytest.mark.parametrize("shape", [(2, 784), (2, 28, 28, 1), (2, 5)])
@pytest.mark.parametrize("name", ["linear", "mlp"])
def test_dense_networks_take_any_shape(name, shape):
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    jax.eval_shape(models.create(name).init, jax.random.key(0), x)


def table(name, *args, **settings):
    return layer_table(
        models.create(name, *args, **settings), (1, info(name).size, info(name).size, 3)
    )


def test_the_users_spec_holds_where_the_network_does_not_say_otherwise():
    rows = table("resnext29_32x4d", spec=WhiteningSpec(block_size=16, num_iters=4, eps=1e-3))
    specs: dict[str, Any] = {row.path[-1]: row.spec for row in rows[1:]}
    stem: Any = rows[0].spec
    assert specs["conv3"] == WhiteningSpec(block_size=16, num_iters=4, eps=1e-3)
    assert specs["conv2"].root.num_iters == 3
    assert specs["linear"].grouping.block_size == 512
    assert stem.root.num_iters == 10
    assert stem.freeze is not None


def test_other_roots_and_groupings_reach_every_layer():
    spec = WhiteningSpec(root=Eigh(1e-3), grouping=Contiguous(32))
    specs = [row.spec for row in table("mobilenetv2", spec=spec) if row.spec is not None]
    assert {spec.root for spec in specs} == {Eigh(1e-3)}
    assert {spec.grouping.kind for spec in specs} == {"contiguous"}


def test_channel_whitens_channels_where_deconv_whitens_patches():
    kinds = {norm: table("resnet18", norm) for norm in ("channel", "deconv")}
    for channel, deconv in zip(kinds["channel"], kinds["deconv"], strict=True):
        assert deconv.spec is not None
        assert channel.spec == deconv.spec.replace(whiten="channels")


@pytest.mark.parametrize("name", ["efficientnet_b0", "resnet18_imagenet", "vgg11_imagenet"])
def test_the_full_layout_whitens_every_layer(name):
    kinds = {row.kind for row in table(name, "deconv")}
    assert kinds <= {"deconv_conv", "deconv_dense", "max_pool", "avg_pool"}


def test_the_full_layout_gives_imagenet_vgg_its_batch_norm():
    kinds = [row.kind for row in table("vgg11_imagenet", "batch")]
    assert kinds.count("batch_norm") == 8
    original = table("vgg11_imagenet", "batch", layout="original")
    assert "batch_norm" not in {row.kind for row in original}


# How parameters start: fan_in and fan_out of large layers against the second moment and the largest value.


def uniform(fan_in, fan_out):
    return 1 / (3 * fan_in), 1 / math.sqrt(fan_in)


def normal_fan_out(fan_in, fan_out):
    return 2 / fan_out, None


def normal_fan_in(fan_in, fan_out):
    return 2 / fan_in, None


def zeros(fan_in, fan_out):
    return 0, 0


@pytest.mark.parametrize(
    ("name", "norm", "layer", "kernel_law", "bias_law"),
    [
        ("resnet18", "deconv", "conv1", uniform, uniform),
        ("resnet18", "deconv", "linear", uniform, uniform),
        ("resnet18", "batch", "conv1", uniform, None),
        ("resnet18", "batch", "linear", uniform, uniform),
        ("resnet18", "none", "conv1", uniform, uniform),
        ("vgg11", "batch", "conv2", uniform, uniform),
        ("resnet18_imagenet", "deconv", "conv1", normal_fan_out, uniform),
        ("resnet18_imagenet", "batch", "conv1", normal_fan_out, None),
        ("resnet18_imagenet", "batch", "fc", uniform, uniform),
        ("vgg11_imagenet", "deconv", "conv3", normal_fan_out, zeros),
        ("vgg11_imagenet", "batch", "conv3", normal_fan_out, zeros),
        ("vgg11_imagenet", "deconv", "fc3", uniform, uniform),
        ("vgg11_imagenet", "batch", "fc3", lambda *_: (1e-4, None), zeros),
        ("densenet121_imagenet", "batch", "conv1", normal_fan_in, None),
        ("densenet121_imagenet", "batch", "classifier", uniform, zeros),
        ("densenet121_imagenet", "deconv", "conv1", uniform, uniform),
    ],
)
def test_layers_start_as_the_originals(name, norm, layer, kernel_law, bias_law):
    model = models.create(name, norm, num_classes=100)
    kernel_shape = shapes(model, 32)["params"][layer]["kernel"].shape
    fan_in = math.prod(kernel_shape[:-1])
    fan_out = math.prod(kernel_shape[:-2]) * kernel_shape[-1]
    kinds = model.initializers
    kind = ("deconv_dense", "dense") if len(kernel_shape) == 2 else ("deconv", "conv")
    init = getattr(kinds, kind[norm not in ("deconv", "channel")])
    check(init.kernel(jax.random.key(0), kernel_shape), kernel_law(fan_in, fan_out))
    bias = shapes(model, 32)["params"][layer].get("bias")
    assert (bias is None) == (bias_law is None)
    if bias_law is not None:
        values = init.bias(fan_in)(jax.random.key(1), (4096,), jnp.float32)
        check(values, bias_law(fan_in, fan_out))


def check(values, law):
    second_moment, largest = law
    values = np.asarray(values, np.float64)
    spread = 6 * math.sqrt(2 / values.size)
    assert values.mean() ** 2 <= 36 * second_moment / values.size
    np.testing.assert_allclose((values**2).mean(), second_moment, rtol=spread)
    if largest is not None:
        assert np.abs(values).max() <= largest


def test_a_whole_network_starts_with_these():
    model = models.create("lenet", "deconv", width=8.0)
    params = model.init(jax.random.key(0), jnp.ones((1, 16, 16, 3)))["params"]
    fan_in = 48 * 25
    check(params["conv2"]["kernel"], uniform(fan_in, 0))
    check(params["conv2"]["bias"], uniform(fan_in, 0))


def test_batch_norm_starts_at_one_and_zero():
    variables = models.create("lenet", "batch").init(jax.random.key(0), jnp.ones((1, 8, 8, 3)))
    np.testing.assert_array_equal(variables["params"]["bn1"]["scale"], 1)
    np.testing.assert_array_equal(variables["params"]["bn1"]["bias"], 0)


def test_zero_bias_is_zero():
    assert not initializers.zero_bias(3)(jax.random.key(0), (5,)).any()


@pytest.mark.parametrize(("window", "size"), [(2, (6, 8)), (2, (7, 6)), (3, (7, 8)), (3, (3, 3))])
def test_pools_that_tile_equal_those_that_slide(window, size):
    x = jax.random.normal(jax.random.key(0), (2, *size, 3))

    def squares(pool):
        return jax.value_and_grad(lambda x: (pool(x) ** 2).sum())(x)

    tiled = squares(lambda x: MaxPool(window).apply({}, x))
    sliding = squares(lambda x: nn.max_pool(x, (window,) * 2, (window,) * 2))
    jax.tree.map(np.testing.assert_array_equal, tiled, sliding)


def test_equal_largest_values_share_the_gradient_of_a_pool_that_tiles():
    x = jnp.array([1.0, 1.0, 0.0, 1.0]).reshape(1, 2, 2, 1)
    grad = jax.grad(lambda x: jnp.sum(cast(Any, MaxPool(2).apply({}, x))))(x)
    np.testing.assert_allclose(grad.ravel(), [1 / 3, 1 / 3, 0, 1 / 3], rtol=1e-6)


def test_pools_have_the_shape_of_their_windows():
    x = jnp.ones((2, 6, 6, 3))
    sliding: Any = MaxPool(3, 2, 1).apply({}, x)
    averaged: Any = AvgPool(4).apply({}, x)
    assert sliding.shape == (2, 3, 3, 3)
    assert averaged.shape == (2, 1, 1, 3)


@pytest.mark.parametrize(("count", "size"), [(2, 7), (7, 7), (5, 3), (8, 2)])
def test_adaptive_averages_are_means_of_their_windows(count, size):
    x = np.random.default_rng(0).standard_normal((1, count, count, 2))
    y = adaptive_average(jnp.asarray(x, jnp.float32), size)
    edges = [(i * count // size, -(-(i + 1) * count // size)) for i in range(size)]
    expected = [[x[0, a:b, c:d].mean((0, 1)) for c, d in edges] for a, b in edges]
    np.testing.assert_allclose(y[0], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("norm", NORMS)
def test_costs_add_up(norm):
    rows = table("resnet18", norm)
    assert sum(row.multiply_adds for row in rows) == 555_422_720
    whitens = norm in ("deconv", "channel")
    assert (sum(row.covariance + row.root + row.fold for row in rows) > 0) == whitens
