r"""CIFAR-100, 60,000 photos of 32x32 in 100 classes, with the recipe of the original code: CIFAR-10's.

  python -m train.prepare cifar100 --data_dir=DIR
  python -m train.main --config=configs/cifar100.py:resnet18,deconv --config.data_dir=DIR \
      --workdir=runs/cifar100

Hardware: one GPU. Time: not measured. Expected accuracy, as published (Ye et al. 2020,
Table 1, ResNet-18): batch norm 72.67%, deconvolution 76.55%.
"""

from configs import cifar10
from train import config as configs


def get_config(arg: str = "resnet18,deconv") -> configs.Config:
    """Return the experiment `network,norm`."""
    config = cifar10.get_config(arg)
    config.dataset = "cifar100"
    return config
