r"""Fashion-MNIST, 70,000 pictures of clothes, 28x28.

  python -m train.prepare fashion_mnist --data_dir=DIR
  python -m train.main --config=configs/fashion_mnist.py:lenet,deconv --config.data_dir=DIR \
      --workdir=runs/fashion

Hardware: two CPU cores. Time: one minute with batch norm, a minute and a half with deconvolution. Expected
test accuracy (one seed each): batch norm 82.4% after the first epoch and 90.9% after the last,
deconvolution 88.8% and 91.9%.
"""

from netdeconv_jax.models.units import NORMS
from train import config as configs


def get_config(arg: str = "lenet,deconv") -> configs.Config:
    """Return the experiment `network,norm`; all norms have the same settings."""
    config = configs.default()
    config.dataset = "fashion_mnist"
    config.network, config.norm = configs.network_and_norm(arg, NORMS)
    config.epochs = 5
    config.optimizer.weight_decay = 1e-3
    return config
