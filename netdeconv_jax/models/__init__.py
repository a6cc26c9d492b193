"""The networks of the paper, with batch norm, channel deconvolution, full deconvolution or none."""

from netdeconv_jax.models.network import Network
from netdeconv_jax.models.registry import ModelInfo, create
from netdeconv_jax.models.registry import list_models as list
from netdeconv_jax.models.units import Units

__all__ = ["ModelInfo", "Network", "Units", "create", "list"]
