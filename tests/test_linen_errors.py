"""Bad input gets one clear line that names the argument and its value."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from netdeconv_jax import (
    ChannelDeconv,
    DeconvConv,
    DeconvConvTranspose,
    DeconvDense,
    WhiteningSpec,
)
from netdeconv_jax.whitening import Budget, Chebyshev, ChebyshevRidge, Eigh

X, KEY = jnp.ones((2, 8, 8, 4)), jax.random.key(0)

BAD_SETTINGS = {
    "block size 0": (ValueError, r"`block_size` .* got 0\.", {"block_size": 0}),
    "block size -1": (ValueError, r"`block_size` .* got -1\.", {"block_size": -1}),
    "block size float": (TypeError, r"`block_size` .* got 2\.5\.", {"block_size": 2.5}),
    "no iterations": (ValueError, r"`num_iters` .* got 0\.", {"num_iters": 0}),
    "float iterations": (TypeError, r"`num_iters` .* got 2\.0\.", {"num_iters": 2.0}),
    "stride 0": (ValueError, r"`sampling_stride` .* got 0\.", {"sampling_stride": 0}),
    "unknown method": (ValueError, r"`method` .* 'cholesky'", {"method": "cholesky"}),
    "unknown grouping": (ValueError, r"`grouping` .* 'random'", {"grouping": "random"}),
    "unknown whiten": (ValueError, r"`whiten` .* 'pixels'", {"whiten": "pixels"}),
    "unknown local norm": (ValueError, r"`local_norm` .* 'batch'", {"local_norm": "batch"}),
    "eps 0": (ValueError, r"`eps` .* got 0", {"eps": 0.0}),
    "eps twice": (ValueError, r"`epsilon` .* 0\.1 and 0\.2", {"eps": 0.2, "epsilon": 0.1}),
    "momentum 1": (ValueError, r"`momentum` .* got 1", {"momentum": 1.0}),
    "iterations of eigh": (
        ValueError,
        r"`num_iters`=3",
        {"spec": WhiteningSpec(method="eigh"), "num_iters": 3},
    ),
    "freeze": (ValueError, r"`period` .* got 5", {"freeze_schedule": (10, 5)}),
    "freeze nothing": (ValueError, r"`active_steps` .* got 0", {"freeze_schedule": (0, 5)}),
    "freeze string": (TypeError, r"`freeze` .* 'always'", {"freeze_schedule": "always"}),
    "freeze of three": (TypeError, r"`freeze` .* \(1, 2, 3\)", {"freeze_schedule": (1, 2, 3)}),
    "freeze floats": (TypeError, r"`period` .* 200\.5", {"freeze_schedule": (100, 200.5)}),
    "eps string": (TypeError, r"`eps` must be a number, got 'a'", {"eps": "a"}),
    "momentum string": (TypeError, r"`momentum` .* '0\.9'", {"momentum": "0.9"}),
    "shared string": (TypeError, r"`shared_whitener` .* 'no'", {"shared_whitener": "no"}),
    "spec string": (TypeError, r"`spec` .* 'fast'", {"spec": "fast"}),
    "spec class": (TypeError, r"`spec` .* WhiteningSpec", {"spec": WhiteningSpec}),
    "spec dict": (TypeError, r"`spec` .* \{\}", {"spec": {}}),
}


@pytest.mark.parametrize("name", BAD_SETTINGS)
def test_a_bad_setting_is_refused_when_the_layer_is_made(name):
    error, message, settings = BAD_SETTINGS[name]
    with pytest.raises(error, match=message):
        DeconvConv(8, (3, 3), **settings)


def test_dense_and_channel_layers_refuse_bad_settings_too():
    with pytest.raises(ValueError, match=r"`block_size` .* got 0"):
        DeconvDense(8, block_size=0)
    with pytest.raises(ValueError, match=r"`block_size` .* got 0"):
        ChannelDeconv(block_size=0)


LAYERS: dict[str, Any] = {
    "conv": lambda **k: DeconvConv(8, (3, 3), **k),
    "transposed": lambda **k: DeconvConvTranspose(8, (3, 3), **k),
    "dense": lambda **k: DeconvDense(8, **k),
    "channel": lambda **k: ChannelDeconv(block_size=2, **k),
}

BAD_FIELDS = {
    "integer dtype": (
        TypeError,
        r"`dtype` must be a floating point dtype, got .*int32",
        {"dtype": jnp.int32},
    ),
    "no dtype": (TypeError, r"`dtype` must be .* got 'foo'\.", {"dtype": "foo"}),
    "integer parameters": (TypeError, r"`param_dtype` .* 'int32'\.", {"param_dtype": "int32"}),
    "average string": (
        TypeError,
        r"`use_running_average` must be True, False or None, got 'x'\.",
        {"use_running_average": "x"},
    ),
    "average list": (
        TypeError,
        r"`use_running_average` .* got \[True\]\.",
        {"use_running_average": [True]},
    ),
    "update string": (
        TypeError,
        r"`update_whitener` must be True, False or None, got 'x'\.",
        {"update_whitener": "x"},
    ),
}


@pytest.mark.parametrize("name", BAD_FIELDS)
@pytest.mark.parametrize("layer", LAYERS)
def test_a_bad_field_is_refused_when_any_layer_is_made(layer, name):
    error, message, settings = BAD_FIELDS[name]
    with pytest.raises(error, match=message):
        LAYERS[layer](**settings)


@pytest.mark.parametrize("layer", LAYERS)
def test_a_call_refuses_flags_that_are_no_bools(layer):
    for name in ("use_running_average", "update_whitener"):
        flags = {"use_running_average": True, name: "x"}
        with pytest.raises(TypeError, match=f"`{name}` must be True, False or None, got 'x'"):
            jax.eval_shape(lambda x, flags=flags: LAYERS[layer]().init(KEY, x, **flags), X)


@pytest.mark.parametrize("layer", LAYERS)
def test_fields_may_be_numpys_and_dtypes_names_and_groups_do_not_hinder_initialization(layer):
    fields: Any = {"dtype": "bfloat16", "param_dtype": np.dtype("float32")}
    fields |= {"axis_name": "data", "axis_index_groups": [[0, 1]]}
    made = LAYERS[layer](update_whitener=np.True_, use_running_average=np.False_, **fields)
    y, variables = jax.eval_shape(lambda x: made.init_with_output(KEY, x), X)
    assert y.dtype == jnp.bfloat16
    assert variables["batch_stats"]["mean"].dtype == jnp.float32


@pytest.mark.parametrize("layer", ["conv", "transposed", "dense"])
@pytest.mark.parametrize("dtype", [bool, np.int32])
def test_masks_may_be_bools_or_integers_with_a_local_norm_too(layer, dtype):
    made = LAYERS[layer](local_norm="layer", use_running_average=1, axis_index_groups=[[0, 1]])
    mask = np.ones((*X.shape[:-1], 1), dtype)
    jax.eval_shape(lambda x: made.init_with_output(KEY, x, mask=mask), X)
    made, off = LAYERS[layer](local_norm="layer"), jnp.bool_(False)
    jax.eval_shape(lambda x: made.init_with_output(KEY, x, off, mask=mask), X)


@pytest.mark.parametrize("name", ["ridge", "tol"])
def test_a_root_with_a_ridge_refuses_what_is_no_number(name):
    with pytest.raises(TypeError, match=f"`{name}` must be a number, got 'a'; a spec is static"):
        ChebyshevRidge(**{name: "a"})  # pyright: ignore


def test_a_spec_refuses_unknown_settings_and_things_that_are_no_strategies():
    spec: Any = WhiteningSpec
    with pytest.raises(ValueError, match=r"`method` is shorthand for a part of `root`; give one"):
        spec(root=Eigh(), method="newton_schulz")
    with pytest.raises(TypeError, match=r"`root` must be .*Eigh"):
        spec(root=Eigh)
    with pytest.raises(TypeError, match=r"'blocksize'"):
        spec(blocksize=3)
    with pytest.raises(TypeError, match=r"'blocksize'"):
        WhiteningSpec().replace(blocksize=3)
    with pytest.raises(TypeError, match=r"`sampling` must be `Stride\(...\)` .* got 3"):
        spec(sampling=3)
    with pytest.raises(TypeError, match=r"`sampling_centred` must be True or False, got 1"):
        spec(sampling_centred=1)
    with pytest.raises(
        ValueError, match="`sampling_centred` is shorthand for a part of `sampling`"
    ):
        spec(sampling=Budget(), sampling_centred=False)
    with pytest.raises(TypeError, match=r"`root` must be .* got 'eigh'"):
        spec(root="eigh")


def test_a_budget_is_counted_in_whole_samples():
    for name in ("rows_per_dim", "finer_below"):
        with pytest.raises(ValueError, match=f"`{name}` must be at least 1, got 0"):
            Budget(**{name: 0})  # pyright: ignore[reportArgumentType]
        with pytest.raises(TypeError, match=f"`{name}` must be an int, got 2.5"):
            Budget(**{name: 2.5})  # pyright: ignore


def test_a_spec_holds_no_tracers():
    given: Any = {"ridge": Eigh, "tol": Chebyshev, "eps": WhiteningSpec, "momentum": WhiteningSpec}
    for name, make in given.items():
        with pytest.raises(TypeError, match=f"`{name}` must be a number, got .*; a spec is static"):
            jax.jit(lambda value, name=name, make=make: make(**{name: value}).eps)(0.1)
    number: Any = np.float32(0.5)
    assert Eigh(number).ridge == 0.5


ANY: Any = DeconvConv  # for arguments that a type checker would refuse

BAD_CALLS = {
    "no features": (ValueError, r"`features` .* got 0", DeconvConv(0, (3, 3)), X),
    "negative features": (ValueError, r"`features` .* got -1", DeconvDense(-1), X),
    "features string": (TypeError, r"`features` .* got '4'", ANY("4", (3, 3)), X),
    "float groups": (
        TypeError,
        r"`feature_group_count` .* got 1\.0",
        ANY(4, (3, 3), feature_group_count=1.0),
        X,
    ),
    "float pairs": (
        ValueError,
        r"`padding` .*0\.9",
        ANY(4, (3, 3), padding=((0.9, 1), (0, 0))),
        X,
    ),
    "float padding": (TypeError, r"`padding` .* got 1\.5", ANY(4, (3, 3), padding=1.5), X),
    "no padding": (TypeError, r"`padding` .* got None", ANY(4, (3, 3), padding=None), X),
    "float strides": (TypeError, r"`strides` .* got 1\.5", ANY(4, (3, 3), 1.5), X),
    "no kernel": (TypeError, r"`kernel_size` .* got None", ANY(4, None), X),
    "wrong rank": (ValueError, r"`x` .*\(8, 4\)", DeconvConv(8, (3, 3)), X[0, 0]),
    "zero channels": (ValueError, "`x` has no channels", DeconvConv(8, (3, 3)), X[..., :0]),
    "zero features": (ValueError, "`x` has no channels", DeconvDense(8), X[..., :0]),
    "feature groups": (
        ValueError,
        r"`feature_group_count` must divide the 4 input channels, got 3",
        DeconvConv(9, (3, 3), feature_group_count=3),
        X,
    ),
    "features by groups": (
        ValueError,
        r"`features` .* `feature_group_count` 2, got 7",
        DeconvConv(7, (3, 3), feature_group_count=2),
        X,
    ),
    "small input": (
        ValueError,
        r"`x` is smaller than the kernel: spatial shape \(8, 8\)",
        DeconvConv(8, (9, 9), padding="VALID"),
        X,
    ),
    "integers": (
        TypeError,
        "`x` must be floating point, got int32",
        DeconvConv(8, (3, 3)),
        X.astype("int32"),
    ),
    "integers to dense": (TypeError, "`x` .* got uint8", DeconvDense(8), X.astype("uint8")),
    "integers to channel": (
        TypeError,
        "`x` .* got int32",
        ChannelDeconv(block_size=2),
        X.astype("int32"),
    ),
    "padding name": (ValueError, r"`padding` .* 'FULL'", DeconvConv(8, (3, 3), padding="FULL"), X),
    "padding entries": (ValueError, r"`padding` .* \(1,\)", DeconvConv(8, (3, 3), padding=(1,)), X),
    "causal 2d": (ValueError, r"`padding` 'CAUSAL'", DeconvConv(8, (3, 3), padding="CAUSAL"), X),
    "strides": (ValueError, r"`strides` .* \(1, 0\)", DeconvConv(8, (3, 3), (1, 0)), X),
    "stride entries": (ValueError, r"`strides` .* \(1,\)", DeconvConv(8, (3, 3), (1,)), X),
    "empty kernel": (ValueError, "`kernel_size` .* got", DeconvConv(8, ()), X),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_a_bad_input_is_refused_with_the_argument_and_its_value(name):
    error, message, layer, x = BAD_CALLS[name]
    with pytest.raises(error, match=message):
        layer.init(jax.random.key(0), x, False)


@pytest.mark.parametrize("layer", [DeconvConv(8, (3, 3)), DeconvDense(8)])
def test_other_channels_than_the_kernels_are_refused(layer):
    variables = layer.init(jax.random.key(0), X, True)
    with pytest.raises(ValueError, match=r"`x` has 3 input channels .* initialized for 4"):
        layer.apply(variables, X[..., :3], True)


@pytest.mark.parametrize(
    "other",
    [{"block_size": 2}, {"whiten": "channels"}, {"shared_whitener": False, "block_size": 2}],
)
def test_statistics_of_another_grouping_are_refused(other):
    variables = DeconvConv(8, (3, 3)).init(jax.random.key(0), X, True)
    with pytest.raises(
        ValueError, match=r"`batch_stats` hold a mean of shape \(36,\).*`block_size`"
    ):
        DeconvConv(8, (3, 3), **other).apply(variables, X, True)


def test_other_channels_than_the_statistics_are_refused():
    layer = ChannelDeconv(block_size=4)
    variables = layer.init(jax.random.key(0), X, True)
    with pytest.raises(ValueError, match=r"`x` has 3 channels, .* initialized for 4 at a time"):
        layer.apply(variables, X[..., :3], True)


@pytest.mark.parametrize(
    "make",
    [
        lambda **k: DeconvConv(8, (3, 3), **k),
        lambda **k: DeconvDense(8, **k),
        lambda **k: ChannelDeconv(block_size=2, **k),
    ],
)
def test_use_running_average_is_given_exactly_once(make):
    with pytest.raises(
        ValueError, match=r"`use_running_average` .* neither; got None there and None"
    ):
        make().init(jax.random.key(0), X)
    with pytest.raises(
        ValueError, match=r"`use_running_average` .* both; got True there and False"
    ):
        make(use_running_average=True).init(jax.random.key(0), X, False)


def test_a_mask_that_does_not_fit_is_refused():
    layer = DeconvConv(8, (3, 3))
    variables = layer.init(jax.random.key(0), X, True)
    with pytest.raises(
        ValueError, match=r"`mask` must be broadcastable to \(2, 8, 8, 1\), .* \(3, 1, 1, 1\)"
    ):
        layer.apply(variables, X, False, mask=jnp.ones((3, 1, 1, 1)), mutable=["batch_stats"])


def test_an_empty_batch_can_be_evaluated_but_not_trained_on():
    layer = DeconvConv(8, (3, 3))
    variables = layer.init(jax.random.key(0), X, True)
    y: Any = layer.apply(variables, X[:0], True)
    assert y.shape == (0, 8, 8, 8)
    with pytest.raises(ValueError, match=r"`x` has no samples"):
        layer.apply(variables, X[:0], False, mutable=["batch_stats"])
