"""Variables as one `.safetensors` file: read by everybody, runs no code, holds its own description."""

import json
import os
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from flax.core import meta, unfreeze

from netdeconv_jax.interop.batch_norm import check_variables
from netdeconv_jax.ops.arguments import check_path

# What the format itself has no place for: which collections are empty, which metadata were not strings.
_OWN = "netdeconv_jax"

# The format's names of what both NumPy with JAX's extension types and the format know.
_DTYPES = {
    "BOOL": jnp.bool_,
    "U8": jnp.uint8,
    "I8": jnp.int8,
    "U16": jnp.uint16,
    "I16": jnp.int16,
    "U32": jnp.uint32,
    "I32": jnp.int32,
    "U64": jnp.uint64,
    "I64": jnp.int64,
    "F8_E4M3": jnp.float8_e4m3fn,
    "F8_E5M2": jnp.float8_e5m2,
    "F16": jnp.float16,
    "BF16": jnp.bfloat16,
    "F32": jnp.float32,
    "F64": jnp.float64,
}


def save_weights(
    path: str | os.PathLike,
    variables: Mapping[str, Any],
    metadata: Mapping[str, str | Mapping[str, Any]] | None = None,
) -> None:
    """Write Flax variables to one `.safetensors` file, whole or not at all.

    A leaf is named by its path, `params/Conv_0/kernel`, and keeps its dtype, bfloat16 too. The file takes the
    place of an older one only when it is complete on disk: who reads meanwhile finds the one or the other.

    Args:
      path: of the file, by custom `model.safetensors`; its folder exists.
      variables: nested dicts of arrays, NumPy's or JAX's, all of them on this host; also empty ones.
      metadata: texts, or dicts (a config) that are kept as JSON, in which tuples become lists.
    Raises:
      TypeError: `path` is none; `variables` are no nested dicts; a name that is not a string, a leaf that is
        not an array or number, or a dtype that the format does not know; or metadata that are neither text
        nor made of what JSON knows.
      ValueError: a name contains "/", or a metadata name is `netdeconv_jax`, our own.
      FileNotFoundError: the folder of `path` does not exist.
      OSError: the disk does not take it.
      ImportError: the package safetensors is missing.

    Source: the safetensors format, https://github.com/huggingface/safetensors; names are Flax's.

    Example:
      >>> import tempfile, jax.numpy as jnp
      >>> from netdeconv_jax.interop import load_weights, save_weights
      >>> variables = {"params": {"Conv_0": {"bias": jnp.ones(3, jnp.bfloat16)}}, "batch_stats": {}}
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save_weights(folder + "/model.safetensors", variables, {"config": {"epochs": 90}})
      ...     loaded, metadata = load_weights(folder + "/model.safetensors")
      >>> loaded
      {'params': {'Conv_0': {'bias': array([1, 1, 1], dtype=bfloat16)}}, 'batch_stats': {}}
      >>> metadata
      {'config': {'epochs': 90}}
    """
    library = _safetensors()
    path = check_path("path", path, to_write=True)
    arrays, empty = _flatten(variables)
    texts = _metadata_texts(metadata or {}, empty)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:  # not by the library: its files are its owner's alone
            file.write(library.numpy.save(arrays, metadata=texts))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def load_weights(path: str | os.PathLike) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the variables and the metadata of a file that `save_weights` wrote.

    Another `.safetensors` file is read too: its names are split at "/".

    Args:
      path: of the file.
    Returns:
      Variables as nested dicts of NumPy arrays (on no device yet, float64 intact), and the metadata, dicts
      where dicts were given.
    Raises:
      TypeError: `path` is none.
      FileNotFoundError: there is no file at `path`.
      ValueError: it is not a safetensors file, or is damaged or truncated.
      ImportError: the package safetensors is missing.

    Source: the safetensors format, https://github.com/huggingface/safetensors.

    Example:
      >>> from netdeconv_jax.interop import load_weights
      >>> variables, metadata = load_weights("model.safetensors")  # doctest: +SKIP
      >>> logits = model.apply(variables, images)  # doctest: +SKIP
    """
    library = _safetensors()
    path = check_path("path", path)
    if not path.is_file():
        what = "a folder" if path.is_dir() else "missing"
        raise FileNotFoundError(f"`path` must be a .safetensors file, but {str(path)!r} is {what}.")
    content = path.read_bytes()
    try:
        tensors = library.deserialize(content)
    except library.SafetensorError as error:
        raise ValueError(
            f"`path` must be a whole .safetensors file; {str(path)!r}, {len(content)} bytes, is damaged, "
            f"truncated or something else ({error})."
        ) from None
    # The parser has accepted the header, so that its length and its JSON are sound.
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    texts = dict(header.get("__metadata__") or {})
    own = json.loads(texts.pop(_OWN, "{}"))
    variables = _unflatten({name: _array(name, tensor) for name, tensor in tensors}, own)
    parsed = own.get("json", [])
    return variables, {n: json.loads(text) if n in parsed else text for n, text in texts.items()}


def _safetensors() -> Any:
    try:
        import safetensors.numpy
    except ImportError as error:
        raise ImportError(
            "Weight files need the package safetensors: pip install 'netdeconv-jax[interop]'."
        ) from error
    return safetensors


def _flatten(variables: Mapping[str, Any]) -> tuple[dict[str, np.ndarray], list[list[str]]]:
    """Return the leaves by joined name, and the paths of empty dicts."""
    check_variables("variables", variables)
    plain = unfreeze(meta.unbox(dict(variables)))
    flat: dict[tuple[Any, ...], Any] = traverse_util.flatten_dict(plain, keep_empty_nodes=True)
    arrays, empty = {}, []
    for names, value in flat.items():
        for name in names:
            if not isinstance(name, str):
                raise TypeError(f"`variables` must have names that are strings, got {name!r}.")
            if "/" in name or not name:
                raise ValueError(f'`variables` must have names without "/", got {name!r}.')
        if value is traverse_util.empty_node:
            empty.append(list(names))
        else:
            arrays["/".join(names)] = _checked("/".join(names), value)
    return arrays, empty


def _checked(name: str, value: Any) -> np.ndarray:
    if not hasattr(value, "dtype") and not isinstance(value, (bool, int, float)):
        raise TypeError(f"`variables` must hold arrays, got {type(value).__name__} at {name!r}.")
    if value_dtype := getattr(value, "dtype", None):
        _check_dtype(name, value_dtype)
    return np.asarray(value, order="C")


def _check_dtype(name: str, dtype: Any) -> None:
    if dtype not in [jnp.dtype(known) for known in _DTYPES.values()]:
        raise TypeError(
            f"`variables` must hold arrays of a dtype that safetensors knows, got {dtype} at {name!r}."
        )


def _metadata_texts(
    metadata: Mapping[str, str | Mapping[str, Any]], empty: list[list[str]]
) -> dict[str, str]:
    texts, parsed = {}, []
    for name, value in metadata.items():
        if name == _OWN:
            raise ValueError(f"`metadata` must not use the name {_OWN!r}, which holds our own.")
        if isinstance(value, Mapping):
            try:
                value = json.dumps(dict(value))
            except (TypeError, ValueError) as error:
                raise TypeError(f"`metadata[{name!r}]` must be what JSON knows: {error}.") from None
            parsed.append(name)
        if not isinstance(name, str) or not isinstance(value, str):
            kind = type(value).__name__
            raise TypeError(f"`metadata` must be texts or dicts by name, got {kind} at {name!r}.")
        texts[name] = value
    return texts | {_OWN: json.dumps({"empty": empty, "json": parsed})}


def _array(name: str, tensor: Mapping[str, Any]) -> np.ndarray:
    if tensor["dtype"] not in _DTYPES:
        raise ValueError(
            f"`path` must hold arrays that JAX knows, got {tensor['dtype']} at {name!r}."
        )
    dtype = jnp.dtype(_DTYPES[tensor["dtype"]])
    return np.frombuffer(tensor["data"], dtype).reshape(tensor["shape"])


def _unflatten(arrays: Mapping[str, np.ndarray], own: Mapping[str, Any]) -> dict[str, Any]:
    leaves = {tuple(name.split("/")): value for name, value in arrays.items()}
    for names in leaves:
        if any(names[:i] in leaves for i in range(len(names))):
            raise ValueError(f"`path` holds an array inside an array: {'/'.join(names)!r}.")
    leaves |= {tuple(names): traverse_util.empty_node for names in own.get("empty", [])}
    return traverse_util.unflatten_dict(leaves)
