"""With `layout="original"` every network is the original's, number by number, in float64."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from reference_models import CASES, images, read, state_dict

from netdeconv_jax import models
from netdeconv_jax.interop import load_torch_checkpoint
from netdeconv_jax.interop.torch_checkpoint import entry_names
from netdeconv_jax.models.summary import layer_table

# The rest is slow here: compiling their many shapes, or multiplying their many weights.
LARGE = (
    "densenet121",
    "dpn92",
    "vgg11_imagenet",
    "resnet50",
    "pnasnet_b",
    "efficientnet_b0_batch",  # its twin with deconvolution stays
)
SMALL_TRAINED = ("resnet18_batch", "vgg11_deconv", "pnasnet_a_batch")
TYPES = {
    "Conv2d": "conv",
    "FastDeconv": "deconv_conv",
    "Linear": "dense",
    "Delinear": "deconv_dense",
    "BatchNorm2d": "batch_norm",
    "MaxPool2d": "max_pool",
    "AvgPool2d": "avg_pool",
}
TRAINED = [case for case in CASES if not case.startswith("vgg11_imagenet")]  # dropout


def with_slow(cases, is_slow):
    return [pytest.param(c, marks=pytest.mark.slow) if is_slow(c) else c for c in cases]


def load(case):
    recorded = read(case)
    model, variables = load_torch_checkpoint(
        recorded["model"], state_dict(recorded), norm=recorded["norm"]
    )
    return recorded, model, variables, jnp.asarray(images(recorded))


def relative_error(ours, theirs):
    theirs = np.asarray(theirs)
    return np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max()


def test_every_recorded_network_is_here():
    assert len(CASES) == 40
    assert {read(c)["model"] for c in CASES} <= set(models.list())


@pytest.mark.parametrize("case", CASES)
def test_layer_table_and_parameter_count_are_the_originals(case):
    recorded = read(case)
    model = models.create(recorded["model"], recorded["norm"], layout="original")
    table = layer_table(model, tuple(np.take(recorded["input"], (0, 2, 3, 1))))
    assert sum(row.parameters for row in table) == recorded["num_params"]
    ours = [as_recorded(row) for row in table if row.path != ("bn1",) or called_bn1(recorded)]
    theirs = [without_name(layer) for layer in recorded["layers"] if not is_no_pool(layer)]
    if not any(is_pool(layer) for layer in theirs):
        ours = [layer for layer in ours if not is_pool(layer)]  # there they are functions
    for our, their in itertools.zip_longest(ours, theirs):
        assert our == their


def called_bn1(recorded):
    """PreActResNet declares a first batch norm and never calls it."""
    return recorded["model"] != "preact_resnet18"


def is_pool(layer):
    return layer["type"].endswith("pool")


def is_no_pool(layer):
    """VGG's average over one pixel changes nothing; we leave it out."""
    return layer["type"] == "AvgPool2d" and layer["out_shape"][2:] == [1, 1]


def without_name(layer):
    dropped = ("name", "momentum", "freeze_iter")
    layer = {key: value for key, value in layer.items() if key not in dropped}
    return layer | {"type": TYPES[layer["type"]]}


def as_recorded(row):
    layer = {"type": row.kind, "out_shape": [row.out_shape[0], row.out_shape[-1]]}
    layer["out_shape"] += row.out_shape[1:-1]
    if row.kind == "batch_norm":
        layer |= {"channels": row.in_shape[-1], "eps": 1e-5}
    if row.kind.endswith(("conv", "dense")):
        layer |= {"cin": row.in_shape[-1], "cout": row.out_shape[-1]}
    if row.kind.endswith("conv"):
        layer |= {"kernel": [row.kernel_size] * 2, "stride": [row.strides] * 2}
        layer |= {"padding": [row.padding] * 2, "dilation": [1, 1], "groups": row.groups}
        layer |= {"bias": row.use_bias}
    if row.spec is not None:
        layer |= {"block": row.block, "n_iter": row.spec.root.num_iters, "eps": row.spec.eps}
    if row.kind == "deconv_conv" and row.spec is not None:
        layer |= {"sampling_stride": row.spec.sampling.stride * row.strides}
        layer |= {"freeze": row.spec.freeze is not None}
    return layer


@pytest.mark.parametrize("case", with_slow(CASES, lambda c: c.startswith(LARGE)))
def test_evaluation_logits_are_the_originals(case, x64):
    recorded, model, variables, x = load(case)
    assert relative_error(model.apply(variables, x), recorded["logits_eval"]) < 1e-6


@pytest.mark.parametrize("case", with_slow(TRAINED, lambda c: c not in SMALL_TRAINED))
def test_training_logits_loss_and_gradients_are_the_originals(case, x64):
    recorded, model, variables, x = load(case)
    labels = jnp.arange(4)

    def loss(params):
        state = {**variables, "params": params}
        logits, _ = model.apply(state, x, train=True, mutable=["batch_stats"])
        return -jax.nn.log_softmax(logits)[labels, labels].mean(), logits

    (value, logits), gradients = jax.value_and_grad(loss, has_aux=True)(variables["params"])
    assert relative_error(logits, recorded["logits_train"]) < 1e-6
    assert abs(value - recorded["loss_train"]) < 1e-6 * recorded["loss_train"]

    names = entry_names(recorded["model"], traverse_util.flatten_dict(variables))
    ours = {
        names[path]: float(jnp.linalg.norm(leaf))
        for path, leaf in traverse_util.flatten_dict({"params": gradients}).items()
    }
    theirs = recorded["grad_norms"]
    largest = max(theirs.values())
    assert set(theirs) <= set(ours)
    assert all(ours[name] == 0 for name in set(ours) - set(theirs))
    for name, norm in theirs.items():
        assert abs(ours[name] - norm) <= 1e-6 * norm + 1e-9 * largest, name
