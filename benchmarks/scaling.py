"""What devices exchange in a training step: collectives and their bytes, from the compiled programs.

  python -m benchmarks.scaling [--networks=resnet18,resnet50] [--devices=2,4,8] [--width=0.25] \
      [--contenders=batch,deconv,deconv:one_pass=True,deconv:reused]

Compiles a training step for fake CPU devices and reads the compiled program; nothing runs. `jit` is one
program over a mesh with Auto axes, which the compiler splits; `shard_map` is a program for each device, in
which the layers pool their statistics (`axis_name`) and the gradients are averaged, as under `pmap`.

What a device's compiler does with collectives, combining small ones above all, differs between platforms: a
count from a CPU's compiler is an upper bound for those that combine them. The bytes are those of the arrays.
Writes benchmarks/results/scaling.json.
"""

import argparse
import json
import math
import re
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks import contenders
from netdeconv_jax import models
from train import metrics

RESULT = Path(__file__).parent / "results" / "scaling.json"
KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
WIDTHS = {"f64": 8, "f32": 4, "s32": 4, "u32": 4, "bf16": 2, "f16": 2, "pred": 1}
AXIS = "data"
PER_DEVICE = 8  # images; the exchanged bytes do not depend on it


def main(argv: list[str]) -> None:
    """Compile, count, and write `RESULT`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling")
    parser.add_argument("--networks", default="resnet18,resnet50")
    parser.add_argument("--contenders", type=contenders.parse, default="batch,deconv")
    parser.add_argument("--forms", default="jit,shard_map")
    parser.add_argument("--devices", default="2,4,8")
    parser.add_argument("--width", type=float, default=1.0)
    options = parser.parse_args(argv)
    counts = [int(n) for n in options.devices.split(",")]
    jax.config.update("jax_num_cpu_devices", max(counts))
    found = json.loads(RESULT.read_text()) if RESULT.exists() else {"programs": {}}
    found["environment"] = metrics.environment()
    for name in options.networks.split(","):
        for entry in options.contenders:
            for form in options.forms.split(","):
                for devices in counts:
                    key = f"{name} width {options.width:g}, {entry.text}, {form}, {devices} devices"
                    found["programs"][key] = program(name, entry, form, devices, options.width)
                    say(f"{key}: {found['programs'][key]}")
                    RESULT.write_text(json.dumps(found, indent=1) + "\n")


def program(
    name: str, contender: contenders.Contender, form: str, devices: int, width: float
) -> dict[str, Any]:
    """Return the collectives of a compiled training step by kind, and how long it took to compile."""
    mesh = jax.make_mesh(
        (devices,), (AXIS,), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices]
    )
    axis = AXIS if form == "shard_map" else None
    model = models.create(name, contender.norm, spec=contender.spec, width=width, axis_name=axis)
    optimizer = optax.sgd(0.1, momentum=0.9)

    def step(state: Any, images: jax.Array, labels: jax.Array) -> Any:
        params, stats, opt_state = state

        def loss_of(params: Any) -> Any:
            variables = {"params": params, "batch_stats": stats}
            update = not contender.reused
            logits, updates = model.apply(
                variables, images, train=True, update_whitener=update, mutable=["batch_stats"]
            )
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return losses.mean(), updates["batch_stats"]

        (loss, stats), grads = jax.value_and_grad(loss_of, has_aux=True)(params)
        if axis is not None:
            grads, loss = jax.lax.pmean((grads, loss), axis)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), stats, opt_state), loss

    def init(key: jax.Array) -> Any:
        image = jnp.zeros((1, 32, 32, 3))
        variables = model.init(key, image, train=False)
        return variables["params"], variables["batch_stats"], optimizer.init(variables["params"])

    whole, parts = NamedSharding(mesh, P()), NamedSharding(mesh, P(AXIS))
    function: Any = step
    if axis is not None:
        # check_vma=False: gradients are each device's own until they are averaged, as under pmap.
        function = jax.shard_map(
            step, mesh=mesh, in_specs=(P(), P(AXIS), P(AXIS)), out_specs=P(), check_vma=False
        )
    state = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole),
        jax.eval_shape(init, jax.random.key(0)),
    )
    batch = devices * PER_DEVICE
    images = jax.ShapeDtypeStruct((batch, 32, 32, 3), jnp.float32, sharding=parts)
    labels = jax.ShapeDtypeStruct((batch,), jnp.int32, sharding=parts)
    start = time.perf_counter()
    lowered = jax.jit(function, donate_argnums=0, out_shardings=whole).lower(state, images, labels)
    text = lowered.compile().as_text() or ""
    return {
        "collectives": collectives(text),
        "gradient_bytes": 4 * sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state[0])),
        "seconds_to_compile": round(time.perf_counter() - start, 1),
    }


def collectives(text: str) -> dict[str, dict[str, int]]:
    """Return, by kind, how many collectives a compiled program has and the bytes of their results.

    An asynchronous one counts once, at its start.
    """
    count, size = Counter(), Counter()
    for types, kind in re.findall(rf"= (.*?) ({KINDS})(?:-start)?\(", text):
        count[kind] += 1
        for dtype, shape in re.findall(r"(\w+)\[([\d,]*)\]", types):
            size[kind] += WIDTHS[dtype] * math.prod(int(n) for n in shape.split(",") if n)
    return {kind: {"count": count[kind], "bytes": size[kind]} for kind in count}


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
