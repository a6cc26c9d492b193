"""NNX models, converted by the rules that hold for Linen ones."""

import copy
import pickle
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

import netdeconv_jax
from netdeconv_jax import WhiteningSpec
from netdeconv_jax import nnx as dnnx
from netdeconv_jax.interop import fold

X = np.random.default_rng(0).normal(size=(4, 8, 8, 3)).astype(np.float32) + 0.5
# Whiteners of one size: what costs time here is compiling, shape by shape.
SPEC = WhiteningSpec(whiten="channels", block_size=4, sampling_stride=1, num_iters=2)


class CNN(nnx.Module):
    """Two convolutions with norms and pools and two dense layers, as tutorials have it."""

    def __init__(self, rngs: nnx.Rngs):
        self.conv1 = nnx.Conv(3, 4, kernel_size=(3, 3), rngs=rngs)
        self.norm1 = nnx.BatchNorm(4, rngs=rngs)
        self.conv2 = nnx.Conv(4, 4, kernel_size=(3, 3), use_bias=False, rngs=rngs)
        self.norm2 = nnx.BatchNorm(4, rngs=rngs)
        self.pool = partial(nnx.avg_pool, window_shape=(2, 2), strides=(2, 2))
        self.linear1 = nnx.Linear(16, 8, rngs=rngs)
        self.linear2 = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        x = self.pool(nnx.relu(self.norm1(self.conv1(x))))
        x = self.pool(nnx.relu(self.norm2(self.conv2(x))))
        return self.linear2(nnx.relu(self.linear1(x.reshape(len(x), -1))))


class Block(nnx.Module):
    """Pre-activation in front, a norm that starts at zero at the end, layers in lists and dicts."""

    def __init__(self, rngs: nnx.Rngs):
        self.first = nnx.BatchNorm(4, rngs=rngs)
        self.convs = nnx.List(nnx.Conv(4, 4, (1, 1), use_bias=False, rngs=rngs) for _ in range(2))
        self.norms = nnx.Dict(
            inner=nnx.BatchNorm(4, rngs=rngs),
            last=nnx.BatchNorm(4, scale_init=nnx.initializers.zeros, rngs=rngs),
        )

    def __call__(self, x):
        y = nnx.relu(self.first(x))
        y = nnx.relu(self.norms.inner(self.convs[0](y)))
        return x + self.norms.last(self.convs[1](y))


class Deep(nnx.Module):
    """A block that runs twice, so that its layers are shared."""

    def __init__(self, rngs: nnx.Rngs):
        self.stem = nnx.Conv(3, 4, (1, 1), rngs=rngs)
        self.block = Block(rngs)
        self.again = self.block

    def __call__(self, x):
        return self.again(self.block(self.stem(x)))


def test_a_tutorial_model_is_converted_and_the_given_one_stays():
    net = CNN(nnx.Rngs(0))
    before = jax.tree.map(np.array, nnx.state(net))
    model: Any = dnnx.deconvolve(net, SPEC)
    assert type(model) is CNN
    assert [type(one) for one in (model.conv1, model.conv2)] == [dnnx.FormerConv] * 2
    assert [type(one) for one in (model.norm1, model.norm2)] == [dnnx.FormerNorm] * 2
    assert type(model.linear1) is nnx.Linear
    assert type(net.conv1) is nnx.Conv
    assert isinstance(model.conv1, dnnx.DeconvConv)
    model(X)  # in training: what it moves is its own
    jax.tree.map(np.testing.assert_array_equal, nnx.state(net), before)
    np.testing.assert_array_equal(model.conv1.kernel[...], net.conv1.kernel[...])
    assert model.conv1.kernel is not net.conv1.kernel
    assert nnx.state(model)["conv2"]["bias"][...].shape == (
        4,
    )  # which the convolution did not have
    assert len(jax.tree.leaves(nnx.state(model, nnx.BatchStat))) == 4


def test_arrays_are_those_of_the_linen_conversion():
    conv: Any = {"kernel_size": (3, 3), "strides": (2, 1), "padding": "VALID"}
    linen = netdeconv_jax.deconvolve(nn.Conv(4, use_bias=False, **conv), SPEC)
    model = dnnx.deconvolve(nnx.Conv(3, 4, use_bias=False, **conv, rngs=nnx.Rngs(0)), SPEC)
    params = {"kernel": model.kernel[...], "bias": model.bias[...]}
    variables = {**linen.init(jax.random.key(0), X), "params": params}
    y, updates = linen.apply(variables, X, mutable=["batch_stats"])
    np.testing.assert_array_equal(model(X), y)
    for name, value in updates["batch_stats"].items():
        np.testing.assert_array_equal(getattr(model, name)[...], value)
    model.eval()
    np.testing.assert_array_equal(model(X), linen.apply({"params": params, **updates}, X))


def test_the_report_is_that_of_the_linen_rules():
    report = dnnx.conversion_report(Deep(nnx.Rngs(0)), X)
    assert report.replaced == ("stem", "again/convs/0", "again/convs/1")
    assert report.dropped == ("again/first", "again/norms/inner", "again/norms/last")
    why = {entry.path: entry.why for entry in report.entries}
    assert "pre-activation" not in why["again/norms/inner"]
    assert why["again/norms/last"].startswith("follows again/convs/1, which whitens; started at")
    net = CNN(nnx.Rngs(0))
    report = dnnx.conversion_report(net, X, dense="linear1", keep=("norm1", "conv2"))
    assert report.kept == ("norm1", "conv2", "norm2", "linear2")
    assert report.replaced == ("conv1", "linear1")
    model = dnnx.deconvolve(net, SPEC, dense="linear1", keep=("norm1", "conv2"))
    assert type(model.norm1) is nnx.BatchNorm
    assert type(model.norm2) is dnnx.FormerNorm  # what it follows is not known
    assert type(model.conv2) is nnx.Conv
    assert type(model.linear1) is dnnx.FormerLinear
    assert model.linear1.effective_block == 16  # not four, as of the convolutions


def test_blocks_start_as_the_identity_and_share_what_they_shared():
    model = dnnx.deconvolve(Deep(nnx.Rngs(0)), SPEC)
    assert model.block is model.again
    block = model.block
    assert block.norms.last.scale.shape == ()
    assert block.norms.inner.scale is None
    y = model.stem(X, use_running_average=True)
    np.testing.assert_array_equal(block(y), y)
    grads = nnx.grad(lambda block: jnp.sum(jnp.sin(block(y))))(block)
    assert grads["norms"]["last"]["scale"][...] != 0
    assert not grads["convs"][0]["kernel"][...].any()


def test_it_trains_evaluates_and_goes_through_split_and_merge():
    model = dnnx.deconvolve(CNN(nnx.Rngs(0)), SPEC)
    optimizer = nnx.Optimizer(model, optax.sgd(0.3, 0.9), wrt=nnx.Param)
    labels = jnp.arange(4) % 3

    @nnx.jit
    def step(model, optimizer):
        def loss_fn(model):
            losses = optax.softmax_cross_entropy_with_integer_labels(model(X), labels)
            return losses.mean()

        loss, grads = nnx.value_and_grad(loss_fn)(model)
        optimizer.update(model, grads)
        return loss

    losses = [float(step(model, optimizer)) for _ in range(15)]
    assert losses[-1] < 0.5 * losses[0]
    model.eval()
    assert model.conv1.use_running_average
    graphdef, state = nnx.split(model)
    mean = model.conv1.mean[...]
    expected = jax.jit(lambda state: nnx.merge(graphdef, state)(X))(state)
    np.testing.assert_allclose(model(X), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(model.conv1.mean[...], mean)
    assert jnp.abs(mean).min() > 0


def test_the_mode_at_first_is_that_of_the_batch_norms_unless_it_is_given():
    net = CNN(nnx.Rngs(0))
    assert not dnnx.deconvolve(net).conv1.use_running_average
    net.eval()
    assert dnnx.deconvolve(net).conv1.use_running_average
    assert not dnnx.deconvolve(net, use_running_average=False).conv1.use_running_average


def test_stacked_blocks_are_converted_with_their_axes():
    @nnx.split_rngs(splits=3)
    @nnx.vmap(in_axes=0, out_axes=0)
    def make(rngs):
        return Block(rngs)

    blocks = dnnx.deconvolve(make(nnx.Rngs(0)), SPEC)
    assert blocks.convs[0].whitener.shape == (3, 4, 4)
    assert blocks.convs[0].bias.shape == (3, 4)
    assert blocks.norms.last.scale.shape == (3,)

    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    def run(x, block):
        return block(x)

    y = run(jnp.asarray(X[..., [0, 1, 2, 2]]), blocks)
    np.testing.assert_array_equal(y, X[..., [0, 1, 2, 2]])
    whiteners = blocks.convs[0].whitener[...]
    assert jnp.abs(whiteners - np.broadcast_to(np.eye(4), (3, 4, 4))).max() > 1e-3


def test_what_is_no_plain_layer_stays():
    class Standardized(nnx.Conv):
        def __call__(self, x):
            return super().__call__(x - x.mean())

    rngs = nnx.Rngs(0)
    net = nnx.Sequential(
        Standardized(3, 4, (3, 3), rngs=rngs),
        nnx.Conv(4, 4, (1, 1), mask=jnp.ones((1, 1, 4, 4)), rngs=rngs),
    )
    why = [entry.why for entry in dnnx.conversion_report(net, X).entries]
    assert why == ["Standardized has a `__call__` of its own", "has a mask of its kernel"]
    with pytest.raises(ValueError, match="`keep` names no layer of the model: 'conv9'"):
        dnnx.deconvolve(net, keep="conv9")
    with pytest.raises(TypeError, match="`model` must be an NNX module, got Dense"):
        dnnx.deconvolve(nn.Dense(3))
    with pytest.raises(TypeError, match=r"there is `netdeconv_jax\.nnx\.deconvolve`"):
        netdeconv_jax.deconvolve(net)  # pyright: ignore


class Active(nnx.Conv):
    """An heir that calls what it inherits, under another name too."""

    def __init__(self, *args, slope, rngs, **kwargs):
        super().__init__(*args, rngs=rngs, **kwargs)
        self.slope = nnx.Param(jnp.full((), slope))

    def activate(self, x):
        return nnx.leaky_relu(self(x), self.slope[...])

    def inherited(self, x):
        return super().__call__(x)


def test_heirs_keep_their_methods_and_attributes():
    rngs = nnx.Rngs(0)
    net: Any = Active(3, 4, (3, 3), slope=0.5, padding="VALID", rngs=rngs)
    (entry,) = dnnx.conversion_report(net, X).entries
    assert (entry.kind, entry.action, entry.why) == ("Active", "replaced", "by DeconvConv")
    model = dnnx.deconvolve(net, SPEC)
    assert type(net) is Active
    assert isinstance(model, Active)
    assert isinstance(model, dnnx.FormerConv)
    assert type(model).__name__ == "FormerActive"
    assert type(dnnx.deconvolve(net)) is type(model)
    y = model(X)
    assert jnp.abs(y - net(jnp.asarray(X))).max() > 0.1
    np.testing.assert_array_equal(model.activate(X), jax.nn.leaky_relu(y, 0.5))
    np.testing.assert_array_equal(model.inherited(X), y)  # whitens too
    for copied in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert type(copied) is type(model)
        np.testing.assert_array_equal(copied(X), y)
    model.eval()
    y = model.activate(X)
    for again in (nnx.merge(*nnx.split(model)), copy.deepcopy(model), nnx.clone(model)):
        assert type(again) is type(model)
        np.testing.assert_array_equal(again.activate(X), y)
    np.testing.assert_allclose(nnx.jit(lambda model, x: model.activate(x))(model, X), y, rtol=1e-5)
    np.testing.assert_allclose(fold(model)(X), model(X), rtol=0, atol=1e-5)
    report = dnnx.conversion_report(nnx.Sequential(model, nnx.BatchNorm(4, rngs=rngs)), X)
    assert not report.replaced  # twice is once


@pytest.mark.parametrize("attribute", ["spec", "groups", "set_view"])
def test_heirs_with_names_that_whitening_needs_stay(attribute):
    class Heir(nnx.Conv):
        pass

    net: Any = Heir(3, 4, (1, 1), rngs=nnx.Rngs(0))
    setattr(net, attribute, 3)
    (entry,) = dnnx.conversion_report(net, X).entries
    assert entry.why == f"Heir has a `{attribute}` of its own, a name that whitening needs"
    assert type(dnnx.deconvolve(net)) is Heir


def test_attributes_of_layers_are_there_to_read():
    settings: Any = {
        "kernel_size": (3, 2),
        "strides": (2, 1),
        "padding": ((1, 1), (0, 1)),
        "kernel_dilation": (1, 2),
    }
    rngs = nnx.Rngs(0)
    for layer in (
        nnx.Conv(3, 4, input_dilation=2, feature_group_count=1, **settings, rngs=rngs),
        nnx.ConvTranspose(3, 4, transpose_kernel=True, **settings, rngs=rngs),
        nnx.Linear(3, 4, rngs=rngs),
    ):
        model: Any = dnnx.deconvolve(layer, SPEC, dense=True)
        assert isinstance(model, type(layer))
        assert model(jnp.asarray(X)).shape == layer(jnp.asarray(X)).shape
        for name, value in vars(layer).items():
            if not name.startswith("_pytree") and name not in ("kernel", "bias", "dot_general"):
                assert getattr(model, name) == value


class Homegrown(nnx.Module):
    """A layer of one's own, and what else it returns."""

    def __init__(self, pair):
        self.weight, self.pair = nnx.Param(jnp.ones((3, 4))), pair

    def __call__(self, x):
        y = x @ self.weight[...]
        return (y, 1.0) if self.pair else y


@pytest.mark.parametrize("kind", ["Einsum", "Homegrown"])
def test_a_layer_of_another_kind_stays_and_so_does_its_norm(kind):
    rngs = nnx.Rngs(0)
    if kind == "Einsum":
        layer = nnx.Einsum("nhwi,ij->nhwj", (3, 4), (4,), rngs=rngs)
    else:
        layer = Homegrown(pair=False)
    net = nnx.Sequential(layer, nnx.BatchNorm(4, rngs=rngs), nnx.Conv(4, 4, (1, 1), rngs=rngs))
    stays, norm, conv = dnnx.conversion_report(net, X).entries
    assert (stays.action, stays.why) == ("kept", f"{kind} is not converted")
    assert norm.why.startswith("follows layers/0, which does not whiten")
    assert conv.action == "replaced"
    assert type(dnnx.deconvolve(net, SPEC, X).layers[1]) is nnx.BatchNorm
    assert dnnx.conversion_report(Homegrown(pair=True), X).kept == ("",)


def test_computation_in_bfloat16_stays_in_bfloat16():
    rngs = nnx.Rngs(0)
    net = nnx.Sequential(
        nnx.Conv(3, 4, (1, 1), dtype=jnp.bfloat16, rngs=rngs),
        nnx.BatchNorm(4, dtype=jnp.bfloat16, rngs=rngs),
    )
    model = dnnx.deconvolve(net, SPEC)
    assert model(X).dtype == jnp.bfloat16
    assert model.layers[0].whitener[...].dtype == jnp.float32


class ConvBN(nnx.Module):
    """A block with settings of the same names as those of a batch norm."""

    def __init__(self, rngs: nnx.Rngs):
        self.use_running_average, self.momentum, self.epsilon = False, 0.9, 1e-5
        self.conv = nnx.Conv(3, 4, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)

    def __call__(self, x):
        return self.norm(x=self.conv(inputs=x), mask=None)


class BNReLU(nnx.BatchNorm):
    """An heir that does more than its parent."""

    def __call__(self, x, **kwargs):
        return nnx.relu(super().__call__(x, **kwargs))


def test_what_only_looks_like_a_batch_norm_is_not_taken_for_one():
    model = dnnx.deconvolve(ConvBN(nnx.Rngs(0)), SPEC)
    assert type(model.conv) is dnnx.FormerConv
    assert type(model.norm) is dnnx.FormerNorm
    heir = nnx.Sequential(nnx.Conv(3, 4, (1, 1), rngs=nnx.Rngs(0)), BNReLU(4, rngs=nnx.Rngs(0)))
    assert type(dnnx.deconvolve(heir, SPEC).layers[1]) is BNReLU
    entry = dnnx.conversion_report(heir, X).entries[1]
    assert (entry.action, entry.why) == ("kept", "BNReLU has a `__call__` of its own")


def test_layers_are_called_as_those_in_whose_place_they_stand():
    net = ConvBN(nnx.Rngs(0))
    assert dnnx.conversion_report(net, x=X).dropped == ("norm",)
    model = dnnx.deconvolve(net, SPEC, use_running_average=True)
    images = (20 * X).astype(np.int32)
    np.testing.assert_array_equal(model(images), model(images.astype(np.float32)))
    plain = fold(model, x=images)
    np.testing.assert_allclose(plain(images), model(images), rtol=1e-4, atol=1e-4)
    dense = dnnx.deconvolve(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), dense=True)
    np.testing.assert_array_equal(dense(inputs=X), dense(X))
    with pytest.raises(ValueError, match="`out_sharding` must be None"):
        dense(X, out_sharding="x")


def test_the_report_takes_flags():
    class Flagged(nnx.Module):
        def __init__(self, rngs):
            self.conv = nnx.Conv(3, 4, (1, 1), rngs=rngs)

        def __call__(self, x, train, *, scale):
            return self.conv(x) * scale if train else x

    net = Flagged(nnx.Rngs(0))
    scale = jax.ShapeDtypeStruct((), jnp.float32)
    assert dnnx.conversion_report(net, X, True, scale=scale).replaced == ("conv",)
    assert not dnnx.conversion_report(net, X, False, scale=scale).entries


def test_norms_behind_layers_that_stay_are_kept_where_an_input_tells():
    class Net(nnx.Module):
        def __init__(self, rngs):
            mask = jnp.ones((2, 2, 3, 4))
            self.up = nnx.ConvTranspose(3, 4, (2, 2), mask=mask, rngs=rngs)
            self.norm = nnx.BatchNorm(4, rngs=rngs)
            self.wrapped = nnx.WeightNorm(nnx.Conv(4, 4, (1, 1), rngs=rngs), rngs=rngs)
            self.conv = nnx.Conv(4, 4, (1, 1), rngs=rngs)
            self.last = nnx.BatchNorm(4, rngs=rngs)
            self.unused = nnx.BatchNorm(4, rngs=rngs)

        def __call__(self, x, train):
            x = self.norm(self.up(x)) if train else x
            return self.last(self.conv(self.wrapped(x)))

    net = Net(nnx.Rngs(0))
    up, norm, wrapped, conv, last = dnnx.conversion_report(net, X, train=True).entries
    assert (up.action, up.why) == ("kept", "has a mask of its kernel")
    assert norm.action == "kept"
    assert norm.why.startswith("follows up, which does not whiten; `deconvolve` must be given")
    assert wrapped.path == "wrapped/layer_instance"
    assert wrapped.why.startswith("below a SpectralNorm or WeightNorm")
    assert (conv.action, last.action) == ("replaced", "dropped")
    shape = jax.ShapeDtypeStruct(X.shape, X.dtype)
    model = dnnx.deconvolve(net, SPEC, shape, train=True)
    assert type(model.norm) is nnx.BatchNorm
    assert type(model.last) is type(model.unused) is dnnx.FormerNorm
    assert type(model.wrapped.layer_instance) is nnx.Conv
    assert type(net.up) is nnx.ConvTranspose  # the trace has left nothing behind
    blind = dnnx.deconvolve(net, SPEC)
    assert type(blind.norm) is dnnx.FormerNorm


@pytest.mark.parametrize("flipped", [False, True])
def test_transposed_convolutions_are_those_of_the_linen_conversion(flipped):
    conv: Any = {
        "kernel_size": (4, 3),
        "strides": (2, 1),
        "padding": ((2, 1), (0, 1)),
        "kernel_dilation": (1, 2),
        "transpose_kernel": flipped,
        "use_bias": False,
    }
    linen = netdeconv_jax.deconvolve(nn.ConvTranspose(4, **conv), SPEC)
    net = nnx.ConvTranspose(3, 4, **conv, rngs=nnx.Rngs(0))
    model = dnnx.deconvolve(net, SPEC)
    np.testing.assert_array_equal(model.kernel[...], net.kernel[...])
    params = {"kernel": model.kernel[...], "bias": model.bias[...]}
    variables = {**linen.init(jax.random.key(0), X), "params": params}
    y, updates = linen.apply(variables, X, mutable=["batch_stats"])
    np.testing.assert_array_equal(model(inputs=X), y)
    for name, value in updates["batch_stats"].items():
        np.testing.assert_array_equal(getattr(model, name)[...], value)
    model.eval()
    np.testing.assert_array_equal(model(X), linen.apply({"params": params, **updates}, X))
    np.testing.assert_allclose(fold(model)(X), model(X), rtol=0, atol=1e-5)


def test_a_norm_behind_a_transposed_convolution_is_dropped():
    rngs = nnx.Rngs(0)
    up = nnx.ConvTranspose(3, 4, (2, 2), 2, rngs=rngs)
    net = nnx.Sequential(up, nnx.BatchNorm(4, rngs=rngs), nnx.relu)
    layer, norm = dnnx.conversion_report(net, X).entries
    assert (layer.action, layer.why) == ("replaced", "by DeconvConvTranspose")
    assert (norm.action, norm.why) == ("dropped", "follows layers/0, which whitens")
    assert dnnx.deconvolve(net, SPEC)(X).shape == (4, 16, 16, 4)


def test_the_report_knows_layers_under_transforms():
    @nnx.split_rngs(splits=3)
    @nnx.vmap(in_axes=0, out_axes=0)
    def make(rngs):
        return Block(rngs)

    class Deep(nnx.Module):
        def __init__(self, rngs):
            self.blocks = make(rngs)

        def __call__(self, x):
            run = nnx.scan(lambda x, block: block(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
            return run(x, self.blocks)

    report = dnnx.conversion_report(Deep(nnx.Rngs(0)), X[..., [0, 1, 2, 2]])
    assert report.replaced == ("blocks/convs/0", "blocks/convs/1")
    why = {entry.path: entry.why for entry in report.entries}
    assert why["blocks/norms/inner"] == "follows blocks/convs/0, which whitens"
    assert why["blocks/first"].startswith("pre-activation")


def test_scales_that_do_not_say_where_they_start_are_refused():
    norm = nnx.BatchNorm(4, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"convert outside of `nnx\.jit`"):
        nnx.jit(dnnx.deconvolve)(norm)
    abstract = nnx.eval_shape(lambda: nnx.BatchNorm(4, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="whose scale is traced or abstract"):
        dnnx.deconvolve(abstract)
    assert dnnx.deconvolve(norm).scale is None
