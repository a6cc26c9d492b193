"""Handwritten digits, 1,797 images of 8x8 that come inside scikit-learn: no download.

  python -m train.main --config=configs/digits.py:cnn,deconv --workdir=runs/digits
  python -m train.main --config=configs/digits.py:cnn --compare=batch,deconv --seeds=0,1,2 --workdir=runs/demo

Hardware: two CPU cores. Time: half a minute for the comparison. Expected test accuracy, mean of seeds 0 to 2
(benchmarks/results/digits_demo.json): batch norm 86.7% after the first epoch and 99.2% after the last,
deconvolution 96.4% and 99.1%.
"""

from netdeconv_jax.models.units import NORMS
from train import config as configs

# The best of a sweep from 0.02 to 0.5 on images held out of the training set; how it was chosen and
# from what: benchmarks/digits_lr_sweep.py and benchmarks/results/digits_lr_sweep.json.
LEARNING_RATES = {"batch": 0.05, "deconv": 0.02}
UNTUNED = 0.05


def get_config(arg: str = "cnn,deconv") -> configs.Config:
    """Return the experiment `network,norm`; the norms differ in their learning rate only."""
    config = configs.default()
    config.dataset = "digits"
    config.network, config.norm = configs.network_and_norm(arg, NORMS)
    config.epochs = 15
    config.batch_size = 32
    config.eval_batch_size = 256
    # 64 whitens as well here and is several times as slow: on images this small the cost of a step is that
    # of the inverse square root, which grows with the third power of 9 * block_size.
    config.whitening.block_size = 16
    # No augmentation: the digits are centred, and fill their 8x8 pixels.
    config.optimizer.learning_rate = LEARNING_RATES.get(config.norm, UNTUNED)
    config.optimizer.weight_decay = 1e-3
    return config
