"""Whether what is traced here runs on one device, so that no axis of it is shared out."""

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec


def whole(x: jax.Array) -> jax.Array:
    """Return `x` whole on each device of an explicit mesh, so that it may be reshaped; else `x` itself."""
    sharding = jax.typeof(x).sharding
    if not on_explicit_mesh(x) or not any(sharding.spec):
        return x
    return jax.sharding.reshard(x, NamedSharding(sharding.mesh, PartitionSpec(*[None] * x.ndim)))


def on_one_device(*arrays: jax.Array) -> bool:
    """Return whether the process has one device and nothing says that the program is for others.

    A program that is traced by such a process may be compiled for several all the same: what is done
    otherwise on one device must be right there too.
    """
    if jax.device_count() != 1 or jax.sharding.get_abstract_mesh().size > 1:
        return False
    return not any(map(on_explicit_mesh, arrays))


def on_explicit_mesh(x: jax.Array) -> bool:
    """Return whether the type of `x` says how it is sharded: axes that are must then not be merged."""
    return AxisType.Explicit in jax.typeof(x).sharding.mesh.axis_types
