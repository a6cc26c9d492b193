"""How to whiten, as data: a frozen, hashable `WhiteningSpec` made of strategies."""

import dataclasses
from typing import Any

import jax.numpy as jnp

from netdeconv_jax.ops import grouping as grouping_ops
from netdeconv_jax.ops import roots
from netdeconv_jax.ops.inverse_sqrt import METHODS
from netdeconv_jax.ops.moments import check_sample_dtype
from netdeconv_jax.whitening.local_norm import LOCAL_NORMS
from netdeconv_jax.whitening.strategies import (
    Budget,
    Chebyshev,
    ChebyshevRidge,
    Contiguous,
    Eigh,
    Freeze,
    Interleaved,
    NewtonSchulz,
    Root,
    Stride,
    check_number,
)

WHITEN = ("patches", "channels")
_TF32_DIGITS = 10  # binary, behind the point
_OF_PRODUCTS = (
    NewtonSchulz,
    Chebyshev,
    ChebyshevRidge,
)  # the roots whose products have a precision


@dataclasses.dataclass(frozen=True, init=False)
class WhiteningSpec:
    """Everything that says how a layer whitens its input, apart from its shapes.

    Attributes:
      root: `NewtonSchulz(num_iters)`, `Chebyshev(tol, num_iters)`, `ChebyshevRidge(ridge, tol)` or
        `Eigh(ridge)`.
      sampling: `Stride(stride, centred)` or `Budget(rows_per_dim, finer_below, centred)`: which patches the
        statistics see.
      grouping: `Interleaved(block_size, shared)` or `Contiguous(block_size, shared)`. With `shared=False`
        every group has a mean and a whitener of its own.
      eps: float > 0, added to the diagonal of the covariance.
      momentum: float in [0, 1), Flax's: `new = momentum * old + (1 - momentum) * batch`.
      whiten: `"patches"`, pixels and channels, or `"channels"`, one whitener for all kernel taps.
      freeze: `Freeze(active_steps, period)` or None.
      local_norm: None, or `"layer"`: before statistics are taken, each sample is centred and divided by its
        own deviation, over its pixels and channels (in a dense layer over the last axis), see
        `ops.local_norm`.
      one_pass: take mean and covariance in one product and one reduction over devices, about the running
        mean; see `shift` of `ops.patch_moments`. That mean starts at 0, so that the first steps are inexact
        where the input's is tens of deviations: not for such input. `ChannelDeconv` ignores it.
      sample_dtype: None, or `"bfloat16"`: centred samples are rounded to it before they are multiplied, with
        sums in float32 at least; see `ops.moments`, and with `one_pass` `ops.patch_moments`.

    The keywords `method`, `num_iters`, `precision` (of the root's products, and see `fold_precision`),
    `sampling_stride`, `sampling_centred`, `block_size`, `shared_whitener`, `freeze_schedule` and the names
    `"interleaved"` and `"contiguous"` are shorthand for the strategies, here and in `replace`. More than
    five steps bear no lower precision: where `num_iters` is raised above that, the root's is `"highest"`
    again unless `precision` is given beside it. A new `sampling_stride` begins where the old grid did.

    Raises:
      ValueError: a value out of range, or an unknown `method`, `precision`, `grouping`, `whiten`,
        `local_norm` or `sample_dtype`.
      TypeError: a value of the wrong type, or an unknown keyword.

    Source: Ye et al. 2020; the values of the original code.

    Example:
      >>> from netdeconv_jax import WhiteningSpec
      >>> WhiteningSpec(block_size=16).grouping
      Interleaved(block_size=16, shared=True)
      >>> WhiteningSpec().replace(num_iters=15).root
      NewtonSchulz(num_iters=15, precision='highest')
    """

    root: Root
    sampling: Stride | Budget
    grouping: Interleaved | Contiguous
    eps: float
    momentum: float
    whiten: str
    freeze: Freeze | None
    local_norm: str | None
    one_pass: bool
    sample_dtype: str | None

    def __init__(
        self,
        *,
        root: Root | None = None,
        sampling: Stride | Budget | None = None,
        grouping: Interleaved | Contiguous | str | None = None,
        eps: float = 1e-5,
        momentum: float = 0.9,
        whiten: str = "patches",
        freeze: Freeze | tuple[int, int] | None = None,
        local_norm: str | None = None,
        one_pass: bool = False,
        sample_dtype: str | None = None,
        block_size: int | None = None,
        shared_whitener: bool | None = None,
        sampling_stride: int | None = None,
        sampling_centred: bool | None = None,
        method: str | None = None,
        num_iters: int | None = None,
        precision: str | None = None,
        freeze_schedule: Freeze | tuple[int, int] | None = None,
    ):
        given = {name: value for name, value in locals().items() if value is not None}
        del given["self"]
        defaults = {
            "root": NewtonSchulz(),
            "sampling": Stride(),
            "grouping": Interleaved(),
            "eps": eps,
            "momentum": momentum,
            "whiten": whiten,
            "freeze": None,
            "local_norm": None,
            "one_pass": one_pass,
            "sample_dtype": sample_dtype,
        }
        for name, value in _resolve(defaults, given).items():
            object.__setattr__(self, name, value)

    @classmethod
    def fast(cls) -> "WhiteningSpec":
        """Return a cheaper spec: blocks of 16 channels, three iterations, no more samples than needed.

        The root is that of three iterations to 6e-3, in 2 products in the place of the default's 12. Stems of
        `models` that ask for ten iterations or more run them, as by default.
        ResNet-18 on CIFAR-10: of width 16, after 2 epochs, 75.7% with it, 76.8 with `block_size=64` beside,
        and 67.1% with the default, means of three seeds. Of full width, in bfloat16, after 20 epochs, 93.4%
        and 94.2%, batch norm 92.4%, one seed each, and before its samples were centred, which made 74.4 75.7.
        """
        return cls(
            root=Chebyshev(num_iters=3, tol=6e-3), sampling=Budget(), grouping=Interleaved(16)
        )

    @classmethod
    def mixed(cls) -> "WhiteningSpec":
        """Return the default's whitening, in products that accelerators are fast at: for bfloat16 networks.

        Samples are multiplied as bfloat16; the root takes half the products, in TF32 on GPUs, as three
        products of bfloat16 on TPUs, and so does, in training, folding where the kernel is rounded to
        bfloat16. Sums are float32. On images the whitener is the default's to 2e-3 of its norm, its
        gradient to 1e-2: what rounding to bfloat16 does by itself. Layers with more than five iterations,
        the stems of most networks, keep those in float32. On an H200 a step of ResNet-18 at CIFAR's size
        takes 0.42 of the default's time, 20 epochs reach 94.2%, with folding still in float32. On CPUs half
        of the root's products are saved and statistics take longer.
        """
        return cls(root=Chebyshev(precision="high"), sample_dtype="bfloat16")

    def fold_precision(self, dtype: Any, *, training: bool) -> str:
        """Return the precision in which a layer folds its whitener into a kernel that is rounded to `dtype`.

        `"high"` in training, where the root is below `"highest"` and `dtype` has fewer digits than TF32.
        With five iterations that loses a third of what rounding to bfloat16 does, or less; with nearly
        equal columns and a nearly constant kernel 1.7 times what rounding does. Otherwise `"highest"`, as
        in `interop.fold`.

        Args:
          dtype: of the folded kernel, floating point.
          training: whether the layer trains.
        Raises:
          ValueError: `dtype` is not floating point.

        Source: ours.

        Example:
          >>> from netdeconv_jax import WhiteningSpec
          >>> mixed, default = WhiteningSpec.mixed(), WhiteningSpec()
          >>> [spec.fold_precision("bfloat16", training=True) for spec in (mixed, default)]
          ['high', 'highest']
        """
        if not jnp.issubdtype(dtype, jnp.inexact):
            raise ValueError(f"`dtype` must be floating point, got {jnp.dtype(dtype)}.")
        rounded = jnp.finfo(dtype).nmant < _TF32_DIGITS
        low = getattr(self.root, "precision", "highest") in ("high", "default")
        return "high" if training and low and rounded else "highest"

    def replace(self, **settings: Any) -> "WhiteningSpec":
        """Return a copy with some settings changed, strategies or their shorthand."""
        current = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return WhiteningSpec(**_resolve(current, settings))


def _resolve(current: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Lay settings, flat ones included, over a complete set of strategies, and check the result."""
    flat = dict(settings)
    for strategy, shorthands in _SHORTHANDS.items():
        for name in shorthands:
            if name in flat and strategy in flat and not isinstance(flat[strategy], str):
                raise ValueError(
                    f"`{name}` is shorthand for a part of `{strategy}`; give one, got {flat[name]!r} and "
                    f"{flat[strategy]!r}."
                )
    result = current | {name: flat.pop(name) for name in tuple(flat) if name in current}
    if isinstance(result["grouping"], str):
        result["grouping"] = _named_grouping(result["grouping"], current["grouping"])
    if changes := _taken(flat, block_size="block_size", shared_whitener="shared"):
        result["grouping"] = dataclasses.replace(result["grouping"], **changes)
    if changes := _taken(flat, sampling_stride="stride", sampling_centred="centred"):
        sampling = result["sampling"]
        if "stride" in changes and not isinstance(sampling, Stride):
            sampling = Stride(centred=sampling.centred)
        result["sampling"] = dataclasses.replace(sampling, **changes)
    named = "method" in flat
    if named:
        result["root"] = _named_root(flat.pop("method"), result["root"])
    if "num_iters" in flat:
        result["root"] = _with_num_iters(result["root"], flat.pop("num_iters"), named)
    if "freeze_schedule" in flat:
        result["freeze"] = flat.pop("freeze_schedule")
    if isinstance(result["freeze"], tuple) and len(result["freeze"]) == 2:
        result["freeze"] = Freeze(*result["freeze"])
    if "precision" in flat:
        result["root"] = _with_precision(result["root"], flat.pop("precision"))
    if flat:
        raise TypeError(f"WhiteningSpec has no setting {sorted(flat)[0]!r}.")
    _check(result)
    return result


def _taken(flat: dict[str, Any], **names: str) -> dict[str, Any]:
    """Take those settings out of `flat`, by the names that a strategy has for them."""
    return {names[name]: flat.pop(name) for name in tuple(flat) if name in names}


_SHORTHANDS = {
    "root": ("method", "num_iters", "precision"),
    "sampling": ("sampling_stride", "sampling_centred"),
    "grouping": ("block_size", "shared_whitener"),
    "freeze": ("freeze_schedule",),
}


def _named_grouping(kind: str, current: Interleaved | Contiguous) -> Interleaved | Contiguous:
    grouping_ops.check_kind(kind)
    strategy = Interleaved if kind == "interleaved" else Contiguous
    return strategy(current.block_size, current.shared)


def _named_root(method: str, current: Root) -> Root:
    if method not in METHODS:
        raise ValueError(f"`method` must be one of {METHODS}, got {method!r}.")
    strategy = {"newton_schulz": NewtonSchulz, "chebyshev": Chebyshev, "eigh": Eigh}[method]
    if isinstance(current, strategy):
        return current
    if strategy is Eigh or not isinstance(current, _OF_PRODUCTS):
        return strategy()
    kept = ("num_iters", "precision")
    return strategy(**{name: getattr(current, name) for name in kept if hasattr(current, name)})


def _with_num_iters(root: Root, num_iters: int, named: bool) -> Root:
    """`num_iters` beside a method that has no use for it is ignored, as in `ops.inverse_sqrt`."""
    roots.check_num_iters(num_iters)
    if isinstance(root, NewtonSchulz | Chebyshev):
        if num_iters > 5:
            root = dataclasses.replace(root, precision="highest")
        return dataclasses.replace(root, num_iters=num_iters)
    if named:
        return root
    raise ValueError(f"`num_iters`={num_iters} has no meaning for {root!r}; leave it out.")


def _with_precision(root: Root, precision: str) -> Root:
    if isinstance(root, _OF_PRODUCTS):
        return dataclasses.replace(root, precision=precision)
    raise ValueError(f"`precision`={precision!r} has no meaning for {root!r}; leave it out.")


def _check(settings: dict[str, Any]) -> None:
    for name in ("eps", "momentum"):
        check_number(name, settings[name])
    if not settings["eps"] > 0:
        raise ValueError(f"`eps` must be greater than 0, got {settings['eps']}.")
    if not 0 <= settings["momentum"] < 1:
        raise ValueError(
            f"`momentum` must be in [0, 1), the share of the old average, got {settings['momentum']}."
        )
    if not isinstance(settings["one_pass"], bool):
        raise TypeError(f"`one_pass` must be True or False, got {settings['one_pass']!r}.")
    check_sample_dtype(settings["sample_dtype"])
    if settings["whiten"] not in WHITEN:
        raise ValueError(f"`whiten` must be one of {WHITEN}, got {settings['whiten']!r}.")
    if settings["local_norm"] not in LOCAL_NORMS:
        raise ValueError(
            f"`local_norm` must be one of {LOCAL_NORMS}, got {settings['local_norm']!r}."
        )
    for name, kinds, what in (
        ("sampling", (Stride, Budget), "`Stride(...)` or `Budget(...)`"),
        ("grouping", (Interleaved, Contiguous), "`Interleaved(...)` or `Contiguous(...)`"),
        ("freeze", (Freeze, type(None)), "`Freeze(active_steps, period)`, a pair of ints or None"),
    ):
        if not isinstance(settings[name], kinds):
            raise TypeError(f"`{name}` must be {what}, got {settings[name]!r}.")
    if isinstance(settings["root"], type) or not callable(settings["root"]):
        raise TypeError(
            f"`root` must be `NewtonSchulz(...)` or its like, a function of matrices, got "
            f"{settings['root']!r}."
        )
