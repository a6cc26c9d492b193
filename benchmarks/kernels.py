"""How many kernels a training step is on a GPU, its memory and what it takes to compile, without a GPU.

  pip install "jax[cuda13]" flax optax    # or cuda12
  python -m benchmarks.kernels --network=resnet18 --batch=128 --size=32 --dtype=bfloat16 \
      --contenders=batch,deconv:fast,none

XLA compiles for an H100 that is described to it; nothing is run or tried, so that the choice among
libraries' algorithms is a guess of the compiler's. What is counted are the operations of the program that
become kernels or calls of a library, by part of a step; of a conditional, such as that of a stem that is
frozen for a while, those of both branches, of a loop those of one pass. An H200 runs some more than are
counted here, since libraries may make several of one call: 429 for 384 with batch norm, 1,091 for 959
with `fast()` as it was then. One of the small ones takes 1 to 4 microseconds there, a product 4 to 23.

Needs jax with its CUDA plugin, flax and optax. Writes benchmarks/results/kernels_<name>.json.
"""

import argparse
import collections
import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # which would ask for a driver

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from benchmarks import contenders
from netdeconv_jax import models, ops
from train import metrics

ROOT = Path(__file__).parent.parent
# As NVIDIA's data sheets and CUDA's programming guide have it.
H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 minor: 0 }
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 device_memory_size: 84942979072
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 28 patch: 1 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
PARTS = {
    "statistics": ("_own_moments", "_own_sums", "_thinned"),
    "root": ("_inverse_sqrt", "_iterate"),
    "folding": ("_fold",),
    "convolution": ("conv_general_dilated",),
    "batch norm": ("/bn", "/norm", "BatchNorm"),
}
_NO_KERNEL = ("parameter", "get-tuple-element", "tuple", "bitcast", "constant")
_CALLED = re.compile(r"(?:computation|to_apply|body|condition)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_OPERATION = re.compile(r"\s+(?:ROOT )?%?[\w.\-]+ = (?:\(.*?\)|\S+) ([\w\-]+)\(")


def main(argv: list[str]) -> None:
    """Compile, count, and write the JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels")
    parser.add_argument("--network", default="resnet18")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--size", type=int, help="of the images; default: the network's")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--contenders", type=contenders.parse, default="batch,deconv:fast,none")
    parser.add_argument("--name", help="of the result; default: from network and sizes")
    parser.add_argument("--jax_relu", action="store_true", help="what `ops.relu` saves: without it")
    options = parser.parse_args(argv)
    if options.jax_relu:
        ops.relu = jax.nn.relu
    options.size = options.size or models.list()[options.network].size
    name = (
        options.name or f"{options.network}_batch{options.batch}_{options.size}px_{options.dtype}"
    )
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name="", target_config=H100, topology="1x1x1"
    )
    # What is compiled here runs there: the library asks where it is.
    jax.default_backend = lambda: "gpu"
    place = SingleDeviceSharding(topology.devices[0])
    result: dict[str, Any] = {
        "command": " ".join(["python -m benchmarks.kernels", *argv]),
        "environment": metrics.environment() | {"device": topology.devices[0].device_kind},
        "contenders": {},
    }
    for contender in options.contenders:
        found = result["contenders"][contender.text] = count(options, contender, place)
        parts = ", ".join(f"{part} {n}" for part, n in found["parts"].items())
        print(
            f"{contender.text}: {found['kernels']} kernels ({parts}), {found['products']} products, "
            f"peak memory {found['peak_bytes'] / 2**20:,.0f} MiB, "
            f"compiled in {found['compile_seconds']:.1f} s",
            flush=True,
        )
    path = ROOT / "benchmarks" / "results" / f"kernels_{name}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"Written to {path}.")


def count(
    options: argparse.Namespace, contender: contenders.Contender, place: Any
) -> dict[str, Any]:
    """Return what the program of a step is made of."""
    dtype = jnp.dtype(options.dtype)
    model = models.create(
        options.network, contender.norm, num_classes=10, spec=contender.spec, dtype=dtype
    )
    init, step = contenders.functions(model, contender)

    def there(tree: Any) -> Any:
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree)

    shape = (options.batch, options.size, options.size, 3)
    images, labels = (
        jax.ShapeDtypeStruct(s, t) for s, t in ((shape, dtype), (shape[:1], jnp.int32))
    )
    first = jax.ShapeDtypeStruct((1, *shape[1:]), dtype)
    arguments = there((jax.eval_shape(init, jax.random.key(0), first), images, labels))
    start = time.perf_counter()
    lowered = jax.jit(step, donate_argnums=0).trace(*arguments).lower()
    traced = time.perf_counter()
    compiled = lowered.compile(contenders.compiler_options())
    done = time.perf_counter()
    kinds, parts, products = collections.Counter(), collections.Counter(), 0
    for line, kind in operations(compiled.as_text() or ""):
        kinds[kind] += 1
        products += "cublas" in kind
        parts[part_of(line)] += 1
    return {
        "kernels": kinds.total(),
        "products": products,
        "parts": dict(parts.most_common()),
        "kinds": dict(kinds.most_common()),
        **contenders.memory(compiled),
        "trace_seconds": traced - start,
        "compile_seconds": done - traced,
    }


def operations(program: str) -> list[tuple[str, str]]:
    """Return the lines of a program that become kernels, and their kinds; of a conditional all branches."""
    computations, entry = {}, ""
    for block in re.split(r"\n(?=\S)", program):
        match = re.match(r"(ENTRY )?%?([\w.\-]+)", block)
        if match:
            name = match[2]
            computations[name] = block.splitlines()[1:]
            entry = name if match[1] else entry
    if entry not in computations:
        raise ValueError("The compiler gives no text of its program.")
    found, waiting = [], [entry]
    while waiting:
        for line in computations.get(waiting.pop(), ()):
            match = _OPERATION.match(line)
            if match is None or match[1] in _NO_KERNEL:
                continue
            kind = match[1]
            if kind in ("conditional", "call", "while"):
                waiting += _CALLED.findall(line)
                for names in _BRANCHES.findall(line):
                    waiting += names.replace("%", "").split(", ")
                continue
            if kind == "custom-call":
                kind = re.findall(r'custom_call_target="([^"]+)"', line)[0].strip("_$")
            elif kind == "fusion":
                kind = "fusion " + re.findall(r"kind=k(\w+)", line)[0]
            found.append((line, kind))
    return found


def part_of(line: str) -> str:
    """Return the part of a step that an operation stems from."""
    scope = re.search(r'op_name="([^"]+)"', line)
    where = "backward" if scope and "transpose(" in scope[1] else "forward"
    for part, names in PARTS.items():
        if scope and any(name in scope[1] for name in names):
            return f"{part}, {where}"
    return "rest"


if __name__ == "__main__":
    main(sys.argv[1:])
