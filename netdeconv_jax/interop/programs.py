"""A model as a program that runs without this library: StableHLO for XLA, ONNX for everything else."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from netdeconv_jax.ops.arguments import check_path

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
INPUT, OUTPUT = "images", "logits"  # of an ONNX graph
ONNX_TOLERANCE = 1e-3  # of the largest value; a wrong graph is wrong by much more


def export_stablehlo(
    model: Any,
    variables: Mapping[str, Any] | None,
    input_shape: Sequence[int],
    path: str | os.PathLike | None = None,
    *,
    platforms: Sequence[str] = ("cpu", "cuda", "tpu"),
    dtype: Any = jnp.float32,
    **apply_kwargs: Any,
) -> jax.export.Exported:
    """Return a model as a StableHLO program with its weights inside, for batches of any size.

    What is exported is the model as it is given: `fold` it first. The file needs `jax` alone:
    `jax.export.deserialize(Path("model.stablehlo").read_bytes()).call(images)`.

    Args:
      model: a Linen module, what `fold` returned, or an NNX module.
      variables: of the model; None for NNX.
      input_shape: of one input, without the batch: (height, width, channels).
      path: of a file to write; None writes none.
      platforms: that the program is for.
      dtype: of the input.
      **apply_kwargs: what `model.apply`, or an NNX model's call, needs besides: `train=False`.
    Returns:
      The program: it maps [batch, *input_shape] to what the model returns.
    Raises:
      ValueError: `input_shape` is not of positive ints, or `variables` are missing or one too many.
      TypeError: `path` is none.
      ImportError: the package flatbuffers is missing, which a file needs.
      OSError: the file cannot be written; FileNotFoundError, before all else, where its folder is missing.

    Source: ours, by `jax.export`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from netdeconv_jax import models
      >>> from netdeconv_jax.interop import export_stablehlo, fold
      >>> model, x = models.create("lenet", norm="deconv", width=0.5), jnp.ones((2, 8, 8, 1))
      >>> folded = fold(model, model.init(jax.random.key(0), x))
      >>> program = export_stablehlo(*folded, (8, 8, 1))
      >>> again = jax.export.deserialize(program.serialize())
      >>> again.platforms, again.call(x).shape
      (('cpu', 'cuda', 'tpu'), (2, 10))
    """
    place = None if path is None else check_path("path", path, to_write=True)
    platforms = (platforms,) if isinstance(platforms, str) else tuple(platforms)
    if not platforms or not set(platforms) <= set(PLATFORMS):
        raise ValueError(f"`platforms` must be some of {PLATFORMS}, got {platforms}.")
    run = _forward(model, variables, apply_kwargs)
    (batch,) = jax.export.symbolic_shape("batch")
    x = jax.ShapeDtypeStruct((batch, *_checked(input_shape)), dtype)
    program = jax.export.export(jax.jit(run), platforms=platforms)(x)
    if place is not None:
        _write(place, _serialized(program))
    return program


def export_onnx(
    model: Any,
    variables: Mapping[str, Any] | None,
    input_shape: Sequence[int],
    path: str | os.PathLike | None = None,
    **apply_kwargs: Any,
) -> Any:
    """Return a model as an ONNX graph with its weights inside, for batches of any size.

    The graph has one input, `images` [batch, *input_shape] in float32, and one output, `logits`. What is
    exported is the model as it is given: `fold` it first, and let it compute in float32, since runtimes on
    CPUs know no bfloat16. The graph is run once in onnxruntime, on noise, and compared with the model.

    Args:
      model, variables, input_shape, path, **apply_kwargs: as `export_stablehlo`.
    Returns:
      An `onnx.ModelProto`.
    Raises:
      ValueError: `input_shape` is not of positive ints, or `variables` are missing or one too many.
      ImportError: jax2onnx or onnxruntime is missing: the extra `onnx`, in an environment of its own.
      RuntimeError: onnxruntime finds other values than the model, or cannot run the graph: jax2onnx does not
        translate all that JAX can do.
      TypeError, OSError: as `export_stablehlo`.

    Source: ours, by jax2onnx.

    Example:
      >>> from netdeconv_jax.interop import export_onnx
      >>> graph = export_onnx(model, variables, (32, 32, 3), "model.onnx")  # doctest: +SKIP
    """
    place = None if path is None else check_path("path", path, to_write=True)
    run = _forward(model, variables, apply_kwargs)
    shape = ("batch", *_checked(input_shape))
    try:
        import onnxruntime  # pyright: ignore[reportMissingImports]
        from jax2onnx import to_onnx  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError(
            "ONNX needs jax2onnx and onnxruntime, in an environment of its own, since jax2onnx holds orbax "
            "at an old version: pip install 'netdeconv-jax[onnx]'."
        ) from error
    graph = to_onnx(
        run, [shape], model_name=type(model).__name__, input_names=[INPUT], output_names=[OUTPUT]
    )
    content = graph.SerializeToString()
    x = np.random.default_rng(0).normal(size=(2, *shape[1:])).astype(np.float32)
    try:
        (found,) = onnxruntime.InferenceSession(content).run(None, {INPUT: x})
    except Exception as error:  # of onnxruntime's own kinds
        reason = str(error).splitlines()[0]
        raise RuntimeError(
            f"onnxruntime cannot run what jax2onnx made of `model`: {reason}"
        ) from error
    _check_same(found, np.asarray(jax.jit(run)(x)))
    if place is not None:
        _write(place, content)
    return graph


def _check_same(found: np.ndarray, expected: np.ndarray) -> None:
    """Raise unless a graph gave what the model gives."""
    wrong = "another shape" if found.shape != expected.shape else None
    if wrong is None:
        error = np.abs(found - expected).max() / max(np.abs(expected).max(), 1e-30)
        wrong = f"an error of {error:.1e}" if not error < ONNX_TOLERANCE else None
    if wrong:
        raise RuntimeError(f"The graph that jax2onnx made of `model` has {wrong} in onnxruntime.")


def _serialized(program: jax.export.Exported) -> bytes:
    try:
        import flatbuffers  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError(
            "Files of programs need the package flatbuffers: pip install 'netdeconv-jax[interop]'."
        ) from error
    return bytes(program.serialize())


def _forward(model: Any, variables: Any, apply_kwargs: Mapping[str, Any]) -> Callable[[Any], Any]:
    """What maps an input to the model's output; the weights are constants of it."""
    if hasattr(model, "apply"):  # Linen, or folded
        if variables is None:
            raise ValueError("`variables` must be those of the Linen module `model`, got None.")
        arrays = jax.tree.map(jnp.asarray, nn.unbox(variables))
        return lambda x: model.apply(arrays, x, **apply_kwargs)
    if variables is not None:
        raise ValueError("`variables` must be None for an NNX module, which holds its own.")
    from flax import nnx

    graph, state = nnx.split(model)
    # Copied: the variables of a transform must be made inside of the trace.
    return lambda x: nnx.merge(graph, state, copy=True)(x, **apply_kwargs)


def _checked(input_shape: Sequence[int]) -> tuple[int, ...]:
    shape = tuple(int(n) if isinstance(n, np.integer) else n for n in input_shape)
    if not shape or not all(isinstance(n, int) and n > 0 for n in shape):
        raise ValueError(
            f"`input_shape` must be positive ints, without the batch, as (32, 32, 3); got {input_shape}."
        )
    return shape


def _write(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
