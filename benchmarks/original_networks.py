"""How far every network is from the original's figures: benchmarks/results/original_networks.json.

    PYTHONPATH=. python -m benchmarks.original_networks [case ...]

Runs the cases of tests/data/reference_models without a result, or those named, in float64, op by op.
"""

import importlib.util
import json
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from netdeconv_jax.interop import load_torch_checkpoint
from netdeconv_jax.interop.torch_checkpoint import entry_names

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "original_networks.json"


def reference_models() -> Any:
    spec = importlib.util.spec_from_file_location(
        "reference_models", ROOT / "tests" / "reference_models.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def relative(ours: Any, theirs: Any) -> float:
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def measure(case: str, reference: Any) -> dict[str, Any]:
    """Return the relative errors of one case; gradient errors in units of the tolerance."""
    start = time.process_time()
    recorded = reference.read(case)
    model, variables = load_torch_checkpoint(
        recorded["model"], reference.state_dict(recorded), norm=recorded["norm"]
    )
    x = jnp.asarray(reference.images(recorded))
    result: dict[str, Any] = {
        "logits_eval": relative(model.apply(variables, x), recorded["logits_eval"])
    }
    if not recorded["model"].startswith("vgg11_imagenet"):  # dropout
        result |= training_errors(recorded, model, variables, x)
    result["cpu_seconds"] = round(time.process_time() - start, 1)
    return result


def training_errors(recorded: Any, model: Any, variables: Any, x: Any) -> dict[str, float]:
    labels = jnp.arange(4)

    def loss(params):
        state = {**variables, "params": params}
        logits, _ = model.apply(state, x, train=True, mutable=["batch_stats"])
        return -jax.nn.log_softmax(logits)[labels, labels].mean(), logits

    (value, logits), gradients = jax.value_and_grad(loss, has_aux=True)(variables["params"])
    names = entry_names(recorded["model"], traverse_util.flatten_dict(variables))
    ours = {
        names[path]: float(jnp.linalg.norm(leaf))
        for path, leaf in traverse_util.flatten_dict({"params": gradients}).items()
    }
    theirs = recorded["grad_norms"]
    largest = max(theirs.values())
    return {
        "logits_train": relative(logits, recorded["logits_train"]),
        "loss_train": relative(value, recorded["loss_train"]),
        "gradient_norms_in_tolerances": max(
            abs(ours[n] - g) / (1e-6 * g + 1e-9 * largest) for n, g in theirs.items()
        ),
    }


def main(cases: list[str]) -> None:
    reference = reference_models()
    results: dict[str, Any] = {"cases": {}}
    if RESULTS.exists():
        results = json.loads(RESULTS.read_text())
    results["versions"] = {"jax": jax.__version__, "device": jax.devices()[0].device_kind}
    results["tolerances"] = "1e-6 relative; gradient norms 1e-6 * stored + 1e-9 * largest"
    for case in cases or [c for c in reference.CASES if c not in results["cases"]]:
        with jax.enable_x64():
            results["cases"][case] = measure(case, reference)
        jax.clear_caches()
        results["cases"] = dict(sorted(results["cases"].items()))
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
        sys.stdout.write(f"{case} {results['cases'][case]}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
