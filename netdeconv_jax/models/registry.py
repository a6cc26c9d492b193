"""Networks by name: `create` and `list_models`."""

import dataclasses
import difflib
import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from netdeconv_jax.models.airbench import AirBench
from netdeconv_jax.models.cnn import CNN
from netdeconv_jax.models.densenet import DenseNet, ImageNetDenseNet
from netdeconv_jax.models.dpn import DPN
from netdeconv_jax.models.efficientnet import EfficientNet
from netdeconv_jax.models.lenet import LeNet
from netdeconv_jax.models.mlp import MLP, Linear
from netdeconv_jax.models.mobilenetv2 import MobileNetV2
from netdeconv_jax.models.network import Network
from netdeconv_jax.models.pnasnet import CellA, CellB, PNASNet
from netdeconv_jax.models.preact_resnet import PreActResNet
from netdeconv_jax.models.resnet import BasicBlock, Bottleneck, ImageNetResNet, ResNet
from netdeconv_jax.models.resnext import ResNeXt
from netdeconv_jax.models.senet import SENet
from netdeconv_jax.models.vgg import DEPTHS, VGG, ImageNetVGG
from netdeconv_jax.whitening import WhiteningSpec


@dataclasses.dataclass(frozen=True)
class ModelInfo:
    """What there is to know of a network before it is built.

    Attributes:
      make: returns the network, given the fields of `Network`.
      parameters: of the `"deconv"` form with three input channels and 10 classes at `size`.
      summary: one line.
      size: height and width of the images it is made for.

    Source: ours.

    Example:
      >>> from netdeconv_jax import models
      >>> models.list()["lenet"].size
      32
    """

    make: Callable[..., Network]
    parameters: int
    summary: str
    size: int = 32

    def __str__(self) -> str:
        return f"{self.parameters / 1e6:7.2f} M  {self.size:3d}x{self.size:<3d}  {self.summary}"


class ModelList(dict[str, ModelInfo]):
    """Networks by name; prints as a table."""

    def __str__(self) -> str:
        return "\n".join(f"{name:20} {info}" for name, info in self.items())


def _resnet(*blocks: int, block: Any = BasicBlock, kind: Any = ResNet) -> Callable[..., Network]:
    return functools.partial(kind, blocks, block)


_INFO = ModelList(
    linear=ModelInfo(Linear, 30_730, "one dense layer, for inputs of any shape"),
    mlp=ModelInfo(MLP, 427_658, "three hidden layers of 128 sigmoid units, any shape"),
    cnn=ModelInfo(CNN, 66_218, "four convolutions, 32 to 64 features, any size"),
    lenet=ModelInfo(LeNet, 136_886, "LeNet-5 with ReLU, any size"),
    airbench=ModelInfo(AirBench, 1_971_650, "of CIFAR-10 speed runs, 7 convolutions"),
    vgg11=ModelInfo(functools.partial(VGG, DEPTHS["vgg11"]), 9_225_610, "VGG, 8 convolutions"),
    vgg13=ModelInfo(functools.partial(VGG, DEPTHS["vgg13"]), 9_410_122, "VGG, 10 convolutions"),
    vgg16=ModelInfo(functools.partial(VGG, DEPTHS["vgg16"]), 14_719_818, "VGG, 13 convolutions"),
    vgg19=ModelInfo(functools.partial(VGG, DEPTHS["vgg19"]), 20_029_514, "VGG, 16 convolutions"),
    resnet18=ModelInfo(_resnet(2, 2, 2, 2), 11_169_162, "ResNet, basic blocks"),
    resnet34=ModelInfo(_resnet(3, 4, 6, 3), 21_273_610, "ResNet, basic blocks"),
    resnet50=ModelInfo(_resnet(3, 4, 6, 3, block=Bottleneck), 23_494_282, "ResNet, bottlenecks"),
    resnet101=ModelInfo(_resnet(3, 4, 23, 3, block=Bottleneck), 42_460_298, "ResNet, bottlenecks"),
    resnet152=ModelInfo(_resnet(3, 8, 36, 3, block=Bottleneck), 58_080_906, "ResNet, bottlenecks"),
    preact_resnet18=ModelInfo(PreActResNet, 11_169_162, "ResNet, norm and ReLU first"),
    densenet121=ModelInfo(DenseNet, 6_883_018, "DenseNet, growth 32"),
    resnext29_32x4d=ModelInfo(ResNeXt, 4_761_610, "ResNeXt, 32 groups of 4 features"),
    mobilenetv2=ModelInfo(MobileNetV2, 2_279_378, "depthwise inverted residuals"),
    dpn92=ModelInfo(DPN, 34_179_970, "dual path: a residual and a dense one"),
    pnasnet_a=ModelInfo(functools.partial(PNASNet, CellA, 44), 128_226, "searched cells, plain"),
    pnasnet_b=ModelInfo(functools.partial(PNASNet, CellB, 32), 445_258, "searched cells, branched"),
    senet18=ModelInfo(SENet, 11_258_242, "ResNet with channel gates"),
    efficientnet_b0=ModelInfo(EfficientNet, 2_892_193, "inverted residuals with channel gates"),
    vgg11_imagenet=ModelInfo(
        functools.partial(ImageNetVGG, DEPTHS["vgg11"]), 128_807_306, "VGG, 8 convolutions", 224
    ),
    vgg16_imagenet=ModelInfo(
        functools.partial(ImageNetVGG, DEPTHS["vgg16"]), 134_301_514, "VGG, 13 convolutions", 224
    ),
    resnet18_imagenet=ModelInfo(
        _resnet(2, 2, 2, 2, kind=ImageNetResNet), 11_176_842, "ResNet, basic blocks", 224
    ),
    resnet34_imagenet=ModelInfo(
        _resnet(3, 4, 6, 3, kind=ImageNetResNet), 21_281_290, "ResNet, basic blocks", 224
    ),
    resnet50_imagenet=ModelInfo(
        _resnet(3, 4, 6, 3, block=Bottleneck, kind=ImageNetResNet),
        23_501_962,
        "ResNet, bottlenecks",
        224,
    ),
    densenet121_imagenet=ModelInfo(ImageNetDenseNet, 6_890_698, "DenseNet, growth 32", 224),
)


def list_models() -> ModelList:
    """Return every network of the zoo by name, with its parameters and a line of description.

    Returns:
      A dict of `ModelInfo` that prints as a table.

    Source: the networks of Ye et al. 2020, section 4, and the original code; `airbench` is Jordan's (2024).

    Example:
      >>> from netdeconv_jax import models
      >>> print(models.list()["resnet18"])
        11.17 M   32x32   ResNet, basic blocks
    """
    return ModelList(_INFO)


def info(name: str) -> ModelInfo:
    """Return the entry of a network.

    Args:
      name: a key of `list_models()`.
    Raises:
      ValueError: there is no such network; the message suggests the nearest names.
    """
    if name in _INFO:
        return _INFO[name]
    near = difflib.get_close_matches(str(name).lower().replace("-", ""), _INFO, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"known are {[*_INFO]}."
    raise ValueError(f"`name` must be a network of the zoo, got {name!r}; {hint}")


def create(
    name: str,
    norm: str = "deconv",
    num_classes: int = 10,
    spec: WhiteningSpec | None = None,
    layout: str = "full",
    *,
    width: float = 1.0,
    dtype: Any = None,
    param_dtype: Any = jnp.float32,
    axis_name: Any = None,
) -> Network:
    """Return a network of the zoo by name, with a choice of norm.

    Args:
      name: a key of `list_models()`.
      norm: `"batch"` (momentum 0.9, epsilon 1e-5), `"deconv"`, `"channel"` (whitens channels, not pixels) or
        `"none"`.
      num_classes: int >= 1.
      spec: how layers whiten, default `WhiteningSpec()`; stems and some layers lay their own over it.
      layout: `"full"`, or `"original"` for the network that the original code built, quirks included.
      width: multiplies every number of features; for quick runs.
      dtype: of computation, as `nn.Conv`; logits are float32 at least.
      param_dtype: of parameters.
      axis_name: mapped axis over which statistics are pooled, as `nn.BatchNorm`.
    Returns:
      A Linen module: `model.apply(variables, x, train=True, mutable=["batch_stats"])` with x [batch, height,
      width, channels].
    Raises:
      ValueError: an unknown `name`, `norm` or `layout`, or a `num_classes` or `width` that is not positive.
      TypeError: `num_classes` is not an int, `width` not a number, `spec` no `WhiteningSpec`, or `dtype` or
        `param_dtype` not floating point.

    Source: Ye et al. 2020, section 4; stems and overrides of the original code.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from netdeconv_jax import models
      >>> model, x = models.create("resnet18", norm="deconv", width=0.125), jnp.ones((2, 32, 32, 3))
      >>> variables = jax.eval_shape(model.init, jax.random.key(0), x)
      >>> jax.eval_shape(model.apply, variables, x).shape
      (2, 10)
    """
    return info(name).make(
        num_classes=num_classes,
        norm=norm,
        spec=WhiteningSpec() if spec is None else spec,
        layout=layout,
        width=width,
        dtype=dtype,
        param_dtype=param_dtype,
        axis_name=axis_name,
    )
