"""A trained model and the world around it: other people's checkpoints, files and training loops."""

from netdeconv_jax.interop.batch_norm import merge_batch_norm
from netdeconv_jax.interop.fold import fold
from netdeconv_jax.interop.folded_model import FoldedModel
from netdeconv_jax.interop.microbatches import accumulate
from netdeconv_jax.interop.nnx_weights import nnx_update, nnx_variables
from netdeconv_jax.interop.programs import export_onnx, export_stablehlo
from netdeconv_jax.interop.recalibrate import recalibrate
from netdeconv_jax.interop.torch_checkpoint import load_torch_checkpoint
from netdeconv_jax.interop.trained import load_model
from netdeconv_jax.interop.warm_start import warm_start
from netdeconv_jax.interop.weights import load_weights, save_weights

__all__ = [
    "FoldedModel",
    "accumulate",
    "export_onnx",
    "export_stablehlo",
    "fold",
    "load_model",
    "load_torch_checkpoint",
    "load_weights",
    "merge_batch_norm",
    "nnx_update",
    "nnx_variables",
    "recalibrate",
    "save_weights",
    "warm_start",
]
