"""Reading the original's checkpoints: files, wrappers, and what is said of those that do not fit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference_models import images, read, state_dict
from safetensors.numpy import save_file

from netdeconv_jax import interop, models


@pytest.fixture(scope="module")
def recorded():
    return read("pnasnet_a_deconv")


@pytest.fixture(scope="module")
def entries(recorded):
    return {k: v.astype(np.float32) for k, v in state_dict(recorded).items()}


def load(checkpoint, **settings):
    return interop.load_torch_checkpoint("pnasnet_a", checkpoint, **settings)


def assert_same(variables, others):
    jax.tree.map(np.testing.assert_array_equal, variables, others)


def test_float32_arrays_make_a_float32_network(recorded, entries):
    model, variables = load(entries)
    assert model.layout == "original"
    assert model.param_dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(variables["params"])} == {jnp.dtype("float32")}
    logits = jax.eval_shape(model.apply, variables, images(recorded))
    assert logits.shape == (4, 10)


def test_float64_arrays_without_x64_make_a_float32_network(recorded):
    model, _ = load(state_dict(recorded))
    assert model.param_dtype == jnp.float32


def test_npz_and_safetensors_files_give_the_same_variables(entries, tmp_path):
    np.savez(tmp_path / "net.npz", **entries)
    save_file(
        {k: np.ascontiguousarray(v) for k, v in entries.items()}, tmp_path / "net.safetensors"
    )
    _, expected = load(entries)
    assert_same(load(tmp_path / "net.npz")[1], expected)
    assert_same(load(str(tmp_path / "net.safetensors"))[1], expected)


def test_wrappers_of_training_scripts_are_taken_off(entries):
    wrapped = {"epoch": 3, "state_dict": {f"module.{k}": v for k, v in entries.items()}}
    assert_same(load(wrapped)[1], load(entries)[1])


def test_an_unknown_kind_of_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"`checkpoint` must be a .npz.*'net.onnx'"):
        load(tmp_path / "net.onnx")
    with pytest.raises(TypeError, match="`checkpoint` must be a path, got 3"):
        load(3)


def test_everything_that_does_not_fit_is_named_at_once(entries):
    broken = dict(entries)
    del broken["layer1.0.sep_conv1.conv1.weight"]
    del broken["linear.running_mean"]
    broken["extra.weight"] = np.zeros(3)
    broken["conv1.bias"] = np.zeros(45)
    with pytest.raises(ValueError, match="does not fit pnasnet_a") as error:
        load(broken)
    message = str(error.value)
    assert "missing: layer1.0.sep_conv1.conv1.weight, linear.running_mean" in message
    assert "unexpected: extra.weight" in message
    assert "misshapen: conv1.bias (45,) instead of (44,)" in message


def test_the_wrong_number_of_classes_is_named(entries):
    with pytest.raises(ValueError, match=r"linear.weight \(10, 176\) instead of \(100, 176\)"):
        load(entries, num_classes=100)


def test_networks_that_the_original_lacks_are_refused():
    with pytest.raises(ValueError, match="no checkpoints of 'mlp'"):
        interop.load_torch_checkpoint("mlp", {})


def test_a_wrong_name_suggests_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'resnet18'"):
        interop.load_torch_checkpoint("resnet_18", {})


@pytest.mark.parametrize("norm", ["batch", "deconv", "none"])
@pytest.mark.parametrize(
    "name", [n for n in models.list() if n not in ("linear", "mlp", "cnn", "lenet", "airbench")]
)
def test_an_empty_checkpoint_misses_every_entry_once(name, norm):
    with pytest.raises(ValueError, match="missing: ") as error:
        interop.load_torch_checkpoint(name, {}, norm=norm)
    missing = str(error.value).split("missing: ")[1].split(", ")
    assert len(missing) == len(set(missing))
    assert (
        "conv1.weight" in missing
        or "features.0.weight" in missing
        or "features.conv0.weight" in missing
    )
