"""Which batch norm of an NNX model stands behind which layer, read from the program that the model traces to.

Every layer leaves its name on its output, every norm on its input; the program says who reads what.
"""

import collections
import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import jaxprs_in_params

from netdeconv_jax.whitening.folding import merged

Path = tuple[Any, ...]
LAYER, NORM = "layer", "norm"
_LAST = " on the last axis"  # of the name of a norm whose features are there


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a layer or a norm stands in the program.

    Attributes:
      source: of a norm, the layer whose output it reads, None if there is none.
      alone: whether nothing else reads that output, both are called once, and features are on the last axis.
    """

    source: Path | None = None
    alone: bool = False


def places(
    model: nnx.Module,
    role: Callable[[Path, Any], str | None],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> dict[Path, Place]:
    """Return the layers and norms that a call of `model` runs, in that order, by path.

    Args:
      model: an NNX module; it is copied.
      role: of a module at a path: `LAYER`, `NORM`, or None.
      args, kwargs: of the call: arrays, or their shapes and dtypes, modules, and flags.
    """
    paths: dict[str, Path] = {}

    def named(path: Path, node: Any) -> Any:
        if (kind := role(path, node)) is None:
            return node
        name = f"{kind} {len(paths)}"
        paths[name] = paths[name + _LAST] = path
        # Of its class, and not around it: what holds it may look at its variables.
        node.__class__ = _naming(type(node), kind)
        node.name_in_program = name
        return node

    jaxpr = _traced(nnx.recursive_map(named, nnx.clone(model), graph=True), args, kwargs)
    calls, readers = collections.Counter(), collections.Counter()
    made: dict[int, str] = {}  # outputs of layers
    reads: dict[str, tuple[str, int]] = {}

    def walk(jaxpr: Any) -> None:
        readers.update(id(var) for var in jaxpr.outvars)
        for eqn in jaxpr.eqns:
            readers.update(id(var) for var in eqn.invars)
            name = eqn.params.get("name") if eqn.primitive.name == "name" else None
            if name in paths:
                calls[name] += 1
                if name.startswith(LAYER):
                    made[id(eqn.outvars[0])] = name
                elif (source := id(eqn.invars[0])) in made:
                    reads[name] = made[source], source
            for inner in jaxprs_in_params(eqn.params):
                walk(inner)

    walk(jaxpr)
    found = {}
    for name in calls:
        layer, output = reads.get(name, (None, 0))
        once = readers[output] == calls[name] == calls[layer] == 1
        source = None if layer is None else paths[layer]
        found[paths[name]] = Place(source, once and name.endswith(_LAST))
    return found


@functools.cache  # a class is never forgotten by JAX
def _naming(base: type[Any], kind: str) -> type[Any]:
    """The class of modules of a class `base` that leave their names in the program."""

    class Named(base):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            call, name = super().__call__, self.name_in_program
            if kind == LAYER:
                return jax.tree.map(
                    lambda leaf: (
                        checkpoint_name(leaf, name) if isinstance(leaf, jax.Array) else leaf
                    ),
                    call(*args, **kwargs),
                )
            first = next(iter(inspect.signature(call).parameters), "x")
            x = args[0] if args else kwargs.pop(first)
            if getattr(self, "axis", -1) in (-1, x.ndim - 1):
                name += _LAST
            return call(checkpoint_name(x, name), *args[1:], **kwargs)

    return Named


def _traced(model: nnx.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The program of a call, in which flags stay what they are."""
    given, structure = jax.tree.flatten((tuple(args), dict(kwargs)), is_leaf=_is_node)
    nodes = {i: leaf for i, leaf in enumerate(given) if _is_node(leaf)}
    arrays = {i: leaf for i, leaf in enumerate(given) if hasattr(leaf, "shape") and i not in nodes}
    graph, state = nnx.split((model, nodes))

    def run(state: Any, arrays: dict[int, Any]) -> Any:
        model, nodes = nnx.merge(graph, state)
        leaves = [arrays.get(i, nodes.get(i, leaf)) for i, leaf in enumerate(given)]
        args, kwargs = jax.tree.unflatten(structure, leaves)
        return model(*args, **kwargs)

    return jax.make_jaxpr(run)(state, arrays).jaxpr


def _is_node(given: Any) -> bool:
    """Whether an argument is a module, or random numbers, that a trace must take apart."""
    return isinstance(given, nnx.Module | nnx.Rngs)


def fold_norm(norm: Any, layer: Any, *, dtype: Any = None, axis: int = -1) -> None:
    """Fold a batch norm into the layer before it, which gets a kernel and a bias of its own.

    Args:
      norm: as `nnx.BatchNorm`; it stays what it is.
      layer: a plain layer, or one that is to whiten but does not yet.
      dtype: to which the kernel is rounded, default its own.
      axis: of the kernel's features.
    """
    scale, offset = (getattr(norm, name, None) for name in ("scale", "bias"))
    gain = lax.rsqrt(norm.var[...] + norm.epsilon) * (1 if scale is None else scale[...])
    kernel, bias = merged(
        layer.kernel[...],
        None if layer.bias is None else layer.bias[...],
        norm.mean[...],
        gain,
        0 if offset is None else offset[...],
        dtype,
        axis,
    )
    # Not in place: other layers may share them.
    layer.kernel = layer.kernel.copy(kernel)
    layer.bias = nnx.Param(bias) if layer.bias is None else layer.bias.copy(bias)
    layer.use_bias = True
