"""The convolution with a fast gradient for its kernel: values and derivatives are those of `lax`."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax import lax
from jax.extend.core import jaxprs_in_params
from jax.sharding import AxisType

from netdeconv_jax import DeconvConv, models, ops

CHANNELS_LAST = {
    2: ("NHWC", "HWIO", "NHWC"),
    1: ("NWC", "WIO", "NWC"),
    3: ("NDHWC", "DHWIO", "NDHWC"),
}
# Image without its batch, kernel, and how to convolve.
CASES = {
    "3x3": ((5, 6, 3), (3, 3, 3, 4), {}),
    "3x3, stride 2": ((6, 5, 3), (3, 3, 3, 4), {"window_strides": (2, 2)}),
    "padded": ((5, 6, 3), (3, 3, 3, 4), {"padding": ((2, 0), (1, 3))}),
    "dilated": ((7, 6, 3), (3, 2, 3, 4), {"rhs_dilation": (2, 1), "lhs_dilation": (1, 2)}),
    "1x1": ((5, 6, 3), (1, 1, 3, 4), {}),
    "1x1, stride 2": ((5, 6, 3), (1, 1, 3, 4), {"window_strides": (2, 3)}),
    "1x1, no padding": ((5, 6, 3), (1, 1, 3, 4), {"padding": ((0, 0), (0, 0))}),
    "1x1, padded": ((5, 6, 3), (1, 1, 3, 4), {"padding": ((1, 1), (0, 2))}),
    "1x1, dilated": (
        (4, 3, 3),
        (1, 1, 3, 4),
        {"lhs_dilation": (2, 1), "padding": ((0, 0), (0, 0))},
    ),
    "one axis": ((9, 3), (3, 3, 4), {}),
    "1, one axis": ((9, 3), (1, 3, 4), {"window_strides": (2,)}),
    "three axes": ((4, 3, 5, 2), (2, 3, 1, 2, 3), {}),
    "channels first": ((3, 5, 6), (4, 3, 3, 3), {"dimension_numbers": ("NCHW", "OIHW", "NCHW")}),
    "1x1, channels first": (
        (3, 5, 6),
        (4, 3, 1, 1),
        {"dimension_numbers": ("NCHW", "OIHW", "NCHW")},
    ),
}
DEPTHWISE = {
    "depthwise": ((5, 6, 3), (3, 3, 1, 3), {}),
    "depthwise, stride 2": ((6, 5, 3), (3, 3, 1, 3), {"window_strides": (2, 2)}),
    "depthwise, two kernels a channel": ((5, 6, 3), (3, 2, 1, 6), {"window_strides": (1, 2)}),
    "depthwise, padded": ((5, 6, 3), (3, 3, 1, 3), {"padding": ((2, 0), (1, 3))}),
    "depthwise, cropped": ((5, 6, 3), (3, 3, 1, 3), {"padding": ((-1, 2), (0, -1))}),
    "depthwise, no padding": ((5, 6, 3), (3, 3, 1, 3), {"padding": "VALID"}),
    "depthwise, dilated": (
        (7, 6, 3),
        (3, 2, 1, 3),
        {"rhs_dilation": (2, 1), "lhs_dilation": (1, 2), "window_strides": (2, 3)},
    ),
    "depthwise, 1x1": ((5, 6, 3), (1, 1, 1, 3), {"window_strides": (3, 2)}),
    "depthwise, one axis": ((9, 3), (4, 1, 3), {}),
    "depthwise, one tap": ((5, 3), (1, 1, 3), {}),
    "depthwise, three axes": ((4, 3, 5, 2), (2, 3, 1, 1, 4), {}),
}
CASES |= {
    name: (image, kernel, given | {"feature_group_count": image[-1]})
    for name, (image, kernel, given) in DEPTHWISE.items()
}
GROUPED = {
    "two groups": (2, (5, 6, 4), (3, 3, 2, 6), {}),
    "two groups, stride 2": (2, (6, 5, 4), (3, 3, 2, 4), {"window_strides": (2, 2)}),
    "seven groups, of which one is left over": (7, (5, 4, 14), (3, 3, 2, 7), {}),
    "eight groups, padded": (8, (5, 4, 16), (3, 2, 2, 16), {"padding": ((2, 0), (1, 3))}),
    "eight groups, 1x1": (8, (5, 4, 16), (1, 1, 2, 8), {}),
    "two groups, dilated": (
        2,
        (7, 6, 4),
        (3, 2, 2, 4),
        {"rhs_dilation": (2, 1), "lhs_dilation": (1, 2), "window_strides": (2, 3)},
    ),
    "two groups, one axis": (2, (9, 4), (3, 2, 4), {}),
    "depthwise, of 100 taps": (3, (12, 11, 3), (10, 10, 1, 3), {}),
    "depthwise, three kernels a channel": (3, (5, 6, 3), (3, 3, 1, 9), {}),
}
CASES |= {
    name: (image, kernel, given | {"feature_group_count": groups})
    for name, (groups, image, kernel, given) in GROUPED.items()
}


@pytest.fixture
def one_cpu(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)


def case(name, batch=70):
    image, kernel, given = CASES[name]
    axes = len(image) - 1
    keywords = {
        "window_strides": (1,) * axes,
        "padding": "SAME",
        "dimension_numbers": CHANNELS_LAST[axes],
    } | given
    if "lhs_dilation" in keywords and keywords["padding"] == "SAME":
        keywords["padding"] = ((1, 1),) * axes
    rng = np.random.default_rng(0)
    return (
        jnp.asarray(rng.normal(size=(batch, *image))),
        jnp.asarray(rng.normal(size=kernel)),
        keywords,
    )


def primitives(function, *args):
    def found(jaxpr):
        for eqn in jaxpr.eqns:
            yield eqn.primitive.name
            for inner in jaxprs_in_params(eqn.params):
                yield from found(inner)

    return list(found(jax.make_jaxpr(function)(*args).jaxpr))


@pytest.mark.parametrize("name", CASES)
def test_value_and_derivatives_are_those_of_lax(name, x64, one_cpu):
    x, kernel, keywords = case(name)
    assert "custom_jvp_call" in primitives(
        lambda x, k: ops.convolution(x, k, **keywords), x, kernel
    )

    def figures(convolution):
        def value(x, kernel):
            return jnp.sin(convolution(x, kernel, **keywords)).sum()

        gradients = jax.grad(value, argnums=(0, 1))(x, kernel)
        curvature = None
        if name in ("3x3", "1x1", "depthwise, two kernels a channel"):
            curvature = jax.grad(
                lambda x, k: sum((g**2).sum() for g in jax.grad(value, argnums=(0, 1))(x, k)),
                argnums=(0, 1),
            )(x, kernel)
        tangent = jax.jvp(
            lambda x, k: convolution(x, k, **keywords), (x, kernel), (jnp.cos(x), jnp.cos(kernel))
        )
        return convolution(x, kernel, **keywords), gradients, curvature, tangent

    ours, expected = figures(ops.convolution), figures(lax.conv_general_dilated)
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-10, atol=1e-9)


@pytest.mark.parametrize(("batch", "parts"), [(64, 2), (70, 3), (128, 4), (300, 4)])
def test_the_gradient_of_the_kernel_is_taken_in_parts_of_the_batch(batch, parts, one_cpu):
    x, kernel, keywords = case("3x3", batch)

    def value(x, kernel):
        return ops.convolution(x, kernel, **keywords).sum()

    def convolutions(function):
        return primitives(function, x, kernel).count("conv_general_dilated")

    assert convolutions(value) == 1
    assert (
        convolutions(jax.grad(value, argnums=1)) == 1 + parts
    )  # nothing for an input that is data
    assert convolutions(jax.grad(value, argnums=0)) == 2
    assert convolutions(jax.grad(value, argnums=(0, 1))) == 2 + parts


def test_that_of_a_kernel_of_one_pixel_is_a_product_of_matrices(one_cpu):
    for name, product in (("1x1", True), ("1x1, stride 2", True), ("1x1, padded", False)):
        x, kernel, keywords = case(name)

        def value(kernel, x=x, keywords=keywords):
            return ops.convolution(x, kernel, **keywords).sum()

        found = primitives(jax.grad(value), kernel)
        assert found.count("dot_general") == product
        assert found.count("conv_general_dilated") == (1 if product else 1 + 3)


def test_a_depthwise_one_is_a_sum_over_taps_of_any_batch(one_cpu):
    x, kernel, keywords = case("depthwise", 2)

    def value(x, kernel):
        return jnp.sin(ops.convolution(x, kernel, **keywords)).sum()

    assert "conv_general_dilated" not in primitives(value, x, kernel)
    assert "conv_general_dilated" not in primitives(jax.grad(value, (0, 1)), x, kernel)


def test_a_grouped_one_is_a_few_dense_ones_of_any_batch(one_cpu):
    for name, blocks in (("two groups", 2), ("seven groups, of which one is left over", 4)):
        x, kernel, keywords = case(name, 2)

        def value(x, kernel, keywords=keywords):
            return ops.convolution(x, kernel, **keywords).sum()

        for function, times in ((value, 1), (jax.grad(value, (0, 1)), 3)):
            jaxpr = jax.make_jaxpr(function)(x, kernel)
            groups = [params["feature_group_count"] for params in convolved(jaxpr.jaxpr)]
            assert groups == [1] * blocks * times


@pytest.mark.parametrize("name", ["eight groups, padded", "depthwise, three kernels a channel"])
def test_the_value_and_gradients_of_a_small_batch_are_those_of_lax_too(name, x64, one_cpu):
    x, kernel, keywords = case(name, 3)

    def figures(convolution):
        def value(x, kernel):
            return jnp.sin(convolution(x, kernel, **keywords)).sum()

        return convolution(x, kernel, **keywords), *jax.grad(value, (0, 1))(x, kernel)

    for one, other in zip(figures(ops.convolution), figures(lax.conv_general_dilated), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-10, atol=1e-10)


def test_what_is_not_finite_spreads_no_further_than_to_the_groups_of_its_block(one_cpu):
    x, kernel, keywords = case("eight groups, 1x1", 2)  # of two channels; two groups a block
    y = ops.convolution(x.at[0, 0, 0, 0].set(jnp.inf), kernel, **keywords)
    lost = ~np.isfinite(y)
    assert lost[0, 0, 0].tolist() == [True] * 2 + [False] * 6
    assert lost.sum() == 2


def convolved(jaxpr):
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "conv_general_dilated":
            yield eqn.params
        for inner in jaxprs_in_params(eqn.params):
            yield from convolved(inner)


@pytest.mark.parametrize(
    ("layers", "strides", "kernels", "most"), [(1, 1, 1, 6), (1, 2, 2, 8), (3, 1, 1, 16)]
)
def test_the_gradient_of_depthwise_ones_holds_few_images_and_not_one_a_tap(
    layers, strides, kernels, most, one_cpu
):
    x, kernel = jnp.ones((8, 32, 32, 16)), jnp.ones((5, 5, 1, 16 * kernels))

    def value(x, kernel):
        for _ in range(layers):
            x = ops.convolution(
                x,
                kernel,
                (strides, strides),
                "SAME",
                dimension_numbers=CHANNELS_LAST[2],
                feature_group_count=16,
            )
            x = jax.nn.relu(x)
        return (x**2).sum()

    program = jax.jit(jax.grad(value, (0, 1))).lower(x, kernel).compile()
    memory = program.memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < most * x.nbytes


@pytest.mark.parametrize("gradient", [False, True])
def test_a_chain_of_depthwise_ones_computes_each_once(gradient, one_cpu):
    def flops(layers):
        def value(x, kernel):
            for _ in range(layers):
                y = ops.convolution(
                    x,
                    kernel,
                    (1, 1),
                    "SAME",
                    dimension_numbers=CHANNELS_LAST[2],
                    feature_group_count=8,
                )
                x = jax.nn.relu(x + y)
            return x.sum()

        function = jax.grad(value, (0, 1)) if gradient else value
        x, kernel = jnp.ones((2, 16, 16, 8)), jnp.ones((3, 3, 1, 8))
        costs = jax.jit(function).lower(x, kernel).compile().cost_analysis()
        assert costs is not None
        return costs["flops"]

    # Fused, the sixth computes the five before it, and that in each of its uses.
    assert flops(6) < 9 * flops(1)


def test_the_eager_gradient_of_a_depthwise_one_compiles_once(one_cpu):
    x, kernel, keywords = case("depthwise", 2)

    def value(x, kernel):
        return jnp.sin(ops.convolution(x, kernel, **keywords)).sum()

    lowered = []

    def note(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == "/jax/core/compile/jaxpr_to_mlir_module_duration":
            lowered.append(event)

    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        jax.grad(value, (0, 1))(x, kernel)
        assert lowered
        lowered.clear()
        jax.grad(value, (0, 1))(x, kernel)
        assert not lowered
    finally:
        jax.monitoring.unregister_event_duration_listener(note)


@pytest.mark.parametrize(
    "name", ["depthwise, stride 2", "depthwise, two kernels a channel", "two groups", "3x3"]
)
def test_over_a_mapped_axis_whose_values_are_checked(name, one_cpu):
    x, kernel, keywords = case(name, 64)
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))

    def gradients(convolution):
        def value(x, kernel):
            return jnp.sin(convolution(x, kernel, **keywords)).sum()

        def step(x, kernel):
            _, tangent = jax.jvp(value, (x, kernel), (x, kernel))
            return *jax.grad(value, (0, 1))(x, kernel), lax.psum(tangent, "data")

        specs = jax.P("data"), jax.P()
        run = jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=(*specs, jax.P()))
        return jax.jit(run)(x, kernel)

    ours, expected = gradients(ops.convolution), gradients(lax.conv_general_dilated)
    for one, other in zip(ours, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("policy", ["nothing_saveable", "dots_saveable"])
def test_a_depthwise_one_under_vmap_and_checkpoint(policy, x64, one_cpu):
    x, kernel, keywords = case("depthwise, stride 2", 3)
    xs, kernels = jnp.stack([x, x + 1]), jnp.stack([kernel, kernel - 1])

    def gradients(convolution):
        def value(x, kernel):
            return jnp.sin(convolution(jnp.sin(x), kernel, **keywords)).sum()

        kept = jax.checkpoint(value, policy=getattr(jax.checkpoint_policies, policy))
        return jax.jit(jax.vmap(jax.grad(kept, (0, 1))))(xs, kernels)

    for one, other in zip(
        gradients(ops.convolution), gradients(lax.conv_general_dilated), strict=True
    ):
        np.testing.assert_allclose(one, other, rtol=1e-10, atol=1e-10)


def test_what_does_not_go_together_is_refused_as_lax_does(one_cpu):
    x, kernel, keywords = case("depthwise", 2)
    with pytest.raises(ValueError, match="feature_group_count"):
        ops.convolution(x, kernel[..., :2], **keywords)
    for name in ("two groups", "eight groups, 1x1"):
        grouped, wrong, given = case(name, 2)
        with pytest.raises(ValueError, match="feature_group_count"):
            ops.convolution(grouped, wrong[..., :1], **given)
        with pytest.raises(ValueError, match="feature_group_count"):
            ops.convolution(grouped[..., :2], wrong, **given)
    with pytest.raises(ValueError, match="padding"):
        ops.convolution(x, kernel, **keywords | {"padding": 1})
    with pytest.raises(RuntimeError, match="Unrecognized padding"):
        ops.convolution(x, kernel, **keywords | {"padding": "NONE"})


def test_under_jit_and_vmap(x64, one_cpu):
    x, kernel, keywords = case("3x3", 64)
    xs, kernels = jnp.stack([x, x + 1]), jnp.stack([kernel, kernel - 1])

    def gradients(convolution):
        def value(x, kernel):
            return jnp.sin(convolution(x, kernel, **keywords)).sum()

        return jax.jit(jax.vmap(jax.grad(value, argnums=(0, 1))))(xs, kernels)

    for one, other in zip(
        gradients(ops.convolution), gradients(lax.conv_general_dilated), strict=True
    ):
        np.testing.assert_allclose(one, other, rtol=1e-10, atol=1e-10)


def test_a_policy_that_saves_products_saves_convolutions(one_cpu):
    x, kernel, keywords = case("3x3", 64)

    def value(kernel):
        return jnp.sin(ops.convolution(jnp.sin(x * kernel.sum()), kernel, **keywords)).sum()

    def convolutions(policy):
        kept = jax.checkpoint(value, policy=policy)
        return primitives(jax.grad(kept), kernel).count("conv_general_dilated")

    policies = jax.checkpoint_policies
    saved = convolutions(policies.dots_saveable)
    assert saved == convolutions(policies.everything_saveable)
    assert saved < convolutions(policies.nothing_saveable)


@pytest.mark.parametrize("give_sharding", [False, True])
def test_layers_of_nnx_take_it(give_sharding, x64, one_cpu):
    x, _, _ = case("3x3", 64)

    def step(**operation):
        layer = nnx.Conv(3, 4, (3, 3), rngs=nnx.Rngs(0), param_dtype=float, **operation)
        sharding = {"out_sharding": None} if give_sharding else {}
        return nnx.grad(lambda layer: jnp.sin(layer(x, **sharding)).sum())(layer)

    ours, expected = step(conv_general_dilated=ops.convolution), step()
    np.testing.assert_allclose(ours.kernel[...], expected.kernel[...], rtol=1e-9)


def test_a_preferred_type_is_that_of_the_result(x64, one_cpu):
    for name in ("3x3", "1x1", "depthwise", "two groups"):
        x, kernel, keywords = case(name)
        x, kernel = x.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16)
        y = ops.convolution(x, kernel, **keywords, preferred_element_type=jnp.float32)
        assert y.dtype == jnp.float32
        x, kernel = x.astype(jnp.float32), kernel.astype(jnp.float32)
        y = ops.convolution(x, kernel, **keywords, preferred_element_type=jnp.float64)
        assert y.dtype == jnp.float64


@pytest.mark.parametrize(
    "why",
    [
        "several devices",
        "a small batch",
        "groups of the batch",
        "an explicit mesh",
        "an explicit mesh, of the kernel",
        "a mesh of two",
        "half precision",
        "an algorithm",
        "no channels",
        "depthwise, no window",
        "groups, no window",
        "groups, half precision",
        "depthwise, half precision",
    ],
)
def test_elsewhere_it_is_lax_itself(why, monkeypatch):
    if why != "several devices":
        monkeypatch.setattr(jax, "device_count", lambda: 1)
    x, kernel, keywords = case("3x3", 63 if why == "a small batch" else 64)
    if why.startswith("groups, "):
        x, kernel, keywords = case("two groups", 4)
    if why.startswith("depthwise"):
        x, kernel, keywords = case("depthwise", 4)
    if why == "groups of the batch":
        keywords = keywords | {"batch_group_count": 4}
    if "no window" in why:
        keywords = keywords | {"padding": "VALID"}
        x = x[:, :2]
    if "half precision" in why:
        x, kernel = x.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16)
    if why == "an algorithm":
        keywords = keywords | {"precision": lax.DotAlgorithmPreset.F32_F32_F32}
    if why == "no channels":
        x, kernel = x[..., :0], kernel[:, :, :0]
    abstract = jax.sharding.AbstractMesh((2 if why == "a mesh of two" else 1,), ("data",))
    if "an explicit mesh" in why:
        mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Explicit,))
        abstract = mesh.abstract_mesh
        if "kernel" not in why:
            x = jax.device_put(x, jax.NamedSharding(mesh, jax.P("data")))
        kernel = jax.device_put(kernel, jax.NamedSharding(mesh, jax.P()))
    with jax.sharding.use_abstract_mesh(abstract):
        found = primitives(lambda x, kernel: ops.convolution(x, kernel, **keywords), x, kernel)
    assert "custom_jvp_call" not in found
    assert found.count("conv_general_dilated") == 1


def layer_step(operation):
    layer = DeconvConv(4, (3, 3), conv_general_dilated=operation)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(64, 6, 6, 3)))
    variables = layer.init(jax.random.key(0), x, use_running_average=True)

    def loss(params, x, evaluate):
        y, _ = layer.apply(
            {**variables, "params": params},
            x,
            use_running_average=evaluate,
            mutable=["batch_stats"],
        )
        return jnp.sin(y).sum()

    return loss, variables["params"], x


@pytest.mark.parametrize("default", [None, lax.conv_general_dilated])
def test_layers_that_are_given_no_other_train_with_it_and_evaluate_without(default, x64, one_cpu):
    loss, params, x = layer_step(default)
    # A root, too, is a function with a derivative of its own; the convolution is one more.
    count = primitives(lambda p: loss(p, x, False), params).count("custom_jvp_call")

    def plain(*args, **keywords):
        return lax.conv_general_dilated(*args, **keywords)

    other, _, _ = layer_step(plain)
    assert count == 1 + primitives(lambda p: other(p, x, False), params).count("custom_jvp_call")
    assert "custom_jvp_call" not in primitives(lambda p: loss(p, x, True), params)
    ours, expected = (jax.grad(f, argnums=(0, 1))(params, x, False) for f in (loss, other))
    for one, another in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, another, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("norm", ["batch", "none"])
def test_networks_without_whitening_train_on_the_same_convolution(norm, one_cpu):
    model = models.create("cnn", norm, 10)
    x = jnp.zeros((64, 8, 8, 1))
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), x, train=False))

    def run(variables, train):
        return model.apply(variables, x, train=train, mutable=["batch_stats"])[0]

    layers = sum(isinstance(module, nn.Conv) for module in convolutions_of(model, variables, x))
    assert layers > 1
    trained = primitives(lambda v: run(v, True), variables)
    evaluated = primitives(lambda v: run(v, False), variables)
    assert trained.count("custom_jvp_call") - evaluated.count("custom_jvp_call") == layers


def convolutions_of(model, variables, x):
    found = []

    def intercept(run, args, keywords, context):
        found.append(context.module)
        return run(*args, **keywords)

    with nn.intercept_methods(intercept):
        jax.eval_shape(lambda v: model.apply(v, x, train=False), variables)
    return found


def test_a_process_with_one_cpu_has_it():
    program = (
        "import jax, jax.numpy as jnp\n"
        "from netdeconv_jax import ops\n"
        "x, k = jnp.ones((64, 4, 4, 2)), jnp.ones((3, 3, 2, 2))\n"
        "f = lambda k: ops.convolution(x, k, (1, 1), 'SAME',\n"
        "    dimension_numbers=('NHWC', 'HWIO', 'NHWC')).sum()\n"
        "print(jax.device_count(), str(jax.make_jaxpr(f)(k)).count('custom_jvp_call'))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.split() == ["1", "1"]
