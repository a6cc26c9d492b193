"""Any Linen module folded: its own `apply` with plain layers, and what cannot be folded."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import traverse_util
from jax.extend.core import jaxprs_in_params

from netdeconv_jax import ChannelDeconv, DeconvConv, DeconvConvTranspose, DeconvDense
from netdeconv_jax.interop import FoldedModel, fold


def primitives(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn.primitive.name
        for inner in jaxprs_in_params(eqn.params):
            yield from primitives(inner)


def trained(model, x, *args) -> Any:
    """Variables that no symmetry saves from a wrong index."""
    variables: Any = model.init(jax.random.key(1), x, *args)
    rng = np.random.default_rng(0)

    def leaf(path, like):
        noise = rng.normal(size=like.shape)
        if path[-1].key == "whitener":
            return like + jnp.asarray(noise / like.shape[-1], like.dtype)
        noise = np.abs(noise) + 0.5 if path[-1].key in ("var", "scale") else noise / 2
        return jnp.asarray(noise, like.dtype)

    return jax.tree.map_with_path(leaf, variables)


def close(found, expected, tolerance=1e-5):
    expected = np.asarray(expected, np.float32)
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * np.abs(expected).max())


class Net(nn.Module):
    local_norm: str | None = None

    @nn.compact
    def __call__(self, x, train):
        use: Any = {"use_running_average": not train}
        layer = DeconvConv(
            8, (3, 3), padding="CIRCULAR", block_size=4, grouping="contiguous", **use
        )
        for _ in range(2):  # shared
            x = nn.relu(layer(jnp.pad(x, [(0, 0)] * 3 + [(0, 8 - x.shape[-1])])))
        x = DeconvConv(
            8, (3, 1), 2, feature_group_count=4, use_bias=False, local_norm=self.local_norm, **use
        )(x)
        x = nn.BatchNorm(momentum=0.9, **use)(x)
        x = ChannelDeconv(block_size=4, **use)(nn.Conv(8, (1, 1))(x))
        x = DeconvConv(
            8, (3, 3), whiten="channels", kernel_dilation=2, freeze_schedule=(1, 9), **use
        )(x)
        x = DeconvConvTranspose(
            8, (3, 2), (2, 1), transpose_kernel=True, local_norm=self.local_norm, **use
        )(nn.relu(x))
        return DeconvDense(5, local_norm=self.local_norm, **use)(x.mean((1, 2)))


@pytest.mark.parametrize("local_norm", [None, "layer"])
def test_any_module_folds_to_one_with_plain_layers(local_norm):
    model, x = Net(local_norm), 1 + jax.random.normal(jax.random.key(0), (4, 12, 12, 3))
    variables: Any = model.init(jax.random.key(1), x, False)
    for _ in range(2):
        _, updates = model.apply(variables, x, True, mutable=["batch_stats"])
        variables = {**variables, **updates}
    plain, folded = fold(model, variables, jax.ShapeDtypeStruct(x.shape, x.dtype), train=False)
    assert isinstance(plain, FoldedModel)
    hash(plain)
    assert set(folded["batch_stats"]) == {"BatchNorm_0", "ChannelDeconv_0"}
    leaves: Any = traverse_util.flatten_dict(folded["params"], sep="/")
    assert leaves["DeconvConvTranspose_0/bias"].shape == (
        2,
        1,
        8,
    )  # by the place modulo the strides
    assert leaves["DeconvConv_1/bias"].shape == (8,)  # there was none: the mean is subtracted there
    expected: Any = model.apply(variables, x, False)
    found: Any = jax.jit(plain.apply, static_argnums=2)(folded, x, False)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    ours = list(primitives(jax.make_jaxpr(lambda x: plain.apply(folded, x, False))(x).jaxpr))
    assert ours.count("conv_general_dilated") == 6
    assert ours.count("dot_general") == 2  # ChannelDeconv and the dense layer


@pytest.mark.parametrize("local_norm", [None, "layer"])
def test_low_precision_is_rounded_as_in_evaluation(local_norm):
    layer = DeconvConv(8, (3, 3), dtype=jnp.bfloat16, local_norm=local_norm)
    x = 30 + jax.random.normal(jax.random.key(0), (4, 8, 8, 3))
    variables: Any = layer.init(jax.random.key(1), x, True)
    _, updates = layer.apply(variables, x, False, mutable=["batch_stats"])
    variables = {**variables, **updates}
    plain, folded = fold(layer, variables, x, use_running_average=True)
    expected: Any = layer.apply(variables, x, True)
    found = plain.apply(folded, x, use_running_average=True)
    assert found.dtype == expected.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found, expected)
    mask = jnp.ones((4, 1, 8, 1)).at[..., 4:, :].set(0)  # which counts where samples are normalized
    again = plain.apply(folded, x, use_running_average=True, mask=mask)
    np.testing.assert_array_equal(again, layer.apply(variables, x, True, mask=mask))
    assert bool((again != found).any()) == (local_norm is not None)


def test_a_module_that_is_none_of_the_zoo_needs_an_input():
    with pytest.raises(ValueError, match="`x` must be an input of the model"):
        fold(Net(), {"params": {}})
    with pytest.raises(ValueError, match="`variables` must be those of the Linen module"):
        fold(Net())  # pyright: ignore
    with pytest.raises(TypeError, match="`variables` must be nested dicts of arrays, got str"):
        fold(Net(), "x")  # pyright: ignore


def test_stacked_layers_are_refused():
    class Body(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return DeconvDense(4, use_running_average=True)(x), None

    stack = nn.scan(
        Body, variable_axes={"params": 0, "batch_stats": 0}, split_rngs={"params": True}, length=3
    )()
    x = jnp.ones((2, 4))
    variables = stack.init(jax.random.key(0), x, None)
    with pytest.raises(ValueError, match=r"kernel of shape \(3, 4, 4\) .* cannot be folded"):
        fold(_Call(stack), {c: {"stack": v} for c, v in variables.items()}, x)


class _Call(nn.Module):
    stack: nn.Module

    def __call__(self, x):
        return self.stack(x, None)[0]


class Rectified(DeconvDense):
    def __call__(self, x, *args, **kwargs):
        return nn.relu(super().__call__(x, *args, **kwargs))


def test_an_heir_with_a_call_of_its_own_is_refused():
    layer, x = Rectified(4, use_running_average=True), jnp.ones((2, 4))
    with pytest.raises(ValueError, match=r"overrides DeconvDense.__call__"):
        fold(layer, layer.init(jax.random.key(0), x), x)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        return nn.relu(DeconvConv(4, (3, 3), block_size=4, use_running_average=not train)(x))


class Jitted(nn.Module):
    """Blocks that `nn.jit` traces once for two of them."""

    block: Any

    @nn.compact
    def __call__(self, x, train: bool = False):
        for _ in range(3):
            x = self.block()(x, train)
        return x.mean((1, 2))


@pytest.mark.parametrize("before", [False, True])
def test_parts_that_are_jitted_are_folded_and_stay_what_they_are_in_the_model(before):
    block = type("Block", (Block,), {})  # traces of its own
    model = Jitted(nn.jit(block, static_argnums=(2,)))
    x = jax.random.normal(jax.random.key(0), (4, 6, 6, 4))
    variables = trained(Jitted(block), x)
    names = {f"{block.__name__}_{i}": f"Jit{block.__name__}_{i}" for i in range(3)}
    expected = Jitted(block).apply(variables, x)
    variables = {c: {names[n]: v for n, v in tree.items()} for c, tree in variables.items()}
    if before:
        close(model.apply(variables, x), expected)
    plain, folded = fold(model, variables, x)
    assert set(folded) == {"params"}
    for given in (x, x[:2]):
        close(plain.apply(folded, given), expected[: len(given)])
        close(model.apply(variables, given), expected[: len(given)])


class Parts(nn.Module):
    """An encoder and a decoder."""

    def setup(self):
        self.encoder = DeconvConv(4, (3, 3), use_running_average=True, block_size=4)
        self.decoder = DeconvConv(3, (3, 3), use_running_average=True, block_size=4)

    def encode(self, x):
        return self.encoder(x)

    def decode(self, x):
        return self.decoder(x)

    def __call__(self, x):
        return self.decode(nn.relu(self.encode(x)))


def test_layers_that_the_given_call_does_not_run_still_whiten():
    model, x = Parts(), jax.random.normal(jax.random.key(0), (4, 6, 6, 3))
    variables = trained(model, x)
    plain, folded = fold(model, variables, x, method="encode")
    assert set(folded["batch_stats"]) == {"decoder"}
    code = model.apply(variables, x, method="encode")
    close(plain.apply(folded, x, method="encode"), code)
    close(plain.apply(folded, code, method="decode"), model.apply(variables, code, method="decode"))
    close(plain.apply(folded, x), model.apply(variables, x))


HALF = [
    DeconvConv(4, (3, 3), param_dtype=jnp.bfloat16),
    DeconvDense(4, param_dtype=jnp.float16),
    DeconvConvTranspose(4, (3, 3), (2, 2), param_dtype=jnp.bfloat16),
    DeconvConv(4, (3, 3), param_dtype=jnp.bfloat16, dtype=jnp.float32),
]


@pytest.mark.parametrize("layer", HALF)
def test_parameters_of_half_precision_cost_no_precision_where_computation_has_more(layer):
    x = 3 + jax.random.normal(jax.random.key(0), (4, 6, 6, 4))
    variables = trained(layer, x, True)
    plain, folded = fold(layer, variables, x, use_running_average=True)
    for given in (x, x.astype(layer.param_dtype)):
        expected = layer.apply(variables, given, True)
        found = plain.apply(folded, given, use_running_average=True)
        close(found, expected, 1e-5 if given.dtype == jnp.float32 else 2e-2)
    small = x.astype(layer.param_dtype)
    plain, folded = fold(layer, variables, small, use_running_average=True)
    found = plain.apply(folded, small, use_running_average=True)
    expected = layer.apply(variables, small, True)
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(found, expected)


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = DeconvConv(4, (1, 1), use_running_average=True, dtype=jnp.bfloat16, block_size=4)(x)
        x = nn.Dense(4, dtype=jnp.bfloat16)(nn.BatchNorm(True, dtype=jnp.bfloat16)(x))

        def body(layer, x, _):
            return layer(x), None

        scan: Any = nn.scan(
            body, variable_broadcast="params", split_rngs={"params": False}, length=2
        )
        return scan(nn.Dense(4, dtype=jnp.bfloat16), x, None)[0]


def test_layers_of_lower_precision_answer_a_dry_run_in_it():
    model, x = Scanned(), jax.random.normal(jax.random.key(0), (2, 4, 4, 3))
    variables = trained(model, x)
    plain, folded = fold(model, variables, x)
    np.testing.assert_array_equal(plain.apply(folded, x), model.apply(variables, x))


class Masked(nn.Module):
    @nn.compact
    def __call__(self, x):
        y = DeconvDense(4, use_running_average=True)(x)
        return y.at[:, 1].set(-jnp.inf)


def test_outputs_that_are_masked_are_compared_elsewhere():
    model, x = Masked(), jax.random.normal(jax.random.key(0), (4, 3))
    variables = trained(model, x)
    plain, folded = fold(model, variables, x)
    expected: Any = model.apply(variables, x)
    np.testing.assert_allclose(plain.apply(folded, x), expected, rtol=1e-5)
