"""A model trained with batch norm, converted: the same function, before any fine-tuning."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from convert_models import (
    Decoder,
    GammaBatchNorm,
    Homemade,
    Lookalikes,
    OwnBatchNorm,
    PreActivation,
    ResNet,
    Shared,
    Stacked,
    sequential,
)
from flax import linen as nn
from flax import nnx, traverse_util

from netdeconv_jax import DeconvConv, WhiteningSpec, deconvolve, models
from netdeconv_jax.interop import fold, recalibrate, warm_start
from netdeconv_jax.linen import DeconvolvedModel

X = np.random.default_rng(0).normal(size=(8, 8, 8, 3)).astype(np.float32) + 0.5
# Whiteners of one size: what costs time here is compiling, shape by shape.
SPEC = WhiteningSpec(whiten="channels", block_size=4, sampling_stride=1, num_iters=2)


def trained(model, x: Any = X, *others: Any, dtype: Any = np.float32) -> Any:
    """Variables that no symmetry saves from a wrong index, in the ranges of trained ones."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), x, *others)
    rng = np.random.default_rng(1)

    def leaf(path, like):
        kind, noise = path[-1].key, rng.normal(size=like.shape)
        if kind == "kernel":
            noise = noise / np.sqrt(np.prod(like.shape[:-1]))
        elif kind in ("var", "scale"):
            noise = np.abs(noise) + 0.5
        return jnp.asarray(noise, dtype)

    return jax.tree.map_with_path(leaf, shapes)


def check_same(model, variables, found, x=X, tolerance=1e-4, **flags):
    """The same logits; statistics of what each layer sees; and the first layer's, told apart from none."""
    converted, new = found
    expected = jax.jit(lambda x: model.apply(variables, x, **flags))(x)
    logits = jax.jit(lambda x: converted.apply(new, x, **flags))(x)
    scale = np.abs(expected).max()
    assert np.ptp(expected, axis=0).max() > 1e-3 * scale
    np.testing.assert_allclose(logits, expected, rtol=0, atol=tolerance * max(1, scale))
    stats: Any = traverse_util.flatten_dict(new["batch_stats"])
    for path, leaf in stats.items():
        if path[-1] == "whitener":
            assert np.abs(np.asarray(leaf) - np.eye(leaf.shape[-1])).max() > 1e-3


# Each with the batch norms that cannot be folded.
NETS: dict[str, Any] = {
    "resnet": (ResNet(), set()),
    "pre-activation": (PreActivation(), {"first0", "first1", "last"}),
    "shared": (Shared(), {"twice_norm"}),
    "homemade": (Homemade(), set()),
}


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("resnet", "shared")]


@pytest.mark.parametrize("name", ["pre-activation", "homemade", *SLOW])
def test_a_converted_model_computes_what_it_computed(name):
    model, unfolded = NETS[name]
    variables = trained(model)
    converted, new = warm_start(model, variables, [X[:4], X[4:]], SPEC)
    assert isinstance(converted, DeconvolvedModel)
    check_same(model, variables, (converted, new), train=False)
    report = converted.report(X)
    assert not any("Dense" in path or "head" in path for path in report.replaced)
    norms = {path for path in report.kept if "head" not in path and "Dense" not in path}
    # Behind the projection of a sum, or in front of it, there is nothing to fold into.
    assert norms == (unfolded | {"first0"} if name == "pre-activation" else unfolded)
    why = {entry.path: entry.why for entry in report.entries}
    assert all("cannot be folded" in why[path] for path in norms)
    for path in norms:
        assert jax.tree.all(
            jax.tree.map(np.array_equal, new["batch_stats"][path], variables["batch_stats"][path])
        )


@pytest.mark.parametrize(
    "spec",
    [
        WhiteningSpec(method="eigh", shared_whitener=False, block_size=2),
        pytest.param(
            WhiteningSpec(block_size=16, momentum=0.0, freeze_schedule=(1, 3)),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_it_does_so_however_it_whitens_and_with_dense_layers(spec):
    model: Any = sequential()
    variables = trained(model)
    converted, new = warm_start(model, variables, [X], spec, dense=True, apply_kwargs={})
    check_same(model, variables, (converted, new))
    assert converted.report(X).kept == ()
    assert "whitener" in new["batch_stats"]["layers_6"]


@pytest.mark.parametrize("flipped", [False, True])
def test_transposed_convolutions_of_one_phase_are_converted(flipped):
    model = Decoder(strides=1, flipped=flipped)
    variables = trained(model)
    spec = SPEC.replace(whiten="patches", block_size=2)
    converted, new = warm_start(model, variables, [X], spec)
    assert converted.report(X).replaced == ("in", "up", "out")
    assert converted.report(X).dropped == ("norm_in", "norm_up")
    assert new["batch_stats"]["up"]["whitener"].shape == (1, 24, 24)
    check_same(model, variables, (converted, new), train=False)


def test_the_report_says_where_a_scalar_of_a_folded_norm_starts():
    zero = nn.initializers.zeros_init()
    net: Any = nn.Sequential([nn.Conv(6, (3, 3)), nn.BatchNorm(True, scale_init=zero)])
    converted, new = warm_start(net, trained(net), [X], SPEC, apply_kwargs={})
    (why,) = (entry.why for entry in converted.report(X).entries if entry.path == "layers_1")
    assert new["params"]["layers_1"]["scale"] == 1
    assert why.endswith("a learnt scalar that starts at one, as its scale is folded")
    assert deconvolve(net, SPEC).report(X).entries[1].why.endswith("starts at zero")


def test_a_transposed_convolution_with_strides_stays_and_says_why():
    model = Decoder(strides=2)
    variables = trained(model)
    converted, new = warm_start(model, variables, [X], SPEC)
    report = converted.report(X)
    assert report.replaced == ("in", "out")
    assert report.kept == ("up", "norm_up")
    why = {entry.path: entry.why for entry in report.entries}
    assert "each need a bias of its own" in why["up"]
    assert set(new["batch_stats"]) == {"in", "norm_up", "out"}
    check_same(model, variables, (converted, new), train=False)


def test_in_float64_it_is_exact(x64):
    model, x = nn.Conv(4, (3, 3), feature_group_count=2, param_dtype=jnp.float64), X.astype("f8")
    x = np.concatenate([x, x[..., :1] ** 2], -1)
    variables = trained(model, x, dtype=np.float64)
    found = warm_start(model, variables, [x], SPEC, apply_kwargs={})
    assert found[1]["batch_stats"]["whitener"].dtype == jnp.float64
    check_same(model, variables, found, x, tolerance=1e-12)


def test_statistics_are_those_that_the_layer_meets():
    model: Any = sequential()
    variables = trained(model)
    converted, new = warm_start(model, variables, [X[:4], X[4:]], SPEC, apply_kwargs={})
    layer = DeconvConv(6, (3, 3), strides=2, spec=SPEC)
    params = new["params"]["layers_0"]
    fresh = {"params": params, **layer.init(jax.random.key(0), X, True)} | {"params": params}
    flags: Any = {"apply_kwargs": {"use_running_average": False}}
    expected = recalibrate(layer, fresh, [X[:4], X[4:]], **flags)["batch_stats"]
    for kind in ("mean", "whitener"):
        np.testing.assert_allclose(new["batch_stats"]["layers_0"][kind], expected[kind], atol=1e-4)
    plain, folded = fold(converted, new, X)
    np.testing.assert_allclose(plain.apply(folded, X), model.apply(variables, X), atol=1e-4)


@pytest.mark.parametrize("in_call", [False, True])
def test_a_layer_that_whitens_already_may_pool_over_devices_and_be_told_in_the_call(in_call):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            pooled: Any = {"axis_name": "data", "axis_index_groups": ((0, 1), (2, 3))}
            given, called = (None, not train) if in_call else (not train, None)
            layer = DeconvConv(4, (1, 1), use_running_average=given, spec=SPEC, **pooled)
            return layer(nn.Conv(4, (1, 1))(x), called)

    variables = jax.jit(Net().init)(jax.random.key(0), X)
    model, _ = warm_start(Net(), variables, [X], SPEC)  # which compares outputs
    assert model.report(X).replaced == ("Conv_0",)


def test_what_was_converted_and_trained_folds_to_plain_layers():
    net: Any = nn.Sequential([*sequential().layers, nn.BatchNorm(True)])
    model: Any = deconvolve(net, SPEC)
    variables = trained(model)
    plain, folded = fold(model, variables, X)
    assert not any("whitener" in path for path in traverse_util.flatten_dict(folded, sep="/"))
    expected = model.apply(variables, X)
    np.testing.assert_allclose(plain.apply(folded, X), expected, rtol=0, atol=1e-4)
    assert set(folded["batch_stats"]) == {
        "layers_7"
    }  # a batch norm is one, not what is left of one
    with pytest.raises(Exception, match="layers_7"):
        plain.apply({"params": folded["params"]}, X)


@pytest.mark.parametrize("name", ["cnn", pytest.param("resnet18", marks=pytest.mark.slow)])
def test_a_network_of_the_zoo_becomes_its_twin(name):
    model, x = models.create(name, norm="batch", width=0.25), X
    variables = trained(model, x)
    twin, new = warm_start(model, variables, [x], SPEC, axis_name=["data"])
    assert twin == model.clone(norm="deconv", spec=SPEC, axis_name=("data",))
    check_same(model, variables, (twin, new), x)
    shapes = jax.eval_shape(twin.init, jax.random.key(0), x)
    assert jax.tree.map(jnp.shape, new) == jax.tree.map(jnp.shape, shapes)


def test_norms_that_are_not_per_feature_or_not_what_they_seem_stay_as_they_are():
    model = Lookalikes()
    variables = trained(model)
    converted, new = warm_start(model, variables, [X], SPEC)
    check_same(model, variables, (converted, new), train=False)
    assert set(converted.report(X).kept) == {"gamma", "rows", "head"}


def test_a_spec_that_normalizes_samples_is_refused():
    spec = WhiteningSpec(local_norm="layer")
    for model, given in ((sequential(), spec), (models.create("cnn", "batch", spec=spec), None)):
        with pytest.raises(ValueError, match=r"`spec` must have no `local_norm` .* got 'layer'"):
            warm_start(model, {}, [X], given)


def test_a_function_that_would_be_another_is_refused():
    class Odd(OwnBatchNorm):
        @nn.compact
        def __call__(self, x):
            return nn.tanh(super().__call__(x))

    model = nn.Sequential([nn.Conv(3, (1, 1)), Odd(True), lambda x: x.mean((1, 2))])
    with pytest.raises(ValueError, match="`model` computes something else after conversion"):
        warm_start(model, trained(model), [X], SPEC, apply_kwargs={})
    same = nn.Sequential([nn.Conv(3, (1, 1)), GammaBatchNorm(True), lambda x: x.mean((1, 2))])
    converted, _ = warm_start(same, trained(same), [X], SPEC, apply_kwargs={})
    assert converted.report(X).kept == ("layers_1",)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "layout"), [("preact_resnet18", "full"), ("resnet18_imagenet", "original")]
)
def test_a_network_that_has_no_such_twin_is_wrapped(name, layout):
    x = np.random.default_rng(0).normal(size=(4, 32, 32, 3)).astype(np.float32)
    model = models.create(name, norm="batch", width=0.0625, layout=layout)
    variables = trained(model, x)
    converted, new = warm_start(model, variables, [x], SPEC)
    assert isinstance(converted, DeconvolvedModel)
    check_same(model, variables, (converted, new), x)


class Modulated(nn.Module):
    """A model of two arrays, one of which may come by name."""

    @nn.compact
    def __call__(self, x, shift, train: bool = False):
        x = nn.BatchNorm(not train)(nn.Conv(4, (3, 3))(x + shift))
        return (x * shift).mean((1, 2))


def test_models_may_take_several_arrays():
    model, shift = Modulated(), np.arange(1, 9, dtype=np.float32).reshape(8, 1, 1, 1)
    variables = trained(model, X, shift)
    pairs = [(X[:4], shift[:4]), (X[4:], shift[4:])]
    for batches, flags in ((pairs, {}), ([X], {"shift": shift})):
        converted, new = warm_start(model, variables, batches, SPEC, apply_kwargs=flags)
        assert converted.report(X, shift).dropped == ("BatchNorm_0",)
        check_same(model, variables, (converted, new), X, shift=shift)


def test_what_cannot_be_is_refused_in_words():
    with pytest.raises(TypeError, match="`spec` must be a WhiteningSpec, got 5"):
        warm_start(ResNet(), {}, [X], 5)  # pyright: ignore
    with pytest.raises(TypeError, match="`variables` must be nested dicts of arrays, got list"):
        warm_start(ResNet(), [X], [X])  # pyright: ignore
    with pytest.raises(TypeError, match="`batches` must be an iterable of batches, got int"):
        warm_start(ResNet(), {}, 3)  # pyright: ignore
    with pytest.raises(ValueError, match="`batches` must hold at least one batch"):
        warm_start(ResNet(), trained(ResNet()), [])
    for bare, shape in ((X, r"\(8, 8, 8, 3\)"), ({"image": X}, r"\{'image': \(8,")):
        with pytest.raises(ValueError, match=f"`batches` must be an iterable .* shape {shape}"):
            warm_start(ResNet(), {}, bare)
        with pytest.raises(ValueError, match="`batches` must be an iterable of batches"):
            recalibrate(DeconvConv(2, (1, 1)), {"batch_stats": {"mean": X}}, bare)
    with pytest.raises(TypeError, match=r"for NNX there is `netdeconv_jax\.nnx\.warm_start`"):
        warm_start(nnx.Linear(1, 1, rngs=nnx.Rngs(0)), {}, [X])  # pyright: ignore
    dense = nn.Dense(3)
    with pytest.raises(ValueError, match="`model` has no convolution to convert"):
        warm_start(dense, trained(dense), [X], apply_kwargs={})
    scanned = Stacked("scan")
    with pytest.raises(ValueError, match=r"under `nn\.scan` .* a warm start may `keep` them"):
        warm_start(scanned, trained(scanned), [X])


class Pair(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.Conv(4, (3, 3), use_bias=False, name="conv")(x)
        return nn.elu(nn.BatchNorm(not train, momentum=0.9, name="norm")(x))


JittedPair = nn.jit(Pair, static_argnums=(2,))


class Pairs(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool = True):
        for i in range(3):  # of which `nn.jit` traces two
            x = JittedPair(name=f"pair{i}")(x, train)
        return x.mean((1, 2))


def test_parts_that_are_jitted_are_converted_and_stay_what_they_are_in_the_model():
    model = Pairs()
    variables = trained(model)
    expected = model.apply(variables, X, train=False)
    found = warm_start(model, variables, [X], SPEC)
    check_same(model, variables, found, train=False)
    assert "whitener" in found[1]["batch_stats"]["pair2"]["conv"]
    np.testing.assert_array_equal(model.apply(variables, X, train=False), expected)
    step = [found[0].apply(found[1], X, mutable=["batch_stats"]) for _ in range(2)]
    jax.clear_caches()
    step.append(found[0].apply(found[1], X, mutable=["batch_stats"]))
    for other in step[1:]:
        jax.tree.map(np.testing.assert_array_equal, other, step[0])


class Auxiliary(nn.Module):
    """A head that only training runs."""

    @nn.compact
    def __call__(self, x, train: bool = True):
        x = nn.Conv(4, (3, 3), use_bias=False, name="conv")(x)
        x = nn.elu(nn.BatchNorm(not train, name="norm")(x))
        y = nn.Dense(3, name="head")(x.mean((1, 2)))
        if not train and not self.is_initializing():
            return y
        x = nn.Conv(4, (3, 3), use_bias=False, name="conv_aux")(x)
        x = nn.elu(nn.BatchNorm(not train, name="norm_aux")(x))
        return y, x.mean((1, 2))


def test_what_only_training_runs_stays_as_it_is():
    model = Auxiliary()
    variables = trained(model)
    converted, new = warm_start(model, variables, [X], SPEC)
    check_same(model, variables, (converted, new), train=False)
    (_, aux), _ = converted.apply(new, X, train=True, mutable=["batch_stats"])
    assert bool(jnp.isfinite(aux).all())
    report = converted.report(X)
    assert report.replaced == ("conv",)
    assert report.dropped == ("norm",)
    why = {entry.path: entry.why for entry in report.entries}
    assert (
        why["conv_aux"] == why["norm_aux"] == "not run in evaluation, where nothing is known of it"
    )
    for kind in ("params", "batch_stats"):
        for name in set(variables[kind]) & {"conv_aux", "norm_aux"}:
            jax.tree.map(np.testing.assert_array_equal, new[kind][name], variables[kind][name])
