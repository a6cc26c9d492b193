"""The original's whole networks, as recorded in tests/data/reference_models; how their weights are made.

Each file holds one network with 10 classes in float64: its layers in call order, the names and shapes of its
`state_dict`, logits in evaluation and training, loss and gradient norms. Weights and input come from a seed.
"""

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np

FILES = sorted((Path(__file__).parent / "data" / "reference_models").glob("*.json.gz"))
CASES = [f.name.removesuffix(".json.gz") for f in FILES]


def read(case: str) -> dict[str, Any]:
    """Return what was recorded of one network and norm, e.g. "resnet18_deconv"."""
    return json.loads(gzip.decompress(FILES[CASES.index(case)].read_bytes()))


def state_dict(recorded: dict[str, Any]) -> dict[str, np.ndarray]:
    """Return the weights and running statistics that the recorded figures belong to."""
    return {
        name: _entry(name, tuple(shape), np.random.default_rng([recorded["seed"], i]))
        for i, (name, shape) in enumerate(recorded["state_dict"])
    }


def images(recorded: dict[str, Any]) -> np.ndarray:
    """Return the recorded network's input, NHWC."""
    rng = np.random.default_rng([recorded["seed"], 10**6])
    shape = recorded["input"]
    return rng.standard_normal(np.prod(shape)).reshape(shape).transpose(0, 2, 3, 1)


def _entry(name, shape, rng):
    count = int(np.prod(shape))
    wave = rng.standard_normal(count).reshape(shape)
    if name.endswith("num_batches_tracked"):
        return np.array(1)
    if name.endswith("running_deconv"):
        return np.eye(shape[-1]) + 0.01 * wave
    if name.endswith("running_var"):
        return 1 + 0.2 * np.abs(wave)
    if name.endswith("running_mean"):
        return 0.1 * wave
    if len(shape) > 1:
        return wave * np.sqrt(2 / (count / shape[0]))
    return 1 + 0.1 * wave if name.endswith("weight") else 0.1 * wave
