"""The published accuracies in percent, by network: batch norm, channel deconvolution, full deconvolution.

Source: Ye et al. 2020. `FINAL` and `FINAL_CIFAR100` are Table 1 of the ICLR paper, by epochs, and
`FINAL_IMAGENET` Table 2, top-1, as listed again by the replication study lamps-lab/rep-network-deconvolution,
whose three seeds after 20 epochs of CIFAR-10 are `REPLICATED` (least, most). `PREPRINT` and
`PREPRINT_CIFAR100` are Table 1 (left, right) of arXiv 1905.11926v1.
"""

FINAL: dict[str, dict[int, dict[str, float]]] = {
    "vgg16": {
        1: {"batch": 14.12, "deconv": 74.18},
        20: {"batch": 90.07, "deconv": 93.25},
        100: {"batch": 93.58, "deconv": 94.56},
    },
    "resnet18": {
        1: {"batch": 56.25, "deconv": 72.89},
        20: {"batch": 92.64, "deconv": 94.07},
        100: {"batch": 94.87, "deconv": 95.40},
    },
    "preact_resnet18": {
        1: {"batch": 55.15, "deconv": 72.70},
        20: {"batch": 91.93, "deconv": 94.10},
        100: {"batch": 94.37, "deconv": 95.44},
    },
    "densenet121": {
        1: {"batch": 59.56, "deconv": 76.63},
        20: {"batch": 93.25, "deconv": 94.89},
        100: {"batch": 94.71, "deconv": 95.88},
    },
    "resnext29_32x4d": {
        1: {"batch": 52.14, "deconv": 69.22},
        20: {"batch": 93.12, "deconv": 94.05},
        100: {"batch": 95.15, "deconv": 95.80},
    },
    "mobilenetv2": {
        1: {"batch": 54.29, "deconv": 65.40},
        20: {"batch": 89.86, "deconv": 92.52},
        100: {"batch": 90.51, "deconv": 94.35},
    },
    "dpn92": {
        1: {"batch": 34.00, "deconv": 53.02},
        20: {"batch": 92.87, "deconv": 93.74},
        100: {"batch": 95.14, "deconv": 95.82},
    },
    "pnasnet_a": {
        1: {"batch": 21.81, "deconv": 64.19},
        20: {"batch": 75.85, "deconv": 81.97},
        100: {"batch": 81.22, "deconv": 84.45},
    },
    "senet18": {
        1: {"batch": 57.63, "deconv": 67.21},
        20: {"batch": 92.37, "deconv": 94.11},
        100: {"batch": 94.57, "deconv": 95.38},
    },
    "efficientnet_b0": {
        1: {"batch": 35.40, "deconv": 55.67},
        20: {"batch": 84.21, "deconv": 86.78},
        100: {"batch": 86.07, "deconv": 88.42},
    },
}

FINAL_CIFAR100: dict[str, dict[int, dict[str, float]]] = {
    "vgg16": {
        1: {"batch": 2.01, "deconv": 37.94},
        20: {"batch": 63.22, "deconv": 71.97},
        100: {"batch": 72.75, "deconv": 75.32},
    },
    "resnet18": {
        1: {"batch": 16.10, "deconv": 35.73},
        20: {"batch": 72.67, "deconv": 76.55},
        100: {"batch": 77.70, "deconv": 78.63},
    },
    "preact_resnet18": {
        1: {"batch": 15.17, "deconv": 36.52},
        20: {"batch": 70.79, "deconv": 76.04},
        100: {"batch": 76.14, "deconv": 79.14},
    },
    "densenet121": {
        1: {"batch": 17.90, "deconv": 42.91},
        20: {"batch": 74.79, "deconv": 77.63},
        100: {"batch": 77.99, "deconv": 80.69},
    },
    "resnext29_32x4d": {
        1: {"batch": 17.98, "deconv": 30.93},
        20: {"batch": 74.26, "deconv": 77.35},
        100: {"batch": 78.60, "deconv": 80.34},
    },
    "mobilenetv2": {
        1: {"batch": 15.88, "deconv": 29.01},
        20: {"batch": 66.31, "deconv": 72.33},
        100: {"batch": 67.52, "deconv": 74.90},
    },
    "dpn92": {
        1: {"batch": 8.84, "deconv": 21.89},
        20: {"batch": 74.87, "deconv": 76.12},
        100: {"batch": 78.87, "deconv": 80.38},
    },
    "pnasnet_a": {
        1: {"batch": 10.49, "deconv": 36.52},
        20: {"batch": 44.60, "deconv": 55.65},
        100: {"batch": 54.52, "deconv": 59.44},
    },
    "senet18": {
        1: {"batch": 16.60, "deconv": 32.22},
        20: {"batch": 71.10, "deconv": 75.79},
        100: {"batch": 76.41, "deconv": 78.63},
    },
    "efficientnet_b0": {
        1: {"batch": 19.03, "deconv": 22.40},
        20: {"batch": 57.23, "deconv": 57.59},
        100: {"batch": 59.09, "deconv": 62.37},
    },
}

PREPRINT: dict[str, dict[int, dict[str, float]]] = {
    "vgg11": {20: {"deconv": 91.33, "batch": 89.15, "channel": 90.23}},
    "densenet121": {20: {"deconv": 94.71, "batch": 93.45, "channel": 93.65}},
    "resnet50": {20: {"deconv": 94.05, "batch": 90.6, "channel": 91.7}},
}

PREPRINT_CIFAR100: dict[str, dict[int, dict[str, float]]] = {
    "vgg13": {100: {"deconv": 74.74, "batch": 70.57, "channel": 74.31}},
    "densenet121": {100: {"deconv": 80.27, "batch": 79.2, "channel": 79.09}},
    "resnet50": {100: {"deconv": 80.43, "batch": 77.78, "channel": 76.62}},
}

FINAL_IMAGENET: dict[str, dict[int, dict[str, float]]] = {
    "vgg11": {90: {"batch": 70.38, "deconv": 71.95}},
    "resnet18": {90: {"batch": 69.76, "deconv": 71.24}},
    "densenet121": {90: {"batch": 74.65, "deconv": 75.73}},
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

REPLICATION = (
    "three seeds of the [replication study](https://github.com/lamps-lab/rep-network-deconvolution), which "
    "are rounded to 0.1"
)

# Claims, what is published, and where the nearest thing is that can be run or read.
WITHOUT = (
    (
        "Figures 7 and 8(b) of the preprint: ImageNet, channel deconvolution beside the others",
        "VGG-11 71.45, 71.74 with full deconvolution; ResNet-18 69.80 and 70.65",
        "`python -m train.main --config=configs/imagenet.py:resnet18,channel`",
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
