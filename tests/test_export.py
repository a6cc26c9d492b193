"""A folded model as a StableHLO program: any batch, the same logits, and one command to get there.

ONNX has an environment of its own, and its checks are in tests/onnx_checks.py: `make onnx`.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

from netdeconv_jax import DeconvConv, DeconvConvTranspose, models
from netdeconv_jax import nnx as dnnx
from netdeconv_jax.interop import export_onnx, export_stablehlo, fold, load_model, save_weights
from netdeconv_jax.interop.export import main
from netdeconv_jax.whitening import ChebyshevRidge, Eigh, NewtonSchulz
from train import config as configs
from train.loop import create_model

ROOT = Path(__file__).parents[1]
PLATFORMS = ("cpu", "cuda", "tpu")


def made_up(model, x, **kwargs) -> Any:
    """Variables that no symmetry saves from a wrong index, in NumPy."""
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), x, **kwargs))
    rng = np.random.default_rng(0)

    def leaf(path, like):
        value = rng.normal(size=like.shape) / 3
        if path[-1].key == "whitener":
            value = np.eye(like.shape[-1]) + value / np.sqrt(like.shape[-1])
        if path[-1].key == "kernel":
            value = 3 * value / np.sqrt(np.prod(like.shape[:-1]))
        return value.astype(like.dtype)

    return jax.tree.map_with_path(leaf, shapes)


def check(program, expected, x):
    """Every batch size gives what the model gives, after a trip through bytes."""
    again = jax.export.deserialize(bytearray(program.serialize()))
    assert again.platforms == PLATFORMS
    for n in (1, len(x)):
        found = again.call(x[:n])
        scale = np.abs(expected).max()
        np.testing.assert_allclose(found, expected[:n], rtol=0, atol=1e-5 * scale)
    text = program.mlir_module()
    assert "convolution" in text or "dot_general" in text
    for trace in ("rsqrt", "while", "cholesky", "syevd"):
        assert trace not in text


@pytest.fixture(scope="module")
def lenet(tmp_path_factory) -> Any:
    """A trained file, without the config that the trainer adds; model, variables and images."""
    model, x = models.create("lenet"), np.random.default_rng(1).normal(size=(3, 8, 8, 1))
    x = x.astype(np.float32)
    variables = made_up(model, x)
    path = tmp_path_factory.mktemp("run") / "model.safetensors"
    metadata = {
        "network": "lenet",
        "norm": "deconv",
        "num_classes": "10",
        "input_shape": "[8, 8, 1]",
    }
    save_weights(path, variables, metadata)
    return path, model, variables, x


def test_one_command_makes_a_program_of_a_trained_file(lenet, capsys):
    path, model, variables, x = lenet
    assert main([str(path), "--format=stablehlo"]) == 0
    output = path.with_suffix(".stablehlo")
    assert capsys.readouterr().out == f"{output}: images [batch, 8, 8, 1] to 10 logits\n"
    program = jax.export.deserialize(bytearray(output.read_bytes()))
    check(program, jax.jit(model.apply)(variables, x), x)


def test_samples_that_are_normalized_are_so_in_the_program_too(lenet, tmp_path):
    _, model, variables, x = lenet
    path, config = tmp_path / "model.safetensors", {"whitening.local_norm": "layer"}
    metadata = {"network": "lenet", "norm": "deconv", "num_classes": "10", "config": config}
    save_weights(path, variables, metadata | {"input_shape": "[8, 8, 1]"})
    assert main([str(path), "--format=stablehlo"]) == 0
    program = jax.export.deserialize(bytearray(path.with_suffix(".stablehlo").read_bytes()))
    normalizing = model.clone(spec=model.spec.replace(local_norm="layer"))
    expected = jax.jit(normalizing.apply)(variables, x)
    np.testing.assert_allclose(program.call(x), expected, atol=1e-5 * np.abs(expected).max())


def test_the_size_may_be_another(lenet, tmp_path, capsys):
    path, *_ = lenet
    output = tmp_path / "wide"
    command = [str(path), "--format=stablehlo", f"--output={output}", "--image_size=8x8"]
    assert main(command) == 0
    assert "images [batch, 8, 8, 1]" in capsys.readouterr().out
    assert output.is_file()


def test_the_command_runs_as_a_process_of_its_own(lenet, tmp_path):
    path, *_ = lenet
    command = ["-m", "netdeconv_jax.interop.export", str(path), "--format=stablehlo"]
    found = subprocess.run(
        [sys.executable, "-W", "error", *command, f"--output={tmp_path / 'out'}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stderr
    assert found.stderr == ""
    assert (tmp_path / "out").is_file()


def test_without_the_extra_onnx_is_refused_in_one_line(lenet, capsys, monkeypatch):
    path, model, variables, _ = lenet
    monkeypatch.setitem(sys.modules, "jax2onnx", None)
    assert main([str(path), "--format=onnx"]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith("export: ONNX needs jax2onnx and onnxruntime, in an environment")
    assert told.err.count("\n") == 1
    with pytest.raises(ImportError, match=r"netdeconv-jax\[onnx\]"):
        export_onnx(model, variables, (8, 8, 1))


def test_what_is_wrong_with_a_command_is_said_in_one_line(lenet, tmp_path, capsys):
    path, _, variables, _ = lenet
    save_weights(tmp_path / "lone.safetensors", variables)
    save_weights(
        tmp_path / "linear.safetensors",
        {"params": {"linear": {"kernel": np.ones((64, 10)), "bias": np.ones(10)}}},
        {"network": "linear", "norm": "none", "num_classes": "10"},
    )
    lenet5 = {"network": "lenet", "norm": "deconv", "num_classes": "10"}
    save_weights(tmp_path / "sizeless.safetensors", variables, lenet5)
    save_weights(tmp_path / "empty.safetensors", {"params": {}}, lenet5)
    for norm in ("batch", "deconv"):
        params = made_up(models.create("lenet", norm), np.zeros((1, 8, 8, 1)))["params"]
        path_of_params = tmp_path / f"{norm}.safetensors"
        save_weights(path_of_params, {"params": params}, lenet5 | {"norm": norm})
    half = made_up(models.create("lenet", width=0.5), np.zeros((1, 8, 8, 1)))
    save_weights(tmp_path / "half.safetensors", half, lenet5)
    for name, size in (("number", "8"), ("text", "big"), ("zero", "[8, 0, 1]")):
        save_weights(tmp_path / f"{name}.safetensors", variables, lenet5 | {"input_shape": size})
    for arguments, words in (
        ([tmp_path / "no.safetensors"], "is missing"),
        ([tmp_path / "sizeless.safetensors"], "`--image_size` 32x32 is not that of the network's"),
        ([path, "--image_size=12"], "`--image_size` 12x12 is not that of the network's images: "),
        ([path, "--image_size=12"], "/kernel has shape (64, 120) in the file"),
        ([tmp_path / "empty.safetensors"], "`weights` must hold parameters"),
        ([tmp_path / "batch.safetensors"], "/var is missing in the file"),
        ([tmp_path / "deconv.safetensors"], "/whitener is missing in the file"),
        ([tmp_path / "half.safetensors"], "the weights are not those of lenet: "),
        ([tmp_path / "number.safetensors"], "`input_shape` must be [height, width, channels], got"),
        ([tmp_path / "text.safetensors"], "`input_shape` must be [height, width, channels], got"),
        ([tmp_path / "zero.safetensors"], "`input_shape` must be [height, width, channels], got"),
        ([tmp_path / "lone.safetensors"], "does not say network, norm, num_classes"),
        ([tmp_path / "linear.safetensors", "--image_size=9"], "`--image_size` 9x9 does not fit"),
        (
            [path, f"--output={tmp_path / 'no' / 'where'}"],
            "`--output` must be in a folder that exists",
        ),
        ([path, "--image_size=2"], "too small"),
    ):
        assert main([*map(str, arguments), "--format=stablehlo"]) == 2
        told = capsys.readouterr()
        assert told.out == ""
        assert words in told.err
        assert told.err.count("\n") == 1
    with pytest.raises(SystemExit):
        main([str(path), "--format=stablehlo", "--image_size=8x"])


def test_a_file_of_the_trainer_gives_the_network_of_its_config(tmp_path):
    for changes in (
        {"model.width": 0.5, "whitening.block_size": 16, "whitening.grouping": "contiguous"},
        {"whitening.local_norm": "layer"},
        {"whitening.preset": "fast", "model.layout": "original", "dtype": "bfloat16"},
    ):
        config = configs.load("configs/cifar10.py:resnet18,deconv", changes)
        path = tmp_path / "model.safetensors"
        metadata = {"network": "resnet18", "norm": "deconv", "num_classes": "10"}
        save_weights(path, {"params": {}}, metadata | {"config": configs.flat(config)})
        model, variables, found = load_model(path)
        assert model == create_model(config, 10, None)
        assert variables == {"params": {}}
        assert found["config"]["model.width"] == config.model.width


class Decoder(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.relu(DeconvConv(4, (3, 3), use_running_average=not train)(x))
        return DeconvConvTranspose(3, (4, 4), 2, use_running_average=not train)(x)


def test_a_module_that_is_none_of_the_zoo_is_exported_too():
    model, x = Decoder(), np.random.default_rng(0).normal(size=(3, 5, 4, 3)).astype(np.float32)
    variables = made_up(model, x, train=False)
    folded = fold(model, variables, x, train=False)
    program = export_stablehlo(*folded, (5, 4, 3), train=False)
    check(program, jax.jit(model.apply, static_argnums=2)(variables, x, False), x)


def test_pools_that_leave_a_rest_are_exported_without_a_gather():
    model = models.create("airbench", width=0.0625)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 32, 32, 3)), jnp.float32)
    variables = made_up(model, x)
    program = export_stablehlo(*fold(model, variables), x.shape[1:])
    check(program, jax.jit(model.apply)(variables, x), x)
    assert "stablehlo.gather" not in program.mlir_module()


def test_an_nnx_module_is_exported_too():
    model = nnx.Sequential(
        dnnx.DeconvConv(3, 4, (3, 3), rngs=nnx.Rngs(0)),
        nnx.relu,
        nnx.Linear(4, 2, rngs=nnx.Rngs(1)),
    )
    x = np.random.default_rng(0).normal(size=(3, 5, 4, 3)).astype(np.float32)
    folded = fold(model)
    check(export_stablehlo(folded, None, (5, 4, 3)), folded(x), x)


class Transformed(nnx.Module):
    """A layer under `nnx.remat` and `nnx.jit`, and two that are scanned."""

    def __init__(self, rngs):
        self.first = nnx.Linear(3, 3, rngs=rngs)
        make = nnx.vmap(lambda rngs: nnx.Linear(3, 3, rngs=rngs), in_axes=0, out_axes=0)
        self.stack = make(rngs.split(2))

    def __call__(self, x):
        x = nnx.remat(lambda layer, x: layer(x))(self.first, x)
        x = nnx.jit(lambda layer, x: nnx.relu(layer(x)))(self.first, x)
        run = nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        return run(x, self.stack)


def test_an_nnx_module_with_transforms_inside_is_exported_too():
    model, x = Transformed(nnx.Rngs(0)), np.random.default_rng(0).normal(size=(5, 3)).astype("f")
    found = export_stablehlo(model, None, (3,)).call(x)
    np.testing.assert_allclose(found, model(x), rtol=1e-5, atol=1e-6)


def test_what_cannot_be_exported_is_refused():
    layer = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    shapes: Any = ((), (0, 2), (2.0,), (None, 2))
    for shape in shapes:
        with pytest.raises(ValueError, match="`input_shape` must be positive ints"):
            export_stablehlo(layer, None, shape)
    with pytest.raises(ValueError, match="`variables` must be None"):
        export_stablehlo(layer, {}, (2,))
    with pytest.raises(ValueError, match="`variables` must be those of"):
        export_stablehlo(nn.Dense(2), None, (2,))


@pytest.mark.slow
@pytest.mark.parametrize("name", models.list())
def test_every_network_is_exported(name):
    model, size = models.create(name, width=0.0625), 64 if "imagenet" in name else 32
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, size, size, 3)), jnp.float32)
    variables = made_up(model, x)
    folded = fold(model, variables)
    check(export_stablehlo(*folded, x.shape[1:]), jax.jit(model.apply)(variables, x), x)


@pytest.mark.parametrize("platforms", ["gpu", (), ["cpu", "metal"]])
def test_a_platform_that_no_program_is_for_is_refused(lenet, platforms):
    with pytest.raises(ValueError, match="`platforms` must be some of"):
        export_stablehlo(None, None, (8, 8, 1), platforms=platforms)


@pytest.mark.parametrize(
    ("settings", "root"),
    [
        ({"ridge": 0.01, "method": "eigh", "through_root": True}, Eigh(0.01)),
        ({"ridge": 0.01, "method": "chebyshev"}, ChebyshevRidge(0.01)),
        ({"ridge": 0.01, "preset": "fast", "update_every": 4}, ChebyshevRidge(0.01)),
        ({"ridge": None, "num_iters": 3, "through_root": False}, NewtonSchulz(3)),
    ],
)
def test_a_file_of_the_trainer_says_how_its_network_whitens(tmp_path, settings, root):
    config = {f"whitening.{name}": value for name, value in settings.items()}
    metadata = {"network": "lenet", "norm": "deconv", "num_classes": "10"}
    path = tmp_path / "model.safetensors"
    save_weights(path, of_lenet(10), metadata | {"config": json.dumps(config)})
    assert load_model(path)[0].spec.root == root


def of_lenet(classes) -> Any:
    model = models.create("lenet", norm="deconv", num_classes=classes)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.ones((1, 28, 28, 1))))
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)


def test_a_file_whose_weights_are_of_another_network_is_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    metadata = {"network": "lenet", "norm": "deconv", "num_classes": "7"}
    save_weights(path, of_lenet(10), metadata)
    with pytest.raises(ValueError, match="`num_classes` is 7, of the weights 10"):
        load_model(path)
    save_weights(path, of_lenet(7), metadata | {"network": "vgg11"})
    with pytest.raises(ValueError, match="the weights are not those of vgg11"):
        load_model(path)
    more = of_lenet(7)
    more["params"]["fc4"] = more["params"]["fc3"]
    save_weights(path, more, metadata)
    with pytest.raises(ValueError, match="those of lenet: params/fc4/kernel is in the file alone"):
        load_model(path)


def test_a_training_pass_on_a_batch_of_any_size_is_refused_in_a_line():
    whole: Any = {"train": True, "mutable": ["batch_stats"]}
    model = models.create("lenet", norm="deconv", width=0.5)
    variables = model.init(jax.random.key(0), jnp.ones((1, 8, 8, 1)))
    layers = (dnnx.DeconvConv(1, 2, (3, 3), rngs=nnx.Rngs(0)),)
    layers += (dnnx.DeconvConvTranspose(1, 2, (3, 3), rngs=nnx.Rngs(0)),)
    layers += (dnnx.DeconvDense(1, 2, rngs=nnx.Rngs(0)), dnnx.ChannelDeconv(1, block_size=1))
    for given in ((model, variables, whole), *((layer, None, {}) for layer in layers)):
        with pytest.raises(
            ValueError, match=r"`x` has the symbolic shape .*: export the model in ev"
        ):
            export_stablehlo(*given[:2], (8, 8, 1), **given[2])


@pytest.mark.parametrize(
    "config", [{"whitening.colour": 1}, {"dtype": "floaty"}, {"model.width": "wide"}]
)
def test_a_file_with_settings_that_mean_nothing_is_refused(tmp_path, config):
    metadata = {"network": "lenet", "norm": "deconv", "num_classes": "10"}
    path = tmp_path / "model.safetensors"
    save_weights(path, {"params": {"w": np.zeros(1)}}, metadata | {"config": json.dumps(config)})
    with pytest.raises(ValueError, match="metadata that cannot be used"):
        load_model(path)
