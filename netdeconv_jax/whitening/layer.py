"""What a layer of either API asks before its forward: which spec, which statistics, does the input fit."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from netdeconv_jax.ops.arguments import check_float_dtype
from netdeconv_jax.whitening.spec import WhiteningSpec

Shape = tuple[int, ...]


def layer_spec(
    spec: WhiteningSpec | None,
    defaults: WhiteningSpec,
    *,
    eps: float | None = None,
    epsilon: float | None = None,
    **settings: Any,
) -> WhiteningSpec:
    """Return `spec`, or `defaults`, with the keywords that are not None laid over it.

    Raises:
      TypeError: `spec` is no `WhiteningSpec`, or a setting is of the wrong type.
      ValueError: both `eps` and `epsilon` are given, or a setting is out of range.
    """
    if spec is not None:
        check_spec(spec)
    if eps is not None and epsilon is not None:
        raise ValueError(f"`epsilon` is another name for `eps`; give one, got {epsilon} and {eps}.")
    settings["eps"] = epsilon if eps is None else eps
    given = {name: value for name, value in settings.items() if value is not None}
    return (defaults if spec is None else spec).replace(**given)


def check_spec(spec: WhiteningSpec) -> None:
    """Raise unless `spec` is a `WhiteningSpec`."""
    if not isinstance(spec, WhiteningSpec):
        raise TypeError(f"`spec` must be a WhiteningSpec, got {spec!r}.")


def check_dtypes(dtype: Any, param_dtype: Any) -> None:
    """Raise unless the dtypes of computation and of parameters are floating point, or None."""
    for name, value in (("dtype", dtype), ("param_dtype", param_dtype)):
        if value is not None:
            check_float_dtype(name, value)


def check_flag(name: str, value: bool | None) -> None:
    """Raise unless `value` is None, a bool, or a number or scalar array that may stand for one."""
    one = isinstance(value, int | np.generic) or getattr(value, "shape", None) == ()
    if value is not None and not one:
        raise TypeError(f"`{name}` must be True, False or None, got {value!r}.")


def check_settings(
    *,
    dtype: Any,
    param_dtype: Any,
    use_running_average: bool | None,
    update_whitener: bool | None,
) -> None:
    """Raise unless the settings that no spec holds are such as a layer can have.

    Raises:
      TypeError: a dtype is not floating point, or a flag neither a bool nor None.
    """
    check_dtypes(dtype, param_dtype)
    check_flag("use_running_average", use_running_average)
    check_flag("update_whitener", update_whitener)


def running_average_wanted(
    constructor: bool | None, argument: bool | None, *, overrides: bool
) -> bool:
    """Return the `use_running_average` of a call.

    Args:
      constructor, argument: what each was given.
      overrides: whether the call's argument goes before the constructor's; if not, both are one too many.
    Raises:
      ValueError: neither is given, or both where that is one too many.
      TypeError: one is neither a bool nor None.
    """
    check_flag("use_running_average", constructor)
    check_flag("use_running_average", argument)
    neither = constructor is None and argument is None
    if neither or not (overrides or constructor is None or argument is None):
        raise ValueError(
            "`use_running_average` must be given to the constructor or in the call, not to "
            f"{'neither' if neither else 'both'}; got {constructor} there and {argument} here."
        )
    return bool(constructor if argument is None else argument)


def whitener_update_wanted(
    constructor: bool | None, argument: bool | None, *, overrides: bool
) -> bool:
    """Return the `update_whitener` of a call: True where neither says otherwise.

    Args:
      constructor, argument, overrides: as `running_average_wanted`.
    Raises:
      ValueError: both are given where that is one too many.
      TypeError: one is neither a bool nor None.
    """
    check_flag("update_whitener", constructor)
    check_flag("update_whitener", argument)
    if not (overrides or constructor is None or argument is None):
        raise ValueError(
            "`update_whitener` must be given to the constructor or in the call, not to both; got "
            f"{constructor} there and {argument} here."
        )
    given = constructor if argument is None else argument
    return given is None or bool(given)


def statistics_dtype(param_dtype: Any) -> Any:
    """Return the dtype in which statistics are computed and stored."""
    return jnp.promote_types(jnp.float32, param_dtype)


def check_input(x: jax.Array, *, min_ndim: int) -> None:
    """Raise unless `x` is floating point, has channels and at least `min_ndim` axes."""
    if x.ndim < min_ndim:
        raise ValueError(
            f"`x` must have at least {min_ndim} axes, channels last, got shape {x.shape}."
        )
    if x.shape[-1] == 0:
        raise ValueError(f"`x` has no channels: shape {x.shape}.")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"`x` must be floating point, got {x.dtype}; convert and scale it first.")


def check_samples(x: jax.Array) -> None:
    """Raise unless there is a number of samples from which to take statistics."""
    if any(map(jax.export.is_symbolic_dim, x.shape)):
        raise ValueError(
            f"`x` has the symbolic shape {x.shape}, from which no statistics of a batch can be taken: export "
            "the model in evaluation, `train=False` or `eval()`, or folded."
        )
    if not x.size:
        raise ValueError(f"`x` has no samples to take statistics from: shape {x.shape}.")


def check_kernel(kernel: Shape, channels: int, *, axis: int = -2) -> None:
    """Raise unless a kernel of that shape was made for `channels` channels in a feature group."""
    if kernel[axis] != channels:
        raise ValueError(
            f"`x` has {channels} input channels (in a feature group), but this layer's kernel was "
            f"initialized for {kernel[axis]}: its shape is {kernel}."
        )


def check_mean(have: Shape, need: Shape) -> None:
    """Raise unless a running mean has the shape that the layer's settings need."""
    if have != need:
        raise ValueError(
            f"`batch_stats` hold a mean of shape {have}, this layer needs {need}: they come from "
            "another `block_size`, `whiten`, `grouping` or `shared_whitener`."
        )


def check_channel_mean(have: Shape, block: int, channels: int) -> None:
    """Raise unless the running mean of a `ChannelDeconv` is of `block` channels."""
    if have != (block,):
        raise ValueError(
            f"`x` has {channels} channels, whitened {block} at a time, but this layer was "
            f"initialized for {have[0]} at a time."
        )
