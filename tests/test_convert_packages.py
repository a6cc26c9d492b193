"""Models of packages that were released without a thought of this one, converted as they are.

jax-resnet decides by whether `batch_stats` is mutable, flaxmodels has a batch norm of its own. Both come with
the extra `test`.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax_resnet.resnet import ResNet, ResNetBottleneckBlock, ResNetDBottleneckBlock, ResNetDStem

from netdeconv_jax import WhiteningSpec, deconvolve
from netdeconv_jax.interop import warm_start

X = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype(np.float32)
SPEC = WhiteningSpec(whiten="channels", block_size=4, sampling_stride=1, num_iters=2)
SMALL: Any = {"stage_sizes": [1, 1], "n_classes": 5, "hidden_sizes": (4, 8)}


def trained(model, **flags) -> Any:
    shapes = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, **flags), X)
    rng = np.random.default_rng(1)

    def leaf(path, like):
        kind, noise = path[-1].key, rng.normal(size=like.shape)
        if kind == "kernel":
            noise = noise / np.sqrt(np.prod(like.shape[:-1]))
        return jnp.asarray(np.abs(noise) + 0.5 if kind in ("var", "scale") else noise, like.dtype)

    return jax.tree.map_with_path(leaf, shapes)


def check_same(model, **flags):
    variables = trained(model, **flags)
    converted, new = warm_start(model, variables, [X], SPEC, apply_kwargs=flags)
    expected = jax.jit(lambda x: model.apply(variables, x, **flags))(X)
    found = jax.jit(lambda x: converted.apply(new, x, **flags))(X)
    assert np.ptp(expected, axis=0).max() > 1e-3 * np.abs(expected).max()
    scale = np.abs(expected).max()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * max(1, scale))


def test_jax_resnet_is_converted_whole():
    model = deconvolve(ResNet(ResNetBottleneckBlock, **SMALL), SPEC)
    report = model.report(X)
    assert (len(report.replaced), len(report.dropped), len(report.kept)) == (9, 9, 1)
    norms = [entry for entry in report.entries if entry.kind == "BatchNorm"]
    assert all("follows" in entry.why for entry in norms)
    assert sum("starts at zero" in entry.why for entry in norms) == 2
    shapes = jax.eval_shape(model.init, jax.random.key(0), X)
    variables = jax.tree.map(lambda like: jnp.zeros(like.shape, like.dtype), shapes)
    logits, updates = jax.eval_shape(
        lambda v: model.apply(v, X, mutable=["batch_stats"]), variables
    )
    assert logits.shape == (2, 5)
    assert jax.tree.map(jnp.shape, updates["batch_stats"]) == jax.tree.map(
        jnp.shape, shapes["batch_stats"]
    )


@pytest.mark.slow
def test_jax_resnet_computes_the_same_once_converted():
    check_same(ResNet(ResNetBottleneckBlock, **SMALL))
    check_same(ResNet(ResNetDBottleneckBlock, stem_cls=ResNetDStem, **SMALL))


@pytest.mark.slow
def test_flaxmodels_computes_the_same_once_converted():
    from flaxmodels import ResNet18

    settings = {"output": "logits", "pretrained": None, "num_classes": 5, "normalize": False}
    model = ResNet18(**settings)
    with jax.numpy_rank_promotion("allow"):  # which that package needs
        report = deconvolve(model, SPEC).report(X, train=False)
        check_same(model, train=False)
    assert (len(report.replaced), len(report.dropped)) == (20, 20)
