"""The published accuracies in percent, by network: batch norm, channel deconvolution, full deconvolution.

Source: Ye et al. 2020. `FINAL` is Table 1 of the ICLR paper, CIFAR-10 after 1 and 20 epochs, as listed
again by the replication study lamps-lab/rep-network-deconvolution, whose three seeds after 20 epochs are
`REPLICATED` (least, most). `PREPRINT` is Table 1 (left) of arXiv 1905.11926v1.
"""

FINAL: dict[str, dict[int, dict[str, float]]] = {
    "vgg16": {1: {"batch": 14.12, "deconv": 74.18}, 20: {"batch": 90.07, "deconv": 93.25}},
    "resnet18": {1: {"batch": 56.25, "deconv": 72.89}, 20: {"batch": 92.64, "deconv": 94.07}},
    "preact_resnet18": {
        1: {"batch": 55.15, "deconv": 72.70},
        20: {"batch": 91.93, "deconv": 94.10},
    },
    "densenet121": {1: {"batch": 59.56, "deconv": 76.63}, 20: {"batch": 93.25, "deconv": 94.89}},
    "resnext29_32x4d": {
        1: {"batch": 52.14, "deconv": 69.22},
        20: {"batch": 93.12, "deconv": 94.05},
    },
    "mobilenetv2": {1: {"batch": 54.29, "deconv": 65.40}, 20: {"batch": 89.86, "deconv": 92.52}},
    "dpn92": {1: {"batch": 34.00, "deconv": 53.02}, 20: {"batch": 92.87, "deconv": 93.74}},
    "pnasnet_a": {1: {"batch": 21.81, "deconv": 64.19}, 20: {"batch": 75.85, "deconv": 81.97}},
    "senet18": {1: {"batch": 57.63, "deconv": 67.21}, 20: {"batch": 92.37, "deconv": 94.11}},
    "efficientnet_b0": {
        1: {"batch": 35.40, "deconv": 55.67},
        20: {"batch": 84.21, "deconv": 86.78},
    },
}

PREPRINT: dict[str, dict[int, dict[str, float]]] = {
    "vgg11": {20: {"deconv": 91.33, "batch": 89.15, "channel": 90.23}},
    "densenet121": {20: {"deconv": 94.71, "batch": 93.45, "channel": 93.65}},
    "resnet50": {20: {"deconv": 94.05, "batch": 90.6, "channel": 91.7}},
}

REPLICATED: dict[str, dict[str, tuple[float, float]]] = {
    "vgg16": {"batch": (90.2, 90.6), "deconv": (92.7, 93.0)},
    "resnet18": {"batch": (92.3, 92.4), "deconv": (94.1, 94.3)},
    "preact_resnet18": {"batch": (89.7, 90.7), "deconv": (94.2, 94.3)},
    "densenet121": {"batch": (93.0, 93.2), "deconv": (94.8, 95.0)},
    "resnext29_32x4d": {"batch": (92.0, 92.6), "deconv": (93.5, 93.7)},
    "mobilenetv2": {"batch": (90.7, 90.7), "deconv": (92.0, 92.2)},
    "dpn92": {"batch": (91.6, 92.2), "deconv": (93.5, 93.7)},
    "pnasnet_a": {"batch": (46.0, 66.0), "deconv": (81.4, 81.9)},
    "senet18": {"batch": (92.5, 92.9), "deconv": (94.2, 94.4)},
    "efficientnet_b0": {"batch": (84.2, 85.5), "deconv": (87.5, 88.1)},
}

# Claims, what is published, and where the nearest thing is that can be run or read.
WITHOUT = (
    (
        "Table 1, CIFAR-100, 1, 20 and 100 epochs; CIFAR-10, 100 epochs",
        "ten networks, deconvolution ahead in all",
        "`python -m train.main --config=configs/cifar100.py:resnet18,deconv --config.epochs=20`, and so on",
    ),
    (
        "Preprint table 1 (right), CIFAR-100, 100 epochs, batch 256, weight decay 5e-3",
        "VGG-13 74.74, 70.57 with batch norm; DenseNet-121 80.27, 79.2; ResNet-50 80.43, 77.78",
        "`--config=configs/cifar100.py:vgg13,deconv --config.epochs=100 --config.batch_size=256 "
        "--config.optimizer.weight_decay=5e-3`",
    ),
    (
        "ImageNet, 90 epochs (table 2 of the paper, figures 7 and 8(b) of the preprint)",
        "VGG-11 71.95, 70.38 with batch norm; ResNet-18 71.24, 69.76; DenseNet-121 75.73, 74.65",
        "`python -m train.main --config=configs/imagenet.py:resnet18,deconv`",
    ),
    (
        "Cityscapes, DeepLabV3 and FCN",
        "deconvolution ahead of batch norm",
        "no network for it here yet",
    ),
    (
        "Abstract: at a fraction of the cost of a convolution layer",
        "in words",
        "[performance.md](performance.md): what statistics, root and folding take beside the convolutions",
    ),
)
