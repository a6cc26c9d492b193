"""NNX models trained with batch norm, converted: the same function, before any fine-tuning."""

import gc
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

from netdeconv_jax import WhiteningSpec
from netdeconv_jax import nnx as dnnx
from netdeconv_jax.interop import fold, warm_start

X = np.random.default_rng(0).normal(size=(8, 8, 8, 3)).astype(np.float32) + 0.5
# Whiteners of one size: what costs time here is compiling, shape by shape.
SPEC = WhiteningSpec(whiten="channels", block_size=4, sampling_stride=1, num_iters=2)


class Norm(nnx.Module):
    """A batch norm of one's own, with no scale, and perhaps more than one."""

    def __init__(self, features, odd=False):
        self.use_running_average, self.momentum, self.epsilon = False, 0.9, 1e-3
        self.odd = odd
        self.mean, self.var = (nnx.BatchStat(fill((features,))) for fill in (jnp.zeros, jnp.ones))
        self.bias = nnx.Param(jnp.zeros(features))

    def __call__(self, inputs):
        lift = (1,) * (inputs.ndim - 1) + (-1,)
        scale = jax.lax.rsqrt(self.var[...] + self.epsilon)
        y = (inputs - self.mean[...].reshape(lift)) * scale.reshape(lift)
        y = y + self.bias[...].reshape(lift)
        return jnp.tanh(y) if self.odd else y


class Net(nnx.Module):
    """Norms behind convolutions of every kind, in front of one, on rows, behind a layer that runs twice."""

    def __init__(self, rngs, strides=1, odd=False, dtype=None):
        settings: Any = {"rngs": rngs, "dtype": dtype}
        self.stem = nnx.Conv(3, 4, (3, 3), 2, use_bias=False, **settings)
        self.stem_norm = nnx.BatchNorm(4, use_scale=False, **settings)
        self.grouped = nnx.Conv(4, 8, (3, 3), feature_group_count=2, **settings)
        self.own = Norm(8, odd)
        self.first = nnx.BatchNorm(8, **settings)
        self.up = nnx.ConvTranspose(8, 4, (2, 3), strides, transpose_kernel=True, **settings)
        self.up_norm = nnx.BatchNorm(4, **settings)
        self.twice = nnx.Conv(4, 4, (1, 1), **settings)
        self.twice_norm = nnx.BatchNorm(4, **settings)
        self.rows = nnx.BatchNorm(4 * strides, axis=1, **settings)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.head = nnx.Linear(4, 5, **settings)
        self.unused = nnx.BatchNorm(4, **settings)

    def __call__(self, x, scale=1.0):
        x = nnx.relu(self.stem_norm(self.drop(self.stem(x))))
        x = nnx.relu(self.own(inputs=self.grouped(x)))
        x = nnx.relu(self.first(x + 1))
        x = nnx.relu(self.up_norm(self.up(x)))
        x = self.twice_norm(self.twice(nnx.relu(self.twice(x))))
        return scale * self.head(self.rows(x).mean((1, 2)))


def trained(net: Any, seed=1) -> Any:
    """The model with variables that no symmetry saves from a wrong index, in the ranges of trained ones."""
    rng = np.random.default_rng(seed)

    def leaf(path, like):
        kind, noise = path[-1].key, rng.normal(size=like.shape)
        if kind == "kernel":
            noise = noise / np.sqrt(np.prod(like.shape[:-1]))
        return jnp.asarray(np.abs(noise) + 0.5 if kind in ("var", "scale") else noise, like.dtype)

    arrays = nnx.to_pure_dict(nnx.state(net, (nnx.Param, nnx.BatchStat)))
    nnx.update(net, nnx.State(jax.tree.map_with_path(leaf, arrays)))
    return net


def check_same(net, model, tolerance=1e-4, **flags):
    old, new = (nnx.view(one, deterministic=True, use_running_average=True) for one in (net, model))
    expected, found = (np.asarray(one(X, **flags), np.float32) for one in (old, new))
    assert np.ptp(expected, axis=0).max() > 1e-2
    scale = np.abs(expected).max()
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * max(1, scale))


FOLDED = {"stem_norm", "own"}


@pytest.mark.parametrize("strides", [1, 2])
def test_a_converted_model_computes_what_it_computed(strides):
    net = trained(Net(nnx.Rngs(0), strides))
    before = jax.tree.map(jnp.copy, nnx.state(net, (nnx.Param, nnx.BatchStat)))
    model: Any = dnnx.warm_start(net, [X[:4], X[4:]], SPEC, call_kwargs={"scale": 2.0})
    after = nnx.state(net, (nnx.Param, nnx.BatchStat))
    jax.tree.map(np.testing.assert_array_equal, after, before)
    assert not model.stem.use_running_average  # as the model given
    assert not model.drop.deterministic
    check_same(net, model, scale=2.0)
    report = dnnx.conversion_report(net, X, warm=True)
    whitened = {"stem", "grouped", "twice"} | ({"up"} if strides == 1 else set())
    gone = FOLDED | ({"up_norm"} if strides == 1 else set())
    assert set(report.replaced) == whitened
    assert set(report.dropped) == gone
    why = {entry.path: entry.why for entry in report.entries}
    assert all("cannot be folded" in why[path] for path in ("first", "twice_norm", "rows"))
    if strides == 2:
        assert "each need a bias of its own" in why["up"]
    for path in whitened:
        layer = getattr(model, path)
        assert isinstance(layer, dnnx.DeconvConv | dnnx.DeconvConvTranspose)
        whitener = np.asarray(layer.whitener[...])
        assert np.abs(whitener - np.eye(whitener.shape[-1])).max() > 1e-3
    for path in gone:
        assert type(getattr(model, path)) is dnnx.FormerNorm
        assert getattr(model, path).scale is None
    for path in {"first", "twice_norm", "rows", "unused"}:
        kept, given = getattr(model, path), getattr(net, path)
        assert type(kept) is nnx.BatchNorm
        np.testing.assert_array_equal(kept.mean[...], given.mean[...])
    model.eval()
    np.testing.assert_allclose(fold(model)(X), model(X), rtol=0, atol=1e-4)


def test_numbers_are_those_of_the_linen_warm_start():
    conv: Any = {"kernel_size": (3, 3), "strides": (2, 1), "feature_group_count": 1}
    rngs = nnx.Rngs(0)
    layers = nnx.Conv(3, 4, **conv, rngs=rngs), nnx.BatchNorm(4, rngs=rngs)
    net = trained(nnx.Sequential(*layers, lambda x: x.mean((1, 2))))
    parts = [X[:2], X[2:]]
    model: Any = dnnx.warm_start(net, parts, SPEC)
    linen = nn.Sequential([nn.Conv(4, **conv), nn.BatchNorm(True), lambda x: x.mean((1, 2))])
    state = nnx.to_pure_dict(nnx.state(net, (nnx.Param, nnx.BatchStat)))["layers"]
    norm = state[1]
    variables = {
        "params": {"layers_0": state[0], "layers_1": {k: norm[k] for k in ("scale", "bias")}},
        "batch_stats": {"layers_1": {k: norm[k] for k in ("mean", "var")}},
    }
    _, expected = warm_start(linen, variables, parts, SPEC, apply_kwargs={})
    for collection in ("params", "batch_stats"):
        for name, value in expected[collection]["layers_0"].items():
            found = getattr(model.layers[0], name)[...]
            np.testing.assert_allclose(found, value, rtol=1e-5, atol=1e-6)


def test_it_does_so_with_dense_layers_exact_roots_and_a_freeze_schedule():
    spec = WhiteningSpec(method="eigh", shared_whitener=False, block_size=2, freeze_schedule=(1, 3))
    net = trained(Net(nnx.Rngs(0)))
    model: Any = dnnx.warm_start(net, [X], spec, dense=True, keep="grouped", axis_name="data")
    check_same(net, model)
    assert type(model.head) is dnnx.FormerLinear
    assert type(model.grouped) is nnx.Conv
    assert type(model.own) is Norm
    assert model.stem.spec == spec
    assert model.stem.axis_name == "data"
    assert model.stem.step[...] == 0


def test_it_trains_on_from_there():
    net = trained(Net(nnx.Rngs(0)))
    model: Any = dnnx.warm_start(net, [X], SPEC)
    before = model.stem.whitener[...]
    model(X)
    assert jnp.abs(model.stem.whitener[...] - before).max() < 1e-3  # of the very batch
    grads = nnx.grad(lambda model: jnp.sum(model(X) ** 2))(model)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
    assert grads["stem"]["kernel"][...].any()


def test_computation_in_bfloat16_stays_near():
    net = trained(Net(nnx.Rngs(0), dtype=jnp.bfloat16))
    model: Any = dnnx.warm_start(net, [X], SPEC)
    check_same(net, model, tolerance=5e-2)
    assert model.stem.kernel[...].dtype == jnp.float32


@pytest.mark.parametrize("running", [True, False])
def test_without_batch_norms_the_mode_is_that_of_dropout(running):
    rngs = nnx.Rngs(0)
    net = nnx.Sequential(nnx.Conv(3, 4, (3, 3), rngs=rngs), nnx.Dropout(0.5, rngs=rngs))
    net.eval() if running else net.train()
    model = dnnx.warm_start(net, [X])
    assert model.layers[0].use_running_average is running
    assert model.layers[1].deterministic is running


class Modulated(nnx.Module):
    """A model of two arrays."""

    def __init__(self, rngs):
        self.conv, self.norm = nnx.Conv(3, 4, (3, 3), rngs=rngs), nnx.BatchNorm(4, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x, shift):
        return (self.norm(self.conv(self.drop(x) + shift)) * shift).mean((1, 2))


def test_models_may_take_several_arrays():
    net, shift = trained(Modulated(nnx.Rngs(0))), np.arange(1, 9, dtype="f").reshape(8, 1, 1, 1)
    pairs: Any = [(X[:4], shift[:4]), (X[4:], shift[4:])]
    for batches, flags in ((pairs, {}), ([X], {"shift": shift})):
        model = dnnx.warm_start(net, batches, SPEC, call_kwargs=flags)
        assert type(model.norm) is dnnx.FormerNorm
        check_same(net, model, shift=shift)


def test_nothing_is_left_behind():
    def classes(kind) -> int:
        return sum(1 + classes(heir) for heir in type.__subclasses__(kind))

    net, sizes = trained(nnx.Conv(3, 4, (1, 1), rngs=nnx.Rngs(0))), []
    for _ in range(3):
        dnnx.warm_start(net, [X], SPEC)
        gc.collect()
        sizes.append((len(jax.live_arrays()), classes(nnx.Module)))
    assert sizes[1] == sizes[2]  # the first compiles what the others reuse


def test_what_cannot_be_is_refused_in_words():
    net = Net(nnx.Rngs(0))
    with pytest.raises(ValueError, match="`model` computes something else after conversion"):
        dnnx.warm_start(trained(Net(nnx.Rngs(0), odd=True)), [X], SPEC)
    with pytest.raises(ValueError, match="`batches` must hold at least one batch"):
        dnnx.warm_start(net, [], SPEC)
    with pytest.raises(
        ValueError, match=r"`batches` must be an iterable of batches.*\(8, 8, 8, 3\)"
    ):
        dnnx.warm_start(net, X, SPEC)
    with pytest.raises(ValueError, match="`spec` must have no `local_norm` for a warm start"):
        dnnx.warm_start(net, [X], WhiteningSpec(local_norm="layer"))
    with pytest.raises(TypeError, match="`spec` must be a WhiteningSpec, got 5"):
        dnnx.warm_start(net, [X], 5)  # pyright: ignore
    with pytest.raises(TypeError, match="`model` must be an NNX module, got Dense"):
        dnnx.warm_start(nn.Dense(3), [X])
    with pytest.raises(ValueError, match="`model` has no convolution to convert"):
        dnnx.warm_start(nnx.Linear(3, 3, rngs=nnx.Rngs(0)), [X])
    with pytest.raises(ValueError, match="`keep` names no layer of the model: 'conv9'"):
        dnnx.warm_start(net, [X], keep="conv9")

    class Stacked(nnx.Module):
        def __init__(self, rngs):
            make = nnx.vmap(lambda rngs: nnx.Conv(3, 3, (1, 1), rngs=rngs), in_axes=0, out_axes=0)
            self.convs = make(rngs.split(2))

        def __call__(self, x):
            run = nnx.scan(lambda x, conv: conv(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
            return run(x, self.convs)

    with pytest.raises(ValueError, match=r"shape \(2, 1, 1, 3, 3\) at 'convs'.*nnx\.vmap"):
        dnnx.warm_start(Stacked(nnx.Rngs(0)), [X], SPEC)
