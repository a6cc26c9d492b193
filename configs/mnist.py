"""MNIST, 70,000 handwritten digits of 28x28.

  python -m train.prepare mnist --data_dir=DIR
  python -m train.main --config=configs/mnist.py:lenet,deconv --config.data_dir=DIR --workdir=runs/mnist

Hardware: two CPU cores. Time: half a minute with batch norm, one minute with deconvolution. Expected test
accuracy (one seed each): batch norm 98.0% after the first epoch and 99.3% after the last, deconvolution 98.5%
and 99.3%.
"""

from netdeconv_jax.models.units import NORMS
from train import config as configs


def get_config(arg: str = "lenet,deconv") -> configs.Config:
    """Return the experiment `network,norm`; all norms have the same settings."""
    config = configs.default()
    config.dataset = "mnist"
    config.network, config.norm = configs.network_and_norm(arg, NORMS)
    config.epochs = 5
    config.optimizer.weight_decay = 1e-3
    return config
