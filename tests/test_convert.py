"""Models of every structure, converted: what whitens, what is gone, which statistics are used."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint
import pytest
from convert_models import (
    BNReLU,
    Bottleneck,
    ConvBN,
    Decoder,
    Homemade,
    Lookalikes,
    PreActivation,
    ResNet,
    Shared,
    Stacked,
    Tutorial,
    Unconverted,
)
from flax import linen as nn
from flax import serialization, traverse_util
from flax.training.train_state import TrainState

from netdeconv_jax import DeconvConv, DeconvConvTranspose, DeconvDense, WhiteningSpec, deconvolve
from netdeconv_jax.interop import accumulate, fold, recalibrate
from netdeconv_jax.linen import DeconvolvedModel
from netdeconv_jax.whitening.conversion import matches

X = np.random.default_rng(0).normal(size=(4, 8, 8, 3)).astype(np.float32) + 0.5
KEY = jax.random.key(0)
# Whiteners of one size: what costs time here is compiling, shape by shape.
SPEC = WhiteningSpec(whiten="channels", block_size=4, sampling_stride=1, num_iters=2)


def names(tree) -> set[str]:
    return {"/".join(path) for path in traverse_util.flatten_dict(tree)}


def made_up(model, x=X, **kwargs) -> Any:
    """Variables of a model without the price of computing initial ones."""
    shapes = jax.eval_shape(lambda x: model.init(KEY, x, **kwargs), x)
    rng = np.random.default_rng(2)
    return jax.tree.map(lambda like: 0.2 * rng.normal(size=like.shape).astype("f"), shapes)


def small() -> Any:
    """A convolution and a dense layer."""
    return nn.Sequential([nn.Conv(4, (3, 3)), nn.relu, lambda x: x.mean((1, 2)), nn.Dense(3)])


def leaf(tree, path: str) -> Any:
    return traverse_util.flatten_dict(tree, sep="/")[path]


def test_a_resnet_has_no_convolution_and_no_batch_norm_left():
    model: Any = deconvolve(ResNet(), SPEC)
    variables = jax.eval_shape(model.init, KEY, X)
    report = model.report(X)
    plain = jax.eval_shape(ResNet().init, KEY, X)
    convs = {name.rsplit("/", 1)[0] for name in names(plain["params"]) if "onv" in name}
    norms = {name.rsplit("/", 1)[0] for name in names(plain["batch_stats"])}
    assert len(convs) == 8
    assert set(report.replaced) == convs
    assert set(report.dropped) == norms
    assert report.kept == ("Dense_0",)
    why = {entry.path: entry.why for entry in report.entries}
    assert why["bn_init"] == "follows conv_init, which whitens"
    assert "starts at zero" in why["Bottleneck_0/BatchNorm_2"]
    assert why["Dense_0"] == "`dense` does not ask for it"
    whitened = {f"{conv}/{leaf}" for conv in convs for leaf in ("mean", "whitener")}
    assert names(variables["batch_stats"]) == whitened
    scalars = {f"Bottleneck_{i}/BatchNorm_2/scale" for i in range(2)}
    dense = {"Dense_0/kernel", "Dense_0/bias"}
    ours = {f"{conv}/{leaf}" for conv in convs for leaf in ("kernel", "bias")}
    assert names(variables["params"]) == ours | scalars | dense


def test_initial_kernels_are_those_of_the_model():
    variables = deconvolve(small(), SPEC, dense=True).init(KEY, X)
    plain = small().init(KEY, X)
    assert jax.tree.all(jax.tree.map(np.array_equal, variables["params"], plain["params"]))
    assert variables["batch_stats"]["layers_3"]["mean"].shape == (4,)


def test_a_block_starts_as_the_identity_and_learns_not_to_be():
    norm = partial(nn.BatchNorm, use_running_average=False)
    block = deconvolve(Bottleneck(4, partial(nn.Conv, use_bias=False), norm), SPEC)
    x = jax.nn.relu(jnp.asarray(np.random.default_rng(1).normal(size=(4, 6, 6, 8)), jnp.float32))
    variables = block.init(KEY, x)

    @jax.jit
    def output_and_grads(params):
        def run(params):
            given = {**variables, "params": params}
            y, _ = block.apply(given, x, mutable=["batch_stats"])
            return jnp.sum(jnp.sin(jnp.arange(y.size).reshape(y.shape)) * y), y

        grads, y = jax.grad(run, has_aux=True)(params)
        return y, grads

    y, grads = output_and_grads(variables["params"])
    np.testing.assert_array_equal(y, x)
    assert grads["BatchNorm_2"]["scale"].shape == ()
    assert grads["BatchNorm_2"]["scale"] != 0
    # Behind a factor of zero nothing else counts, as with the batch norm that it stands for.
    assert not grads["Conv_0"]["kernel"].any()
    later = jax.tree.map(lambda leaf: leaf, variables["params"])
    later["BatchNorm_2"]["scale"] = jnp.ones(())
    y, grads = output_and_grads(later)
    assert jnp.abs(y - x).max() > 0.1
    assert all(leaf.any() for leaf in jax.tree.leaves(grads["Conv_0"]["kernel"]))


def test_layers_are_the_very_layers_of_this_package():
    settings: Any = {
        "kernel_size": (3, 3),
        "strides": (2, 1),
        "padding": "REFLECT",
        "kernel_dilation": (1, 2),
        "feature_group_count": 2,
        "param_dtype": jnp.float32,
        "precision": "highest",
        "bias_init": nn.initializers.ones,
    }
    spec = WhiteningSpec(shared_whitener=False, num_iters=3, momentum=0.5)
    x = jnp.asarray(X[..., :2])
    model: Any = deconvolve(nn.Conv(6, use_bias=False, **settings), spec)
    ours = DeconvConv(6, spec=spec, use_running_average=False, **settings)
    variables = model.init(KEY, x)
    assert jax.tree.all(jax.tree.map(np.array_equal, variables, ours.init(KEY, x)))
    both: Any = (one.apply(variables, x, mutable=["batch_stats"]) for one in (model, ours))
    found, expected = both
    assert jax.tree.all(jax.tree.map(np.array_equal, found, expected))
    assert np.abs(found[1]["batch_stats"]["mean"]).max() > 0.1


def test_transposed_convolutions_are_converted_with_their_settings():
    settings: Any = {
        "kernel_size": (4, 3),
        "strides": (2, 1),
        "padding": ((2, 1), (0, 1)),
        "kernel_dilation": (1, 2),
        "transpose_kernel": True,
        "precision": "highest",
        "bias_init": nn.initializers.ones,
    }
    model: Any = deconvolve(nn.ConvTranspose(4, use_bias=False, **settings), SPEC)
    ours = DeconvConvTranspose(4, spec=SPEC, use_running_average=False, **settings)
    variables = model.init(KEY, X)
    plain = nn.ConvTranspose(4, **settings)
    assert jax.tree.all(jax.tree.map(np.array_equal, variables, ours.init(KEY, X)))
    assert jax.tree.all(
        jax.tree.map(np.array_equal, variables["params"], plain.init(KEY, X)["params"])
    )
    both: Any = (one.apply(variables, X, mutable=["batch_stats"]) for one in (model, ours))
    found, expected = both
    assert jax.tree.all(jax.tree.map(np.array_equal, found, expected))
    after = {**variables, **found[1]}
    folded, plain_variables = fold(model, after, X)
    assert set(plain_variables) == {"params"}
    y = model.apply(after, X)
    assert jnp.abs(y - plain.apply({"params": variables["params"]}, X)).max() > 1e-2
    np.testing.assert_allclose(folded.apply(plain_variables, X), y, rtol=0, atol=1e-5)


def test_a_norm_behind_a_transposed_convolution_is_dropped_unless_that_stays():
    report = deconvolve(Decoder(), SPEC).report(X)
    assert report.replaced == ("in", "up", "out")
    assert report.dropped == ("norm_in", "norm_up")
    assert {e.why for e in report.entries if e.path == "up"} == {"by DeconvConvTranspose"}
    kept = deconvolve(Decoder(), SPEC, keep="up").report(X)
    assert kept.kept == ("up", "norm_up")

    class Standardized(nn.ConvTranspose):
        def param(self, name, *args, **kwargs):
            return super().param(name, *args, **kwargs) * 2

    report = deconvolve(Standardized(4, (3, 3))).report(X)
    assert report.entries[0].why == "Standardized changes its parameters"


def test_outputs_are_captured_once():
    model: Any = deconvolve(Decoder(), SPEC, dense=True)
    shapes = jax.eval_shape(model.init, KEY, X)
    asked = ["batch_stats", "diagnostics", "intermediates"]
    _, state = jax.eval_shape(
        lambda v: model.apply(v, X, mutable=asked, capture_intermediates=True), shapes
    )
    seen: Any = traverse_util.flatten_dict(state["intermediates"], sep="/")
    assert {"in/__call__", "up/__call__", "out/__call__", "norm_up/__call__"} < set(seen)
    assert {len(outputs) for outputs in seen.values()} == {1}
    assert set(state["diagnostics"]) == {"in", "up", "out"}


def test_statistics_are_the_batchs_where_batch_stats_are_mutable_and_nothing_says_otherwise():
    net: Any = nn.Conv(4, (3, 3), use_bias=False)
    model: Any = deconvolve(net, SPEC)
    variables = model.init(KEY, X)
    layer: Any = DeconvConv(4, (3, 3), spec=SPEC)
    fresh = layer.init(KEY, X, True)
    assert jax.tree.all(jax.tree.map(np.array_equal, variables, fresh))  # init updates nothing
    _, updates = layer.apply(fresh, X, False, mutable=["batch_stats"])
    after = {**fresh, **updates}
    batch, running = layer.apply(after, X, False, mutable=["batch_stats"])[0], None
    running = layer.apply(after, X, True)
    assert jnp.abs(batch - running).max() > 0.1
    for mutable in ("batch_stats", True, ["batch_stats", "moments"]):
        np.testing.assert_array_equal(model.apply(after, X, mutable=mutable)[0], batch)
    np.testing.assert_array_equal(model.apply(after, X), running)
    np.testing.assert_array_equal(model.apply(after, X, mutable=["intermediates"])[0], running)
    always = deconvolve(net, SPEC, use_running_average=True)
    found, same = always.apply(after, X, mutable=["batch_stats"])
    np.testing.assert_array_equal(found, running)
    assert jax.tree.all(
        jax.tree.map(np.array_equal, same["batch_stats"], dict(after["batch_stats"]))
    )
    with deconvolve(SPEC, use_running_average=True):
        np.testing.assert_array_equal(net.apply(after, X, mutable=["batch_stats"])[0], running)


def test_pre_activation_norms_are_listed_and_kept_on_request():
    report = deconvolve(PreActivation(), SPEC).report(X)
    why = {entry.path: entry.why for entry in report.entries}
    for name in ("first1", "last"):
        assert "pre-activation" in why[name]
    assert why["second1"] == "follows conv1a, which whitens"
    kept = deconvolve(PreActivation(), SPEC, keep=("first*", "/last"))
    assert kept.report(X).kept == ("first0", "first1", "last", "head")
    variables = made_up(kept)
    assert set(variables["params"]["first1"]) == {"scale", "bias"}
    apply = jax.jit(lambda v: kept.apply(v, X, train=True, mutable=["batch_stats"]))
    _, updates = apply(variables)
    moved = updates["batch_stats"]["first1"]["mean"] - variables["batch_stats"]["first1"]["mean"]
    assert jnp.abs(moved).min() > 0
    assert "second0" not in updates["batch_stats"]


@pytest.mark.parametrize(
    ("dense", "converted"),
    [
        (False, ()),
        (True, ("Dense_0", "Dense_1")),
        ("Dense_1", ("Dense_1",)),
        (lambda path, inputs, features: inputs > 20, ("Dense_0",)),
        (lambda path, inputs, features: path == "Dense_1" and features == 5, ("Dense_1",)),
    ],
)
def test_dense_layers_are_converted_where_they_are_asked_for(dense, converted):
    model: Any = deconvolve(Tutorial(), SPEC, dense=dense)
    assert [path for path in model.report(X).replaced if "Dense" in path] == [*converted]
    stats = jax.eval_shape(model.init, KEY, X)["batch_stats"]
    assert {path for path in stats if "Dense" in path} == {*converted}
    if "Dense_0" in converted:  # one block of 32, though convolutions have blocks of four
        assert stats["Dense_0"]["whitener"].shape == (32, 32)
    if dense is True:
        layer = DeconvDense(5, num_iters=2, use_running_average=True)
        x = jnp.ones((2, 16))
        head = deconvolve(nn.Dense(5), SPEC, dense=True)
        assert jax.tree.all(
            jax.tree.map(np.array_equal, head.init(KEY, x), dict(layer.init(KEY, x)))
        )


def test_patterns_name_a_layer_a_module_that_holds_it_or_a_path_from_the_root():
    assert matches(("net", "stem", "bn1"), ["bn1"])
    assert matches(("net", "stem", "bn1"), ["stem"])
    assert matches(("net", "stem", "bn1"), ["stem/bn?"])
    assert matches(("net", "stage1", "block0", "bn1"), ["stage1/*/bn1"])
    assert matches(("net", "stem", "bn1"), ["other", "/net/stem"])
    assert not matches(("net", "stem", "bn1"), ["/stem", "bn", "stem/*/bn1", ""])
    assert not matches((), ["Conv_0"])
    assert deconvolve(small(), SPEC, keep="/layers_0").report(X).kept == ("layers_0", "layers_3")
    with pytest.raises(ValueError, match="`keep` names no layer of the model: '/layers_1'"):
        deconvolve(small(), keep="/layers_1").report(X)
    with pytest.raises(ValueError, match="`dense` names no layer of the model: 'Dense_9'"):
        jax.eval_shape(deconvolve(small(), dense="Dense_9").init, KEY, X)


def test_shared_modules_and_modules_of_setup_are_converted_once():
    model: Any = deconvolve(Shared(), SPEC)
    report = model.report(X)
    assert report.replaced == ("enter", "twice", "grouped")
    assert report.dropped == ("enter_norm", "twice_norm", "grouped_norm")
    variables = made_up(model)
    assert set(variables["batch_stats"]) == {"enter", "twice", "grouped"}
    assert set(variables["params"]["twice"]) == {"kernel", "bias"}
    # Another method of the model than __call__, and a statistic that takes one step for each use:
    features = jax.jit(
        lambda v: model.apply(v, X, True, method="features", mutable=["batch_stats"])
    )
    y, updates = features(variables)
    assert y.shape == (4, 8, 8, 8)
    old = variables["batch_stats"]["twice"]["whitener"]
    off_diagonal = ~np.eye(4, dtype=bool)
    decayed = (updates["batch_stats"]["twice"]["whitener"] - 0.81 * old)[off_diagonal]
    once = (updates["batch_stats"]["twice"]["whitener"] - 0.9 * old)[off_diagonal]
    assert np.std(decayed) < np.std(once)


@pytest.mark.parametrize(
    "transform", ["scan", "remat", pytest.param("vmap", marks=pytest.mark.slow)]
)
def test_blocks_under_a_transform_are_converted(transform):
    model: Any = deconvolve(Stacked(transform), SPEC)
    shapes = jax.eval_shape(model.init, KEY, X)
    depth = {"scan": "blocks", "vmap": "members"}.get(transform)
    inner = f"{depth or 'block1'}/Conv_0"
    assert leaf(shapes["params"], f"{inner}/bias").shape == ((2, 4) if depth else (4,))
    assert not any("BatchNorm" in name for name in names(shapes["params"]))
    variables = made_up(model)

    @jax.jit
    def run(params):
        def loss(params):
            y, updates = model.apply({**variables, "params": params}, X, mutable=["batch_stats"])
            return jnp.sum(y**2), updates["batch_stats"]

        return jax.grad(loss, has_aux=True)(params)

    grads, stats = run(variables["params"])
    assert all(jnp.isfinite(g).all() and g.any() for g in jax.tree.leaves(grads["stem"]))
    whitener = leaf(stats, f"{inner}/whitener")
    assert whitener.shape == ((2, 4, 4) if depth else (4, 4))
    if transform == "scan":  # each step has statistics of its own
        fresh = whitener - 0.9 * leaf(variables["batch_stats"], f"{inner}/whitener")
        assert jnp.abs(fresh[0] - fresh[1]).max() > 1e-3


def test_a_scan_without_statistics_says_what_it_needs():
    class Plain(nn.Module):
        @nn.compact
        def __call__(self, x, _=None):
            return nn.Conv(3, (3, 3))(x), None

    stack = nn.scan(Plain, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
    with pytest.raises(ValueError, match=r"'Conv_0', that can make no `batch_stats`.*nn\.scan"):
        deconvolve(stack()).init(KEY, X, None)


def test_a_batch_norm_of_ones_own_is_known_as_one():
    model: Any = deconvolve(Homemade(), SPEC)
    report = model.report(X)
    assert report.dropped == ("OwnBatchNorm_0", "OwnBatchNorm_1")
    variables = jax.eval_shape(model.init, KEY, X)
    assert names(variables["params"]["OwnBatchNorm_1"]) == {"scale"}
    assert variables["params"]["OwnBatchNorm_1"]["scale"].shape == ()


def test_what_only_looks_like_a_batch_norm_is_not_taken_for_one():
    report = deconvolve(Lookalikes(), SPEC).report(X)
    found = {entry.path: (entry.action, entry.why) for entry in report.entries}
    assert "block" not in found
    assert found["block/Conv_0"][0] == "replaced"
    assert found["block/BatchNorm_0"] == ("dropped", "follows block/Conv_0, which whitens")
    assert found["heir"] == ("dropped", "follows before_heir, which whitens")
    assert found["gamma"][0] == "kept"
    assert "other variables" in found["gamma"][1]
    shapes = jax.eval_shape(deconvolve(Lookalikes(), SPEC).init, KEY, X)
    assert names(shapes["params"]["gamma"]) == {"gamma"}
    block = deconvolve(ConvBN(4, True), SPEC)
    assert names(jax.eval_shape(block.init, KEY, X)["batch_stats"]) == {
        "Conv_0/mean",
        "Conv_0/whitener",
    }


def test_an_heir_of_batch_norm_loses_only_what_it_inherits():
    heir = deconvolve(BNReLU(True), SPEC)
    np.testing.assert_array_equal(heir.apply({}, X), np.maximum(X, 0))
    norm = deconvolve(nn.BatchNorm(), SPEC)
    x = norm.apply({}, use_running_average=False, mask=None, x=X)
    np.testing.assert_array_equal(x, X)


def test_a_batch_norm_behind_a_layer_that_stays_stays_too():
    model: Any = deconvolve(Unconverted(), SPEC)
    report = model.report(X)
    assert report.replaced == ("conv",)
    assert report.dropped == ("norm_conv",)
    why = {entry.path: entry.why for entry in report.entries}
    assert why["up"] == "has a mask of its kernel"
    assert why["local"] == "ConvLocal is not converted"
    assert why["norm_up"] == "follows up, which does not whiten"
    assert why["norm_dense"] == "follows dense, which does not whiten"
    (normed,) = (path for path in why if path.endswith("normed") and path != "norm_normed")
    assert why[normed].startswith("below a SpectralNorm or WeightNorm")
    assert "norm_normed" in report.kept
    stats = names(jax.eval_shape(model.init, KEY, X)["batch_stats"])
    assert {name for name in stats if "whitener" in name} == {"conv/whitener"}


def test_a_model_that_is_one_layer_is_named_by_a_star_and_lists_of_axes_will_do():
    conv = nn.Conv(4, (3, 3))
    assert deconvolve(conv, keep="*").report(X).kept == ("",)
    with pytest.raises(ValueError, match=r"'Conv_0'; there are \(the model\)"):
        deconvolve(conv, keep="Conv_0").report(X)
    for empty in ("", "/"):
        with pytest.raises(ValueError, match="`keep` must name layers, got an empty pattern"):
            deconvolve(conv, keep=[empty])
    assert deconvolve(conv, axis_name=["data"]).rules.axis_name == ("data",)


def test_heirs_of_conv_are_converted_unless_their_parameters_are_their_own():
    class Padded(nn.Conv):
        @nn.compact
        def __call__(self, inputs):
            return super().__call__(jnp.pad(inputs, ((0, 0), (1, 1), (1, 1), (0, 0))))

    class Standardized(nn.Conv):
        def param(self, name, *args, **kwargs):
            value = super().param(name, *args, **kwargs)
            return value - value.mean() if name == "kernel" else value

    padded = deconvolve(Padded(4, (3, 3), padding="VALID"), SPEC)
    same = deconvolve(nn.Conv(4, (3, 3), padding=1), SPEC)
    variables = same.init(KEY, X)
    assert jax.tree.all(jax.tree.map(np.array_equal, padded.init(KEY, X), variables))
    np.testing.assert_allclose(padded.apply(variables, X), same.apply(variables, X), atol=1e-6)
    report = deconvolve(Standardized(4, (3, 3))).report(X)
    assert report.entries[0].why == "Standardized changes its parameters"
    report = deconvolve(nn.Conv(4, (3, 3), mask=jnp.ones((3, 3, 3, 4)))).report(X)
    assert report.entries[0].why == "has a mask of its kernel"


class Standardizing(nn.Conv):
    """An heir that convolves by itself."""

    @nn.compact
    def __call__(self, inputs):
        shape = (3, 3, inputs.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape)
        axes = ("NHWC", "HWIO", "NHWC")
        kernel = kernel - kernel.mean()
        return jax.lax.conv_general_dilated(inputs, kernel, (1, 1), "SAME", dimension_numbers=axes)


class Homegrown(nn.Module):
    """A layer of one's own, and what else it returns."""

    pair: bool = False

    @nn.compact
    def __call__(self, x):
        y = x @ self.param("weight", nn.initializers.ones, (x.shape[-1], 4))
        return (y, None) if self.pair else y


@pytest.mark.parametrize(
    ("layer", "why"),
    [
        (Standardizing(4, (3, 3)), "Standardizing has a `__call__` of its own"),
        (nn.Einsum((3, 4), "...i,ij->...j"), "Einsum is not converted"),
        (Homegrown(), "Homegrown is not converted"),
    ],
)
def test_a_layer_that_is_computed_in_another_way_stays_and_so_does_its_norm(layer, why):
    model = deconvolve(nn.Sequential([layer, nn.BatchNorm(True), nn.Conv(4, (1, 1))]), SPEC)
    stays, norm, conv = model.report(X).entries
    assert (stays.action, stays.why) == ("kept", why)
    assert (norm.action, norm.why) == ("kept", "follows layers_0, which does not whiten")
    assert conv.action == "replaced"
    assert deconvolve(layer, keep="*").report(X).kept == ("",)
    both = deconvolve(Homegrown(pair=True)).report(X)
    assert both.kept == ("",)


def test_a_batch_norm_behind_an_heir_goes_by_what_becomes_of_what_it_inherits():
    class Leaky(nn.Conv):
        @nn.compact
        def __call__(self, inputs):
            return nn.leaky_relu(super().__call__(inputs))

    net = nn.Sequential([Leaky(4, (3, 3)), nn.BatchNorm(True)])
    report = deconvolve(net, SPEC).report(X)
    assert (report.replaced, report.dropped) == (("layers_0",), ("layers_1",))
    assert deconvolve(net, SPEC, keep="layers_0").report(X).kept == ("layers_0", "layers_1")


def test_computation_in_bfloat16_stays_in_bfloat16():
    model: Any = deconvolve(ResNet(dtype=jnp.bfloat16), SPEC)
    variables = jax.eval_shape(model.init, KEY, X)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    _, state = jax.eval_shape(
        lambda v: model.apply(
            v, X, mutable=["batch_stats", "intermediates"], capture_intermediates=True
        ),
        variables,
    )
    seen: Any = traverse_util.flatten_dict(state["intermediates"])
    dtypes = {path[-2]: value[0].dtype for path, value in seen.items() if len(path) > 1}
    assert {dtypes["conv_init"], dtypes["bn_init"]} == {jnp.dtype("bfloat16")}
    norm = deconvolve(nn.BatchNorm(False))
    assert norm.apply({}, jnp.ones((2, 3), jnp.bfloat16)).dtype == jnp.float32  # its scale's
    assert deconvolve(nn.Conv(3, (3, 3))).report(jnp.ones((1, 5, 5, 2), jnp.uint8)).replaced


def test_it_trains_under_jit_with_a_train_state_and_survives_a_checkpoint(tmp_path):
    model: Any = deconvolve(small(), SPEC)
    variables = jax.jit(model.init)(KEY, X)
    state = TrainState.create(
        apply_fn=model.apply, params=variables["params"], tx=optax.sgd(0.3, 0.9)
    )
    labels = jnp.arange(4) % 3

    @jax.jit
    def step(state, stats):
        def loss_fn(params):
            given = {"params": params, "batch_stats": stats}
            logits, updates = state.apply_fn(given, X, mutable=["batch_stats"])
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return losses.mean(), updates["batch_stats"]

        (loss, stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
        return state.apply_gradients(grads=grads), stats, loss

    stats, losses = variables["batch_stats"], []
    for _ in range(20):
        state, stats, loss = step(state, stats)
        losses.append(float(loss))
    assert losses[-1] < 0.5 * losses[0]
    trained = {"params": state.params, "batch_stats": stats}
    expected = model.apply(trained, X)
    restored = serialization.from_bytes(variables, serialization.to_bytes(trained))
    np.testing.assert_array_equal(model.apply(restored, X), expected)
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "step", trained)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "step", jax.tree.map(jnp.zeros_like, trained))
    np.testing.assert_array_equal(model.apply(restored, X), expected)


def test_what_is_for_models_of_this_package_is_for_converted_ones_too():
    model: Any = deconvolve(small(), SPEC, dense=True)
    variables: Any = made_up(model)
    precise: Any = recalibrate(model, variables, [X, X], apply_kwargs={})
    batch, _ = model.apply(variables, X, mutable=["batch_stats"])
    np.testing.assert_allclose(model.apply(precise, X), batch, atol=1e-4)
    plain, folded = fold(model, precise, X)
    assert set(folded) == {"params"}
    np.testing.assert_allclose(plain.apply(folded, X), model.apply(precise, X), atol=1e-5)

    def loss_fn(variables, x, mutable):
        y, updates = model.apply(variables, x, mutable=mutable)
        return jnp.mean(y**2), (updates, None)

    parts = X.reshape(2, 2, 8, 8, 3)
    _, _, stats = accumulate(loss_fn, variables, parts)
    _, whole = model.apply(variables, X, mutable=["batch_stats"])
    for kind in ("mean", "whitener"):  # of the first layer, whose input is the same either way
        np.testing.assert_allclose(
            stats["layers_0"][kind], whole["batch_stats"]["layers_0"][kind], atol=1e-4
        )


def test_inside_the_context_manager_a_model_is_what_the_wrapper_makes_of_it():
    net, model = small(), deconvolve(small(), SPEC)
    with deconvolve(SPEC) as conversion:
        variables = net.init(KEY, X)
        found = net.apply(variables, X, mutable=["batch_stats"])[0]
    assert conversion.report == model.report(X)
    assert jax.tree.all(jax.tree.map(np.array_equal, variables, model.init(KEY, X)))
    np.testing.assert_array_equal(found, model.apply(variables, X, mutable=["batch_stats"])[0])
    assert "batch_stats" not in nn.Conv(2, (1, 1)).init(KEY, X)  # it is over


def test_what_is_jitted_is_converted_inside_of_the_context_manager_and_not_outside():
    net = small()
    plain = net.init(KEY, X)
    jitted = jax.jit(lambda variables, x: net.apply(variables, x))
    expected = jitted(plain, X)
    with deconvolve(SPEC):
        variables = net.init(KEY, X)
        trained = {
            **variables,
            "batch_stats": jax.tree.map(lambda s: 2 * s, variables["batch_stats"]),
        }
        converted = jitted(trained, X)
        np.testing.assert_allclose(converted, net.apply(trained, X), rtol=1e-5, atol=1e-5)
    assert jnp.abs(converted - expected).max() > 1e-2
    np.testing.assert_array_equal(jitted(plain, X), expected)
    model: Any = deconvolve(net, SPEC)
    inside = jax.jit(model.apply)
    np.testing.assert_allclose(inside(trained, X), converted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("jitted", [False, True])
def test_modules_that_flax_jits_are_converted_by_the_rules_of_their_model(jitted):
    class Inner(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Conv(4, (3, 3), name="conv")(x)

    class Outer(nn.Module):
        @nn.compact
        def __call__(self, x):
            return (nn.jit(Inner) if jitted else Inner)(name="inner")(x)

    net: Any = Outer()
    plain = net.init(KEY, X)
    expected = net.apply(plain, X)
    answers = []
    for spec in (SPEC, SPEC.replace(num_iters=1)):
        model: Any = deconvolve(net, spec)
        for _ in range(2):
            variables = model.init(KEY, X)
            assert model.report(X).replaced == ("inner/conv",)
        answers.append(model.apply(variables, X, mutable=["batch_stats"])[0])
    kept: Any = deconvolve(net, SPEC, keep="inner/conv")
    for _ in range(2):  # the second time nothing is traced, and the pattern is still known
        np.testing.assert_allclose(kept.apply(kept.init(KEY, X), X), expected, rtol=1e-5)
    assert jnp.abs(answers[0] - answers[1]).max() > 1e-2
    np.testing.assert_allclose(net.apply(plain, X), expected, rtol=1e-6)


def test_errors_name_the_argument():
    assert isinstance(deconvolve(Tutorial()), DeconvolvedModel)
    assert hash(deconvolve(Tutorial(), SPEC)) == hash(deconvolve(Tutorial(), SPEC))
    wrong: Any = "cnn"
    with pytest.raises(
        TypeError, match="`model` must be a Linen module or a WhiteningSpec, got str"
    ):
        deconvolve(wrong)
    with pytest.raises(TypeError, match=r"`spec` must be a WhiteningSpec, got 64"):
        deconvolve(Tutorial(), 64)  # pyright: ignore
    with pytest.raises(TypeError, match="`model` must be a Linen module where `spec` is given"):
        deconvolve(SPEC, SPEC)  # pyright: ignore
    with pytest.raises(TypeError, match=r"`use_running_average` must be True, .* got 'x'"):
        deconvolve(Tutorial(), use_running_average="x")  # pyright: ignore
    for name in ("dense", "keep"):
        with pytest.raises(TypeError, match=f"`{name}` must be a pattern of paths or several"):
            deconvolve(Tutorial(), **{name: 3})  # pyright: ignore
