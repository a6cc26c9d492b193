r"""CIFAR-10, 60,000 photos of 32x32, with the recipe of the original code.

  python -m train.prepare cifar10 --data_dir=DIR
  python -m train.main --config=configs/cifar10.py:resnet18,deconv --config.data_dir=DIR \
      --workdir=runs/cifar10

Hardware: one GPU. Time: 20 epochs of ResNet-18 take half a minute with batch norm and 50 to 75 s with
deconvolution on an H200, compilation left out, with --config.dtype=bfloat16 and
--config.whitening.preset=fast or mixed; on two CPU cores an epoch takes a quarter of an hour, one of the
same network with --config.model.width=0.25 two minutes. Expected accuracy, as published (Ye et al. 2020,
Table 1, ResNet-18): batch norm 92.64%, deconvolution 94.07%; after one epoch (--config.epochs=1) 56.25% and
72.89%. Found on the H200: 92.37% and, with `mixed`, 94.21%.
"""

from netdeconv_jax.models.units import NORMS
from train import config as configs


def get_config(arg: str = "resnet18,deconv") -> configs.Config:
    """Return the experiment `network,norm`; all norms have the same settings."""
    config = configs.default()
    config.dataset = "cifar10"
    config.network, config.norm = configs.network_and_norm(arg, NORMS)
    config.epochs = 20
    config.augment.crop = 4
    config.augment.flip = True
    config.optimizer.weight_decay = 1e-3
    return config
