"""Weights come back from their file bit by bit, and what is not such a file is answered in one line."""

import builtins
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.core import freeze
from safetensors.numpy import save_file

from netdeconv_jax import DeconvConv
from netdeconv_jax.interop import load_weights, save_weights

FLOATS = ("float8_e4m3fn", "float8_e5m2", "float16", "bfloat16", "float32", "float64")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


def assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for (names, a), b in zip(
        jax.tree.leaves_with_path(found), jax.tree.leaves(expected), strict=True
    ):
        assert isinstance(a, np.ndarray)
        b = np.asarray(b)
        assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes()), names


@pytest.mark.parametrize("param_dtype", [jnp.float32, jnp.bfloat16])
def test_a_layer_comes_back_bit_by_bit_and_gives_the_same_output(path, param_dtype):
    layer = DeconvConv(4, (3, 3), param_dtype=param_dtype, freeze_schedule=(2, 3))
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
    variables = layer.init(jax.random.key(1), x, use_running_average=True)
    _, updates = layer.apply(variables, x, use_running_average=False, mutable=["batch_stats"])
    variables = {**variables, **updates}
    save_weights(path, variables)
    loaded, metadata = load_weights(path)
    assert_same(loaded, variables)
    assert loaded["params"]["kernel"].dtype == param_dtype
    assert loaded["batch_stats"]["step"].shape == ()
    assert metadata == {}
    before, after = (layer.apply(v, x, use_running_average=True) for v in (variables, loaded))
    np.testing.assert_array_equal(before, after)


@pytest.mark.parametrize(
    "dtype",
    [*FLOATS, "bool", *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))],
)
def test_every_dtype_and_shape_survives(path, dtype):
    values = np.arange(6).astype(jnp.dtype(dtype))
    tree = {"params": {"a": values.reshape(2, 3).T, "scalar": values[5], "none": values[:0]}}
    tree["params"]["reversed"] = values[::-1]
    save_weights(str(path), tree)
    assert_same(load_weights(str(path))[0], tree)


def test_empty_collections_and_plain_numbers_survive(path):
    save_weights(path, {"params": {"a": 2.5, "empty": {}}, "batch_stats": {}})
    loaded, _ = load_weights(path)
    assert loaded == {"params": {"a": np.float64(2.5), "empty": {}}, "batch_stats": {}}
    save_weights(path, {})
    assert load_weights(path) == ({}, {})


def test_frozen_and_boxed_variables_are_saved_as_what_they_hold(path):
    box = nn.Partitioned(jnp.ones(2), names=("data",))
    save_weights(path, freeze({"params": {"a": box}}))
    assert_same(load_weights(path)[0], {"params": {"a": np.ones(2, np.float32)}})


def test_the_file_is_an_ordinary_safetensors_file(path):
    save_weights(path, {"params": {"Conv_0": {"kernel": np.ones(2)}}}, {"config": {"a": (1, None)}})
    content = path.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    assert header["params/Conv_0/kernel"]["dtype"] == "F64"
    assert json.loads(header["__metadata__"]["config"]) == {"a": [1, None]}


def test_metadata_come_back_as_texts_and_dicts(path):
    metadata = {"note": '{"not": "parsed"}', "config": {"lr": 0.1, "widths": [1, 2]}, "é": "ß\n"}
    save_weights(path, {"params": {"a": np.ones(2)}}, metadata)
    assert load_weights(path)[1] == metadata


def test_a_file_of_another_program_is_read(path):
    save_file({"a/b": np.ones(2), "c": np.zeros(1)}, path, metadata={"format": "pt"})
    loaded, metadata = load_weights(path)
    assert_same(loaded, {"a": {"b": np.ones(2)}, "c": np.zeros(1)})
    assert metadata == {"format": "pt"}
    save_file({"a/b": np.ones(2), "a": np.zeros(1)}, path)
    with pytest.raises(ValueError, match="`path` holds an array inside an array: 'a/b'"):
        load_weights(path)


@pytest.mark.parametrize("keep", [0, 4, 8, 60, -1])
def test_a_truncated_file_is_named_in_one_line(path, keep):
    save_weights(path, {"params": {"a": np.ones(20)}})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"`path` must be a whole .safetensors file") as caught:
        load_weights(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_another_kind_of_file_and_none_at_all_are_named(path, tmp_path):
    path.write_bytes(b"\x89PNG and so on, some more bytes")
    with pytest.raises(ValueError, match="something else"):
        load_weights(path)
    with pytest.raises(FileNotFoundError, match=re.escape(f"{str(tmp_path)!r} is a folder")):
        load_weights(tmp_path)
    with pytest.raises(FileNotFoundError, match="is missing"):
        load_weights(tmp_path / "none.safetensors")
    with pytest.raises(FileNotFoundError, match="`path` must be in a folder that exists"):
        save_weights(tmp_path / "none" / "model.safetensors", {"params": {}})
    with pytest.raises(IsADirectoryError, match="`path` must be a file, got the folder"):
        save_weights(tmp_path, {"params": {}})
    for call in (load_weights, lambda wrong: save_weights(wrong, {"params": {}})):
        with pytest.raises(TypeError, match="`path` must be a path, got 3"):
            call(3)  # pyright: ignore


@pytest.mark.parametrize(
    ("variables", "metadata", "error", "message"),
    [
        ("x", {}, TypeError, "`variables` must be nested dicts of arrays, got str"),
        (None, {}, TypeError, "`variables` must be nested dicts of arrays, got NoneType"),
        ({"a/b": np.ones(1)}, {}, ValueError, "names without \"/\", got 'a/b'"),
        ({"a": {0: np.ones(1)}}, {}, TypeError, "names that are strings, got 0"),
        ({"a": [np.ones(1)]}, {}, TypeError, "must hold arrays, got list at 'a'"),
        ({"a": {"b": None}}, {}, TypeError, "must hold arrays, got NoneType at 'a/b'"),
        ({"a": np.ones(1, np.complex128)}, {}, TypeError, "got complex128 at 'a'"),
        ({"a": np.array(["x"])}, {}, TypeError, "got <U1 at 'a'"),
        ({"a": jax.random.key(0)}, {}, TypeError, "got key<fry> at 'a'"),
        ({}, {"a": 1}, TypeError, "`metadata` must be texts or dicts by name, got int at 'a'"),
        ({}, {1: "a"}, TypeError, "`metadata` must be texts or dicts by name, got str at 1"),
        ({}, {"a": {"b": object()}}, TypeError, r"`metadata\['a'\]` must be what JSON knows"),
        ({}, {"netdeconv_jax": "x"}, ValueError, "must not use the name 'netdeconv_jax'"),
    ],
)
def test_what_cannot_be_saved_is_named_and_leaves_the_old_file(
    path, variables, metadata, error, message
):
    save_weights(path, {"old": np.ones(1)})
    with pytest.raises(error, match=message):
        save_weights(path, variables, metadata)
    assert_same(load_weights(path)[0], {"old": np.ones(1)})
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_failure_while_writing_leaves_the_old_file_and_nothing_else(path, monkeypatch):
    save_weights(path, {"old": np.ones(1)})

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(type(path), "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        save_weights(path, {"new": np.ones(1)})
    assert_same(load_weights(path)[0], {"old": np.ones(1)})
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_without_safetensors_one_line_says_what_to_install(path, monkeypatch):
    original = builtins.__import__

    def missing(name, *args, **kwargs):
        if name.startswith("safetensors"):
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    for call in (lambda: save_weights(path, {}), lambda: load_weights(path)):
        with pytest.raises(ImportError, match=r"pip install 'netdeconv-jax\[interop\]'"):
            call()
