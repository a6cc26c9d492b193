"""A trained model as a program of plain convolutions, from the file that the trainer leaves.

  python -m netdeconv_jax.interop.export runs/x/model.safetensors --format=stablehlo
  python -m netdeconv_jax.interop.export runs/x/model.safetensors --format=onnx --output=model.onnx

Whitening and batch norms are folded, computation is in float32, and batches may be of any size. The input is
[batch, height, width, channels], normalized as in training. Neither the trainer nor orbax is needed; ONNX
needs the extra `onnx`, in an environment of its own. Exit status: 0, or 2 with one line that says why.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from netdeconv_jax.interop.dry_run import kernel_shapes
from netdeconv_jax.interop.fold import fold
from netdeconv_jax.interop.programs import export_onnx, export_stablehlo
from netdeconv_jax.interop.trained import load_model, misfit, trained_shape
from netdeconv_jax.models.registry import info
from netdeconv_jax.ops.arguments import check_path

FORMATS = {"stablehlo": export_stablehlo, "onnx": export_onnx}


def main(arguments: Sequence[str] | None = None) -> int:
    """Export; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="export", description="Export a trained model, folded to plain convolutions."
    )
    parser.add_argument("weights", type=Path, help="model.safetensors, as the trainer leaves it")
    parser.add_argument("--format", required=True, choices=sorted(FORMATS))
    parser.add_argument("--output", type=Path, help="default: beside the weights")
    parser.add_argument(
        "--image_size", type=_size, metavar="N or HxW", help="default: that of training, if known"
    )
    given = parser.parse_args(arguments)
    output = given.output or given.weights.with_suffix(f".{given.format}")
    try:
        if given.output:
            check_path("--output", output, to_write=True)
        model, variables, metadata = load_model(given.weights)
        if not variables.get("params"):
            raise ValueError(f"`weights` must hold parameters, {str(given.weights)!r} holds none.")
        kernel = kernel_shapes(model, variables)[0]
        shape = _input_shape(metadata, kernel, given.image_size)
        if why := misfit(model, variables, shape, any_size=False):
            size = "x".join(map(str, shape[:2]))
            raise ValueError(f"`--image_size` {size} is not that of the network's images: {why}.")
        plain, folded = fold(model.clone(dtype=None), variables)
        FORMATS[given.format](plain, folded, shape, output)
    except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
        print(f"export: {(str(error).splitlines() or [type(error).__name__])[0]}", file=sys.stderr)
        return 2
    print(f"{output}: images [batch, {', '.join(map(str, shape))}] to {model.num_classes} logits")
    return 0


def _size(text: str) -> tuple[int, int]:
    """Parse `32` or `32x48`."""
    numbers = text.lower().split("x")
    if len(numbers) > 2 or not all(n.isdecimal() and int(n) for n in numbers):
        raise argparse.ArgumentTypeError(f"must be a size as 32 or 32x48, got {text!r}")
    height, width = (int(numbers[i]) for i in (0, -1))
    return height, width


def _input_shape(
    metadata: Mapping[str, Any], kernel: tuple[int, ...], size: tuple[int, int] | None
) -> tuple[int, int, int]:
    """Height and width as asked for, or of training, or of the network; channels as the weights take them."""
    known = trained_shape(metadata) or (info(metadata["network"]).size,) * 2
    height, width = size or known[:2]
    if len(kernel) == 4:
        return height, width, kernel[2]
    channels, left = divmod(kernel[0], height * width)
    if left:
        raise ValueError(
            f"`--image_size` {height}x{width} does not fit a network of {kernel[0]} inputs; give the size of "
            "its images."
        )
    return height, width, channels


if __name__ == "__main__":
    sys.exit(main())
