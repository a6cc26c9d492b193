"""Where a step runs: one jit over all devices, or a program for each device that exchanges what it must.

Both are used alike. State is the same on every device, feeds are split among them.

| `parallel` | `statistics` | how |
|---|---|---|
| jit | global | one program over a mesh; the compiler splits it, statistics are global by themselves |
| jit | device | `shard_map` over the mesh, gradients and running statistics averaged |
| pmap | global | `pmap`, the layers pool their statistics over its axis |
| pmap | device | `pmap`, gradients and running statistics averaged |
"""

import abc
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

AXIS = "data"


def compiler_options() -> dict[str, str | bool]:
    """Return what a step is compiled with: on a GPU its many small products by cuBLAS.

    By default XLA makes kernels of its own for every product, dozens of each to choose from. A whitened
    ResNet-18 has some 300 products, so that compilation takes minutes.
    """
    return {"xla_gpu_enable_triton_gemm": False} if jax.default_backend() == "gpu" else {}


class Parallel(abc.ABC):
    """How arrays lie on the devices and how functions of them run.

    Attributes:
      axis: name of the mapped axis inside of functions, None if they see the whole batch.
      layers_axis: name that layers pool their statistics over, or None.
      devices: how many share a batch, over all processes.
    """

    axis: str | None
    layers_axis: str | None
    devices: int

    @abc.abstractmethod
    def everywhere(self, tree: Any) -> Any:
        """Put host arrays on every device whole, in memory of their own."""

    @abc.abstractmethod
    def split(self, feed: Any) -> Any:
        """Put this process's part of a feed on its devices, split along axis 0."""

    @abc.abstractmethod
    def compile(
        self, function: Callable[..., Any], *arguments: Any, feed: Any = None, donate: int = 0
    ) -> Any:
        """Compile `function` for `arguments` that lie everywhere and a last one, `feed`, that is split.

        Its result lies everywhere. `donate=1` gives the memory of the first argument to the result.
        """

    @abc.abstractmethod
    def whole(self, tree: Any) -> Any:
        """Return arrays that lie on the devices anyhow so that they lie everywhere."""

    @abc.abstractmethod
    def host(self, tree: Any) -> Any:
        """Return a tree that lies everywhere as NumPy arrays."""


class Jit(Parallel):
    """One jit over a mesh of all devices of all processes."""

    def __init__(self, statistics: str, devices: Sequence[Any]):
        # Auto, as layers may contract over the sharded axis as they please.
        auto = (jax.sharding.AxisType.Auto,)
        self.devices = len(devices)
        self._mesh = jax.make_mesh((self.devices,), (AXIS,), axis_types=auto, devices=devices)
        self._everywhere = NamedSharding(self._mesh, PartitionSpec())
        self._split = NamedSharding(self._mesh, PartitionSpec(AXIS))
        self.axis = AXIS if statistics == "device" else None
        self.layers_axis = None

    def everywhere(self, tree: Any) -> Any:
        """See `Parallel`."""
        placed = jax.tree.map(self._place(self._everywhere), tree)
        return _copy(placed)  # on a CPU it may share its memory with NumPy's; a copy may be donated

    def split(self, feed: Any) -> Any:
        """See `Parallel`."""
        return jax.tree.map(self._place(self._split), feed)

    def _place(self, sharding: NamedSharding) -> Callable[[Any], jax.Array]:
        return lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x))

    def compile(
        self, function: Callable[..., Any], *arguments: Any, feed: Any = None, donate: int = 0
    ) -> Any:
        """See `Parallel`."""
        if self.axis is not None and feed is not None:
            whole, parts = PartitionSpec(), PartitionSpec(AXIS)
            # check_vma=False: gradients are those of each device, until the step averages them.
            function = jax.shard_map(
                function,
                mesh=self._mesh,
                in_specs=(*(whole for _ in arguments), parts),
                out_specs=whole,
                check_vma=False,
            )
        jitted = jax.jit(function, out_shardings=self._everywhere, donate_argnums=range(donate))
        given = arguments if feed is None else (*arguments, feed)
        return jitted.lower(*given).compile(compiler_options())

    def whole(self, tree: Any) -> Any:
        """See `Parallel`."""
        return jax.jit(lambda tree: tree, out_shardings=self._everywhere)(tree)

    def host(self, tree: Any) -> Any:
        """See `Parallel`."""
        # Copied: what is written in the background must outlive the step that takes over its memory.
        return jax.tree.map(lambda x: np.array(x.addressable_data(0)), tree)


class Pmap(Parallel):
    """One program for each device; arrays have a leading axis of this process's devices."""

    def __init__(self, statistics: str, devices: Sequence[Any]):
        self.axis = AXIS
        self.layers_axis = AXIS if statistics == "global" else None
        self.devices = len(devices)
        self._local = sum(device.process_index == jax.process_index() for device in devices)
        self._map = functools.partial(jax.pmap, devices=devices)
        # Copied, or arrays might lie where NumPy's do, and a step that takes over their memory write there.
        self._repeat = self._map(lambda _, tree: jax.tree.map(jnp.copy, tree), in_axes=(0, None))
        # A compiled step that is given NumPy's arrays crashes at times, with jax 0.12 on CPUs.
        self._put = self._map(lambda tree: jax.tree.map(jnp.copy, tree))

    def everywhere(self, tree: Any) -> Any:
        """See `Parallel`."""
        # Streamed data keep no arrays on the devices, and several processes' pmap cannot return none.
        return self._repeat(np.arange(self._local), tree) if jax.tree.leaves(tree) else tree

    def split(self, feed: Any) -> Any:
        """See `Parallel`."""
        parts = jax.tree.map(lambda x: x.reshape(self._local, -1, *x.shape[1:]), feed)
        return self._put(parts) if jax.process_count() == 1 else parts

    def compile(
        self, function: Callable[..., Any], *arguments: Any, feed: Any = None, donate: int = 0
    ) -> Any:
        """See `Parallel`."""
        given = arguments if feed is None else (*arguments, feed)
        mapped = self._map(function, axis_name=AXIS, donate_argnums=range(donate))
        alone = jax.process_count() == 1
        # What is compiled wants the arrays of all processes in one; only the pmap itself joins them, and it
        # finds the program there, if it was compiled without options.
        compiled = mapped.lower(*given).compile(compiler_options() if alone else None)
        return compiled if alone else mapped

    def whole(self, tree: Any) -> Any:
        """See `Parallel`."""
        # Never asked for: a config refuses `recalibrate`, which alone needs it, with `parallel` pmap.
        raise NotImplementedError("Arrays of a pmap lie everywhere or in parts.")

    def host(self, tree: Any) -> Any:
        """See `Parallel`."""
        return jax.tree.map(lambda x: np.array(np.asarray(x.addressable_data(0))[0]), tree)


@jax.jit
def _copy(tree: Any) -> Any:
    return jax.tree.map(jnp.copy, tree)


def create(parallel: str, statistics: str, devices: Sequence[Any] | None = None) -> Parallel:
    """Return how `config.parallel` and `config.statistics` want it, on all devices or on some."""
    kind = {"jit": Jit, "pmap": Pmap}[parallel]
    return kind(statistics, jax.devices() if devices is None else devices)
