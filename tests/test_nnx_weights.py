"""An NNX model to a weight file and back, and the same file in Linen."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from flax.core import freeze

from netdeconv_jax import DeconvDense
from netdeconv_jax import nnx as dnnx
from netdeconv_jax.interop import load_weights, nnx_update, nnx_variables, save_weights


class Net(nnx.Module):
    def __init__(self, seed, dtype=jnp.float32):
        rngs = nnx.Rngs(seed)
        self.whitened = dnnx.DeconvDense(3, 4, param_dtype=dtype, freeze_schedule=(1, 9), rngs=rngs)
        self.blocks = nnx.List([nnx.Linear(4, 4, rngs=rngs), nnx.BatchNorm(4, rngs=rngs)])
        self.shared = self.blocks[0]
        self.drop = nnx.Dropout(0.1, rngs=rngs)


def test_everything_that_was_learnt_comes_back_from_a_file(tmp_path):
    ours, other, path = Net(0, jnp.bfloat16), Net(1, jnp.bfloat16), tmp_path / "model.safetensors"
    for i, (_, leaf) in enumerate(nnx.iter_graph(ours)):
        if isinstance(leaf, nnx.BatchStat):
            leaf.set_value(leaf.get_value() + i)
    variables: Any = nnx_variables(ours)
    assert set(variables) == {"params", "batch_stats"}
    assert set(variables["batch_stats"]["whitened"]) == {"mean", "whitener", "step"}
    assert variables["params"]["blocks"]["0"]["kernel"].shape == (4, 4)
    assert "shared" not in variables["params"]
    save_weights(path, variables)
    streams: Any = other.drop.rngs
    before = streams.key[...]
    nnx_update(other, load_weights(path)[0])
    for kind in (nnx.Param, nnx.BatchStat):
        found, expected = nnx.state(other, kind), nnx.state(ours, kind)
        jax.tree.map(np.testing.assert_array_equal, found, expected)
        dtypes = [[leaf.dtype for leaf in jax.tree.leaves(tree)] for tree in (found, expected)]
        assert dtypes[0] == dtypes[1]
    assert streams.key[...] == before


def test_the_same_file_serves_linen(tmp_path):
    class Twin(nn.Module):
        @nn.compact
        def __call__(self, x):
            return DeconvDense(4, use_running_average=True, name="whitened")(x)

    net, x = Net(0), jax.random.normal(jax.random.key(0), (5, 3))
    net.whitened.mean[...] = jnp.array([1.0, 2.0, 3.0])
    variables: Any = nnx_variables(net)
    given = {name: {"whitened": tree["whitened"]} for name, tree in variables.items()}
    found: Any = Twin().apply(given, x)
    np.testing.assert_allclose(found, net.whitened(x, True), rtol=1e-6)


@pytest.mark.parametrize("wrong", [3, None, {}, {"params": {"kernel": np.ones(2)}}, nn.Dense(3)])
def test_what_is_no_nnx_model_is_refused(wrong):
    for call in (lambda: nnx_variables(wrong), lambda: nnx_update(wrong, {})):
        kind = type(wrong).__name__
        with pytest.raises(TypeError, match=f"`model` must be an NNX module, got {kind}"):
            call()


def test_states_and_trees_of_modules_will_do_and_so_will_a_model_without_weights():
    net: Any = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    names = {"kernel", "bias"}
    assert set(nnx_variables(nnx.state(net))["params"]) == names  # pyright: ignore
    assert set(nnx_variables({"a": net})["params"]["a"]) == names  # pyright: ignore
    assert nnx_variables(nnx.Dropout(0.1)) == {}
    assert nnx_variables({"a": nnx.Dropout(0.1)}) == {}  # pyright: ignore
    nnx_update(net, freeze(nnx_variables(net)))


def test_what_does_not_fit_is_named():
    net, variables = Net(0), nnx_variables(Net(1))
    before = nnx_variables(net)
    with pytest.raises(ValueError, match="`variables` lack 'batch_stats/blocks/1/mean'"):
        nnx_update(net, {"params": variables["params"]})
    with pytest.raises(ValueError, match="`variables` have an unknown 'params/more'"):
        nnx_update(net, {**variables, "params": {**variables["params"], "more": np.ones(1)}})
    wrong = {**variables["params"], "whitened": {"kernel": np.ones((3, 5)), "bias": np.ones(4)}}
    with pytest.raises(ValueError, match=r"kernel' of shape \(3, 4\), got \(3, 5\)"):
        nnx_update(net, {**variables, "params": wrong})
    with pytest.raises(TypeError, match="`variables` must be nested dicts of arrays, got str"):
        nnx_update(net, "x")  # pyright: ignore
    jax.tree.map(np.testing.assert_array_equal, nnx_variables(net), before)
