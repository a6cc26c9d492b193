"""Every case of the original PyTorch layers, as recorded in tests/data/reference_vectors.

Each file holds three training steps of one layer with fixed parameters (outputs and gradients), its running
statistics after them and an evaluation; float64, NCHW and OIHW.
"""

import ast
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from netdeconv_jax import ChannelDeconv, DeconvConv, DeconvDense

FILES = sorted((Path(__file__).parent / "data" / "reference_vectors").glob("*.npz"))
NAMES = [f.stem for f in FILES]


def channels_last(a):
    return np.moveaxis(a, 1, -1)


def build(case, config, dtype):
    """The layer that the configuration describes, and its parameters."""
    kinds = {"FastDeconv": DeconvConv, "Delinear": DeconvDense, "ChannelDeconv": ChannelDeconv}
    options = {
        "block_size": config["block"],
        "num_iters": config["n_iter"],
        "eps": config["eps"],
        "momentum": 1 - config["momentum_new"],
        "param_dtype": dtype,
    }
    if "sampling_stride" in config:
        options["sampling_stride"] = config["sampling_stride"]
    if config["layer"] == "ChannelDeconv":
        return ChannelDeconv(**options), {}
    if config["layer"] == "Delinear":
        params = {"kernel": case["weight"].T, "bias": case["bias"]}
        return DeconvDense(config["out_features"], **options), params
    layer = kinds[config["layer"]](
        config["out_channels"],
        (config["kernel_size"],) * 2,
        config["stride"],
        padding=config["padding"],
        kernel_dilation=config["dilation"],
        feature_group_count=config["groups"],
        **options,
    )
    return layer, {"kernel": case["weight"].transpose(2, 3, 1, 0), "bias": case["bias"]}


def run(name, dtype):
    """Yield (quantity, ours, theirs) for everything that the file records."""
    case = np.load(FILES[NAMES.index(name)])
    config = ast.literal_eval(str(case["config"]))
    layer, params = build(case, config, dtype)
    params = jax.tree.map(lambda a: jnp.asarray(a, dtype), params)
    x0 = jnp.asarray(channels_last(case["x0"]), dtype)
    stats = layer.init(jax.random.key(0), x0, use_running_average=True)["batch_stats"]

    @jax.jit
    def step(params, x, stats, g):
        def forward(params, x):
            variables = {"params": params, "batch_stats": stats}
            return layer.apply(variables, x, False, mutable=["batch_stats"])

        y, pullback, updates = jax.vjp(forward, params, x, has_aux=True)
        return y, pullback(g), updates["batch_stats"]

    for i in range(3):
        x, g = (jnp.asarray(channels_last(case[f"{k}{i}"]), dtype) for k in "xg")
        y, (d_params, dx), stats = step(params, x, stats, g)
        yield f"y{i}", y, channels_last(case[f"y{i}"])
        yield f"dx{i}", dx, channels_last(case[f"dx{i}"])
        if "kernel" in d_params:
            d_weight = case[f"d_weight{i}"]
            d_weight = d_weight.T if d_weight.ndim == 2 else d_weight.transpose(2, 3, 1, 0)
            yield f"d_weight{i}", d_params["kernel"], d_weight
            yield f"d_bias{i}", d_params["bias"], case[f"d_bias{i}"]

    ours = {
        "buf_running_mean": "mean",
        "buf_running_mean1": "mean",
        "buf_running_deconv": "whitener",
        "buf_running_mean2": "rest_mean",
        "buf_running_var": "rest_var",
    }
    for key in case.files:
        if key in ours and not (key.endswith(("mean2", "var")) and "remainder" not in name):
            yield key, np.ravel(np.asarray(stats[ours[key]])), np.ravel(case[key])
    y_eval = layer.apply({"params": params, "batch_stats": stats}, x, True)
    yield "y_eval", y_eval, channels_last(case["y_eval"])


def assert_agrees(name, dtype, tolerance):
    count = 0
    for quantity, ours, theirs in run(name, dtype):
        scale = np.abs(theirs).max()
        error = np.abs(np.asarray(ours, np.float64) - theirs).max() / scale
        assert error <= tolerance, f"{quantity}: relative error {error:.2e}"
        count += 1
    return count


def test_there_are_sixteen_cases():
    assert len(NAMES) == 16


@pytest.mark.parametrize("name", NAMES)
def test_the_original_is_matched_to_1e_9_in_float64(name):
    with jax.enable_x64():
        assert assert_agrees(name, jnp.float64, 1e-9) >= 9


@pytest.mark.parametrize("name", NAMES)
def test_the_original_is_matched_to_1e_4_in_float32(name):
    assert assert_agrees(name, jnp.float32, 1e-4) >= 9
