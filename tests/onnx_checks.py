"""ONNX graphs in onnxruntime against the models that they come from: `make onnx`.

No test of the suite, because jax2onnx needs an orbax older than the trainer's: this file runs in an
environment of its own, and prints the error that it found of each network.
"""

from typing import Any

import jax
import numpy as np
import onnx  # pyright: ignore[reportMissingImports]
import onnxruntime  # pyright: ignore[reportMissingImports]
import pytest
from flax import linen as nn
from flax import nnx
from reference_models import images, read, state_dict
from safetensors.numpy import save_file

from netdeconv_jax import DeconvConv, DeconvConvTranspose, WhiteningSpec, models, ops
from netdeconv_jax import nnx as dnnx
from netdeconv_jax.interop import export_onnx, fold, load_torch_checkpoint, save_weights
from netdeconv_jax.interop.export import main

jax.config.update("jax_numpy_rank_promotion", "allow")  # which jax2onnx relies on

TOLERANCE = 1e-4  # of the largest logit
NETWORKS = (
    "lenet",
    "airbench",
    "mlp",
    "vgg11",
    "resnet18",
    "resnet18_imagenet",
    "mobilenetv2",
    "densenet121",
    "pnasnet_b",
    "senet18",
)
# What roots, inverses and running statistics would leave, and rectifiers that no runtime takes for one.
NEVER = {"Sqrt", "Reciprocal", "Pow", "Loop", "If", "Scan", "BatchNormalization", "Max"}


def made_up(model, x, **kwargs) -> Any:
    """Variables that no symmetry saves from a wrong index."""
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), x, **kwargs))
    rng = np.random.default_rng(0)

    def leaf(path, like):
        value = rng.normal(size=like.shape)
        match path[-1].key:
            case "kernel":
                value *= np.sqrt(2 / np.prod(like.shape[:-1]))
            case "whitener":
                value = np.eye(like.shape[-1]) + 0.1 * value / np.sqrt(like.shape[-1])
            case _:
                value *= 0.1
        return value.astype(like.dtype)

    return jax.tree.map_with_path(leaf, shapes)


def normal(*shape):
    return np.random.default_rng(1).normal(size=shape).astype(np.float32)


def error(name, graph, x, expected, allowed=()):
    """Run batches of two sizes; return the largest error, in parts of the largest logit."""
    onnx.checker.check_model(graph)
    assert not (NEVER - {*allowed}) & {node.op_type for node in graph.graph.node}
    session = onnxruntime.InferenceSession(graph.SerializeToString())
    (given,), (made,) = session.get_inputs(), session.get_outputs()
    assert (given.name, given.shape[0], made.name) == ("images", "batch", "logits")
    scale, worst = np.abs(expected).max(), 0.0
    assert np.ptp(expected, axis=0).max() > 1e-3 * scale  # images make a difference
    for n in (1, len(x)):
        (found,) = session.run(None, {"images": x[:n]})
        assert found.shape == expected[:n].shape
        worst = max(worst, float(np.abs(found - expected[:n]).max() / scale))
    print(f"{name:24} {worst:.1e}")
    return worst


@pytest.mark.parametrize("name", NETWORKS)
def test_a_folded_network_runs_in_onnxruntime(name):
    model, x = models.create(name, width=0.25), normal(3, 33 if "imagenet" in name else 32, 32, 3)
    variables = made_up(model, x)
    graph = export_onnx(*fold(model, variables), x.shape[1:])
    assert error(name, graph, x, np.asarray(jax.jit(model.apply)(variables, x))) < TOLERANCE


@pytest.mark.parametrize(
    "case", ["resnet18_deconv", "mobilenetv2_deconv", "densenet121_deconv", "resnet18_batch"]
)
def test_a_checkpoint_of_the_original_gives_its_logits_in_onnxruntime(case, tmp_path):
    recorded = read(case)
    name, norm = case.rsplit("_", 1)
    entries = {k: v.astype(np.float32) for k, v in state_dict(recorded).items()}
    save_file(entries, tmp_path / "original.safetensors")
    _, variables = load_torch_checkpoint(name, tmp_path / "original.safetensors", norm)
    metadata = {"network": name, "norm": norm, "num_classes": "10"}
    weights, output = tmp_path / "model.safetensors", tmp_path / "model.onnx"
    save_weights(weights, variables, {**metadata, "config": {"model.layout": "original"}})
    assert main([str(weights), "--format=onnx", f"--output={output}"]) == 0
    expected = np.asarray(recorded["logits_eval"])
    x = images(recorded).astype(np.float32)
    assert error(case, onnx.load(output), x, expected) < TOLERANCE


class Decoder(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(DeconvConv(4, (3, 3), use_running_average=True)(x))
        return DeconvConvTranspose(3, (4, 4), 2, use_running_average=True)(x)


def test_a_module_that_is_none_of_the_zoo_runs_too():
    model, x = Decoder(), normal(3, 6, 5, 3)
    variables = made_up(model, x)
    graph = export_onnx(*fold(model, variables, x), x.shape[1:])
    assert error("decoder", graph, x, np.asarray(model.apply(variables, x))) < TOLERANCE


def test_a_network_that_normalizes_each_sample_runs_too():
    model = models.create("cnn", spec=WhiteningSpec(local_norm="layer"))
    x = normal(3, 32, 32, 3)
    variables = made_up(model, x)
    graph = export_onnx(*fold(model, variables, x), x.shape[1:])
    deviations = ("Pow", "Reciprocal", "Sqrt")  # of each sample
    expected = np.asarray(model.apply(variables, x))
    assert error("local_norm", graph, x, expected, deviations) < TOLERANCE


def test_a_network_that_is_not_folded_runs_too():
    model, x = models.create("lenet"), normal(3, 32, 32, 3)
    variables = made_up(model, x)
    graph = export_onnx(model, variables, x.shape[1:])
    assert error("unfolded", graph, x, np.asarray(model.apply(variables, x))) < TOLERANCE


def test_an_nnx_module_runs_too():
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(
        dnnx.DeconvConv(3, 4, (3, 3), rngs=rngs), ops.relu, dnnx.DeconvConv(4, 2, (1, 1), rngs=rngs)
    )
    x = normal(3, 6, 5, 3)
    model(x)
    folded = fold(model)
    model.eval()
    graph = export_onnx(folded, None, x.shape[1:])
    assert error("nnx", graph, x, np.asarray(model(x))) < TOLERANCE
