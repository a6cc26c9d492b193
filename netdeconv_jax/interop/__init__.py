"""What leads out of and into the library: checkpoints of the original PyTorch project."""

from netdeconv_jax.interop.torch_checkpoint import load_torch_checkpoint

__all__ = ["load_torch_checkpoint"]
