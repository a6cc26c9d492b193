"""How the original PyTorch networks call the layers of the zoo.

A layer's path in the Flax variables is turned into its prefix in the `state_dict` by the rules of its
network. Most names are the same; what differs are containers (`layer1_0` is `layer1.0`), shortcuts, which
some networks wrap in a `Sequential` and some do not, and VGG, where layers are numbered with the activations
between them.
"""

import re
from collections.abc import Callable, Iterable

from netdeconv_jax.models.vgg import DEPTHS

_SEQUENCES = ((r"(layer\d|layers|dense\d)_(\d+)", r"\1.\2"),)
_SHORTCUT_SEQUENCE = ((r"shortcut_bn$", "shortcut.1"), (r"shortcut$", "shortcut.0"))
_DOWNSAMPLE = ((r"shortcut_bn$", "downsample.1"), (r"shortcut$", "downsample.0"))
_IMAGENET_DENSENET = (
    (r"^conv1$", "features.conv0"),
    (r"^bn1$", "features.norm0"),
    (r"^bn$", "features.norm5"),
    (r"^dense(\d)_(\d+)", lambda m: f"features.denseblock{m[1]}.denselayer{int(m[2]) + 1}"),
    (r"^trans", "features.transition"),
    (r"bn(\d?)$", r"norm\1"),
)

# Whitened shortcuts stand alone in these networks, plain ones in a sequence.
_LONE_WHITENED_SHORTCUT = ("preact_resnet18", "senet18", "dpn92")
_NOT_THERE = ("linear", "mlp", "cnn", "lenet", "airbench")


def torch_module(
    name: str, paths: Iterable[tuple[str, ...]], whitened: set[tuple[str, ...]]
) -> Callable[[tuple[str, ...]], str]:
    """Return a function from the Flax path of a layer to its prefix in the original's `state_dict`.

    Args:
      name: of the network.
      paths: of all layers that have variables.
      whitened: of those that whiten.
    Raises:
      ValueError: the original has no such network.
    """
    if name in _NOT_THERE:
        raise ValueError(f"`name`: the original project has no checkpoints of {name!r}.")
    paths = set(paths)
    if name.startswith("vgg"):
        return _vgg(name, paths)

    def module(path: tuple[str, ...]) -> str:
        if name == "densenet121_imagenet":
            rules = _IMAGENET_DENSENET
        elif name.endswith("_imagenet"):
            rules = _SEQUENCES + _DOWNSAMPLE
        elif name in _LONE_WHITENED_SHORTCUT and path in whitened:
            rules = _SEQUENCES
        else:
            rules = _SEQUENCES + _SHORTCUT_SEQUENCE
        torch_name = ".".join(path)
        for pattern, replacement in rules:
            torch_name = re.sub(pattern, replacement, torch_name)
        return torch_name

    return module


def _vgg(name: str, paths: set[tuple[str, ...]]) -> Callable[[tuple[str, ...]], str]:
    """Number convolutions, norms, activations and pools as one sequence."""
    slots = 3 if ("bn1",) in paths else 2
    position, number, names = 0, 0, {"fc1": "classifier.0", "fc2": "classifier.3"}
    names |= {"fc3": "classifier.6", "classifier": "classifier"}
    for depth in DEPTHS[name.removesuffix("_imagenet")]:
        for _ in range(depth):
            number += 1
            names[f"conv{number}"] = f"features.{position}"
            names[f"bn{number}"] = f"features.{position + 1}"
            position += slots
        position += 1
    return lambda path: names[".".join(path)]
