r"""ImageNet, 1.28 million photos in 1000 classes.

  python -m train.prepare imagenet2012 --data_dir=DIR --manual_dir=FOLDER_OF_THE_TARS
  python -m train.main --config=configs/imagenet.py:resnet18,deconv --config.data_dir=DIR \
      --workdir=runs/imagenet
  python -m train.main --config=configs/imagenet.py:resnet50,deconv,modern ...

Hardware: eight GPUs, or a slice of TPUs. Time: not measured yet. Expected top-1 accuracy of the original
recipe, as published (Ye et al. 2020): VGG-11 batch norm 70.38%, deconvolution 71.95%; ResNet-18 69.76% and
71.24%; DenseNet-121 74.65% and 75.73%. The published networks are those of --config.model.layout=original.
The modern recipe has no published figures.
"""

from netdeconv_jax.models import list as list_models
from netdeconv_jax.models.units import NORMS
from train import config as configs

RECIPES = ("original", "modern")


def get_config(arg: str = "resnet50,deconv") -> configs.Config:
    """Return the experiment `network,norm` or `network,norm,recipe`.

    A network goes by its name with `_imagenet` or without.
    """
    config = configs.default()
    network, norm, recipe, *more = (*arg.split(","), *("", "original")[arg.count(",") :])
    if more or recipe not in RECIPES:
        raise ValueError(
            f"`:network,norm` may be followed by a comma and one of {RECIPES}, got {arg!r}."
        )
    config.dataset = "imagenet2012"
    config.network, config.norm = configs.network_and_norm(f"{network},{norm}", NORMS)
    if f"{network}_imagenet" in list_models():
        config.network = f"{network}_imagenet"
    config.epochs = 90
    config.batch_size = config.eval_batch_size = 256
    config.optimizer.weight_decay = 1e-4
    config.optimizer.learning_rate = 0.01 if network.startswith("vgg") else 0.1
    config.checkpoint.every_steps = 1000
    if recipe == "modern":
        _modern(config)
    return config


def _modern(config: configs.Config) -> None:
    """What is done today: a larger batch, half precision, a soft start and soft labels."""
    config.dtype = "bfloat16"
    config.label_smoothing = 0.1
    config.batch_size = config.eval_batch_size = 1024
    config.optimizer.learning_rate *= 4  # as much larger as the batch
    config.optimizer.warmup_epochs = 5.0
    config.optimizer.decay_on = "kernels"
