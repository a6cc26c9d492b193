"""A folded NNX model: the same logits from a copy that is made of plain layers."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params

from netdeconv_jax import WhiteningSpec
from netdeconv_jax import nnx as dnnx
from netdeconv_jax.interop import fold


class Net(nnx.Module):
    """Groups, strides, dilation, a shared layer, containers, batch norms with and without a layer before."""

    def __init__(self, rngs):
        self.stem = dnnx.DeconvConv(3, 8, (3, 3), padding="CIRCULAR", block_size=4, rngs=rngs)
        self.shared = dnnx.DeconvConv(
            8, 8, (3, 1), feature_group_count=4, use_bias=False, rngs=rngs
        )
        self.again = self.shared
        plain = nnx.Conv(8, 8, (1, 1), use_bias=False, rngs=rngs)
        whitened = dnnx.DeconvConv(8, 8, (3, 3), 2, kernel_dilation=2, whiten="channels", rngs=rngs)
        self.blocks = nnx.List(
            [nnx.Sequential(plain, nnx.BatchNorm(8, rngs=rngs), nnx.relu), whitened]
        )
        self.behind_a_sum = nnx.BatchNorm(8, rngs=rngs)
        self.up = dnnx.DeconvConvTranspose(8, 8, (3, 2), (2, 3), transpose_kernel=True, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.head = dnnx.DeconvDense(8, 5, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.stem(x))
        x = self.again(nnx.relu(self.shared(x)))
        for block in self.blocks:
            x = block(x)
        x = self.up(nnx.relu(self.behind_a_sum(x + 1)))
        return self.head(self.drop(x.mean((1, 2))))


def with_statistics(model: Any, mean=0.3) -> Any:
    """The model with running statistics that no symmetry saves from a wrong index."""
    rng = np.random.default_rng(0)

    def leaf(path, like):
        noise = jnp.asarray(rng.normal(size=like.shape), like.dtype)
        if path[-1].key == "whitener":
            return like + noise / np.sqrt(like.shape[-1])
        return mean * noise if path[-1].key == "mean" else 0.5 + jnp.abs(noise)

    stats = nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))
    nnx.update(model, nnx.State(jax.tree.map_with_path(leaf, stats)))
    return model


@pytest.fixture(scope="module")
def trained() -> Any:
    """A network in training mode, and images."""
    net = with_statistics(Net(nnx.Rngs(0)))
    norm = net.blocks[0].layers[1]
    norm.scale[...], norm.bias[...] = jnp.linspace(0.5, 2, 8), jnp.linspace(-1, 1, 8)
    return net, 1 + jax.random.normal(jax.random.key(0), (4, 8, 8, 3))


def close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def primitives(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn.primitive.name
        for inner in jaxprs_in_params(eqn.params):
            yield from primitives(inner)


def test_a_copy_of_plain_layers_gives_the_same_logits(trained):
    net, x = trained
    before = jax.tree.map(jnp.copy, nnx.state(net, (nnx.Param, nnx.BatchStat)))
    plain, merged = fold(net), fold(net, x=jax.ShapeDtypeStruct(x.shape, x.dtype))
    after = nnx.state(net, (nnx.Param, nnx.BatchStat))
    jax.tree.map(np.testing.assert_array_equal, after, before)
    assert not net.drop.deterministic
    expected = jax.jit(nnx.view(net, deterministic=True, use_running_average=True))(x)

    for found in (plain, merged):
        close(jax.jit(found)(x), expected)
        assert isinstance(found, Net)
        assert isinstance(found.stem, nnx.Conv)
        assert isinstance(found.head, nnx.Linear)
        assert found.shared is found.again
        assert not nnx.state(found, dnnx.WhiteningStat)
    assert isinstance(plain.blocks[0].layers[1], nnx.BatchNorm)
    assert not isinstance(merged.blocks[0].layers[1], nnx.BatchNorm)
    assert isinstance(merged.behind_a_sum, nnx.BatchNorm)

    found = list(primitives(jax.make_jaxpr(lambda x: merged(x))(x).jaxpr))
    assert found.count("conv_general_dilated") == 6
    assert found.count("dot_general") == 1
    assert found.count("rsqrt") == 1  # of the batch norm that no convolution can take up


def test_a_folded_layer_takes_what_the_whitened_one_takes(trained):
    net, x = trained
    plain = fold(net.stem)
    np.testing.assert_array_equal(
        plain(x, use_running_average=True, mask=None), net.stem(x, use_running_average=True)
    )


def test_low_precision_is_rounded_as_in_evaluation():
    x = 30 + jax.random.normal(jax.random.key(0), (8, 6))
    layer = dnnx.DeconvDense(6, 4, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    with_statistics(layer, mean=30).eval()
    found = fold(layer)(x)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found, layer(x))


@pytest.mark.parametrize("mask", [None, jnp.ones((4, 6, 1, 1)).at[:, 4:].set(0)])
def test_samples_that_are_normalized_still_are(mask):
    rngs, spec = nnx.Rngs(0), WhiteningSpec(local_norm="layer")
    x = 1 + jax.random.normal(jax.random.key(0), (4, 6, 5, 4))
    for layer in (
        dnnx.DeconvConv(4, 6, (3, 3), spec=spec, rngs=rngs),
        dnnx.DeconvConvTranspose(4, 6, (3, 3), 2, spec=spec, rngs=rngs),
        dnnx.DeconvDense(4, 6, dtype=jnp.bfloat16, spec=spec, rngs=rngs),
    ):
        expected = with_statistics(layer)(x, use_running_average=True, mask=mask)
        found = fold(layer)(x, mask=mask)
        assert found.dtype == expected.dtype
        close(found, expected)


def test_an_output_that_others_read_keeps_its_batch_norm():
    class Residual(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(4, 4, rngs=rngs)
            self.norm = nnx.BatchNorm(4, rngs=rngs)

        def __call__(self, x):
            y = self.linear(x)
            return y + self.norm(y)

    net, x = Residual(nnx.Rngs(0)), jnp.ones((2, 4))
    folded = fold(net, x=x)
    assert isinstance(folded.norm, nnx.BatchNorm)
    net.eval()
    close(folded(x), net(x))


def test_a_norm_of_another_axis_stays():
    rngs = nnx.Rngs(0)
    net = nnx.Sequential(nnx.Linear(4, 4, rngs=rngs), nnx.BatchNorm(4, axis=1, rngs=rngs))
    x = jax.random.normal(jax.random.key(0), (2, 4, 4))
    folded = fold(with_statistics(net), x=x)
    assert isinstance(folded.layers[1], nnx.BatchNorm)
    net.eval()
    close(folded(x), net(x))


def test_what_cannot_be_folded_is_refused():
    with pytest.raises(ValueError, match="`variables` must be None for an NNX module"):
        fold(nnx.Linear(1, 1, rngs=nnx.Rngs(0)), {})  # pyright: ignore
    with pytest.raises(TypeError, match="`model` must be a Linen or an NNX module, got dict"):
        fold({})  # pyright: ignore
    with pytest.raises(TypeError, match="`model` must be a Linen or an NNX module, got NoneType"):
        fold(None, {}, jnp.ones((1, 4)))  # pyright: ignore

    @nnx.vmap(in_axes=0, out_axes=0)
    def stack(rngs):
        return dnnx.DeconvDense(4, 4, rngs=rngs)

    with pytest.raises(ValueError, match=r"kernel of shape \(3, 4, 4\) .* cannot be folded"):
        fold(stack(nnx.Rngs(0).split(3)))


class Rectified(dnnx.DeconvDense):
    def __call__(self, x, *args, **kwargs):
        return nnx.relu(super().__call__(x, *args, **kwargs))


class Tied(nnx.Module):
    def __init__(self, rngs):
        self.enc = dnnx.DeconvDense(4, 4, rngs=rngs)

    def __call__(self, x):
        return self.enc(x) @ self.enc.kernel[...].T


def test_what_is_not_a_layer_of_ours_alone_is_refused():
    rngs, x = nnx.Rngs(0), jax.random.normal(jax.random.key(0), (8, 4))
    with pytest.raises(ValueError, match=r"overrides DeconvDense.__call__"):
        fold(Rectified(4, 4, rngs=rngs))
    with pytest.raises(ValueError, match="below a SpectralNorm or WeightNorm"):
        fold(nnx.WeightNorm(dnnx.DeconvDense(4, 4, rngs=rngs), rngs=rngs))
    with pytest.raises(ValueError, match="something else after folding"):
        fold(with_statistics(Tied(rngs)), x=x)


def test_a_norm_behind_a_wrapped_layer_stays():
    rngs, x = nnx.Rngs(0), jax.random.normal(jax.random.key(0), (8, 4))
    wrapped = nnx.WeightNorm(nnx.Linear(4, 4, rngs=rngs), rngs=rngs)
    net = with_statistics(nnx.Sequential(wrapped, nnx.BatchNorm(4, rngs=rngs)))
    folded = fold(net, x=x)
    assert isinstance(folded.layers[1], nnx.BatchNorm)
    net.eval()
    close(folded(x), net(x))


def test_stacked_layers_and_norms_are_refused():
    @nnx.vmap(in_axes=0, out_axes=0)
    def stack(rngs):
        return nnx.Sequential(nnx.Linear(4, 4, rngs=rngs), nnx.BatchNorm(4, rngs=rngs))

    class Stacked(nnx.Module):
        def __init__(self, rngs):
            self.stack = stack(rngs.split(3))

        def __call__(self, x):
            return nnx.vmap(lambda net, x: net(x), in_axes=(0, None))(self.stack, x)

    with pytest.raises(ValueError, match=r"kernel of shape \(3, 4, 4\) .* cannot be folded"):
        fold(Stacked(nnx.Rngs(0)), x=jnp.ones((8, 4)))


class Half(nnx.Module):
    def __init__(self, rngs):
        half: Any = {"param_dtype": jnp.bfloat16, "rngs": rngs}
        self.conv = dnnx.DeconvConv(4, 8, (3, 3), **half)
        self.plain = nnx.Conv(8, 8, (1, 1), **half)
        self.norm = nnx.BatchNorm(8, **half)
        self.up = dnnx.DeconvConvTranspose(8, 8, (3, 3), 2, **half)
        self.wide = dnnx.DeconvDense(8, 8, dtype=jnp.float32, **half)
        self.head = dnnx.DeconvDense(8, 5, **half)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.plain(self.conv(x))))
        return self.head(self.wide(self.up(x)))


class HalfButForTheNorm(nnx.Module):
    def __init__(self, rngs):
        half: Any = {"param_dtype": jnp.bfloat16, "rngs": rngs}
        self.conv, self.norm = dnnx.DeconvConv(4, 8, (3, 3), **half), nnx.BatchNorm(8, **half)

    def __call__(self, x):
        return self.norm(self.conv(x))


def test_a_norm_with_statistics_in_float32_makes_the_answer_float32():
    net = with_statistics(HalfButForTheNorm(nnx.Rngs(0)))
    x = (2 + jax.random.normal(jax.random.key(0), (4, 6, 6, 4))).astype(jnp.bfloat16)
    folded = fold(net)
    net.eval()
    expected, found = net(x), folded(x)
    assert found.dtype == expected.dtype == jnp.float32
    assert jnp.abs(found - expected).max() < 0.02 * jnp.abs(expected).max()


@pytest.mark.parametrize("seen", [False, True])
def test_parameters_of_half_precision_cost_no_precision_where_computation_has_more(seen):
    net = with_statistics(Half(nnx.Rngs(0)))
    x = 2 + jax.random.normal(jax.random.key(0), (4, 6, 6, 4))
    folded = fold(net, x=x if seen else None)
    net.eval()
    close(folded(x), net(x))
    small = x.astype(jnp.bfloat16)
    expected = net.conv(small)
    found = folded.conv(small)
    assert found.dtype == expected.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        found.astype(jnp.float32),
        expected.astype(jnp.float32),
        rtol=0,
        atol=0.02 * abs(expected).max(),
    )
