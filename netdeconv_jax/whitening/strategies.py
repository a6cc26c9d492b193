"""The parts of a `WhiteningSpec`: roots, samplings, groupings and the freeze schedule."""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import jax
import numpy as np

from netdeconv_jax.ops import grouping as grouping_ops
from netdeconv_jax.ops import polynomial, roots


def check_number(name: str, value: Any) -> None:
    """Raise unless a setting is a number, not an array or a tracer."""
    if not isinstance(value, (int, float, np.number)):
        raise TypeError(
            f"`{name}` must be a number, got {value!r}; a spec is static and holds no arrays."
        )


def _check_centred(centred: bool) -> None:
    if not isinstance(centred, bool):
        raise TypeError(f"`sampling_centred` must be True or False, got {centred!r}.")


class Root(Protocol):
    """An inverse square root of symmetric positive definite matrices [..., d, d]."""

    @property
    def products(self) -> int:
        """How many matrix products it takes, or their worth."""
        ...

    def __call__(self, cov: jax.Array) -> jax.Array:
        """Return D ~ cov^(-1/2)."""
        ...


@dataclasses.dataclass(frozen=True)
class NewtonSchulz:
    """The paper's truncated iteration: `ops.newton_schulz`.

    Source: Ye et al. 2020, section 3.5.

    Example:
      >>> from netdeconv_jax.whitening import NewtonSchulz
      >>> NewtonSchulz(num_iters=15)
      NewtonSchulz(num_iters=15, precision='highest')
    """

    num_iters: int = 5
    precision: str = "highest"

    def __post_init__(self):
        roots.check_num_iters(self.num_iters)
        roots.check_precision(self.precision)

    def __call__(self, cov: jax.Array) -> jax.Array:
        """Return the inverse square root after `num_iters` steps."""
        return roots.newton_schulz(cov, num_iters=self.num_iters, precision=self.precision)

    @property
    def products(self) -> int:
        """How many matrix products it takes."""
        return 3 * self.num_iters - 3


@dataclasses.dataclass(frozen=True)
class Chebyshev:
    """What `num_iters` steps give, to a relative `tol`, in half the products: `ops.chebyshev`.

    Source: ours.

    Example:
      >>> from netdeconv_jax.whitening import Chebyshev
      >>> Chebyshev(tol=2e-3)
      Chebyshev(tol=0.002, num_iters=5, precision='highest')
    """

    tol: float = 1e-4
    num_iters: int = 5
    precision: str = "highest"

    def __post_init__(self):
        roots.check_num_iters(self.num_iters)
        roots.check_precision(self.precision)
        check_number("tol", self.tol)
        polynomial.check_tol(self.tol)
        polynomial.chebyshev_coefficients(int(self.num_iters), float(self.tol))

    def __call__(self, cov: jax.Array) -> jax.Array:
        """Return the inverse square root."""
        return polynomial.chebyshev(
            cov, num_iters=self.num_iters, tol=self.tol, precision=self.precision
        )

    @property
    def products(self) -> int:
        """How many matrix products it takes."""
        return polynomial.products(self.num_iters, float(self.tol))


@dataclasses.dataclass(frozen=True)
class ChebyshevRidge:
    """What `Eigh(ridge)` gives, to a relative `tol`, in matrix products alone: `ops.chebyshev_ridge`.

    Raises:
      ValueError: `ridge` or `tol` is not positive, no polynomial is that near, or `precision` is unknown.
      TypeError: `ridge` or `tol` is not a number.

    Source: ours.

    Example:
      >>> from netdeconv_jax.whitening import ChebyshevRidge
      >>> ChebyshevRidge(ridge=1e-2).products
      9
    """

    ridge: float = 1e-2
    tol: float = 1e-3
    precision: str = "highest"

    def __post_init__(self):
        roots.check_precision(self.precision)
        check_number("ridge", self.ridge)
        check_number("tol", self.tol)
        polynomial.ridge_coefficients(self.ridge, self.tol)

    def __call__(self, cov: jax.Array) -> jax.Array:
        """Return the inverse square root of `cov` with the ridge added."""
        return polynomial.chebyshev_ridge(
            cov, ridge=self.ridge, tol=self.tol, precision=self.precision
        )

    @property
    def products(self) -> int:
        """How many matrix products it takes."""
        return polynomial.products_of(polynomial.ridge_coefficients(self.ridge, self.tol))


@dataclasses.dataclass(frozen=True)
class Eigh:
    """The exact root, with a ridge relative to the Frobenius norm: `ops.eigh`.

    Source: ours.

    Example:
      >>> from netdeconv_jax.whitening import Eigh
      >>> Eigh(ridge=1e-2)
      Eigh(ridge=0.01)
    """

    ridge: float = 0.0

    def __post_init__(self):
        check_number("ridge", self.ridge)
        roots.check_ridge(self.ridge)

    def __call__(self, cov: jax.Array) -> jax.Array:
        """Return the exact inverse square root of `cov` with the ridge added."""
        return roots.eigh(cov, ridge=self.ridge)

    @property
    def products(self) -> int:
        """What an eigendecomposition is worth in matrix products, about."""
        return 10


@dataclasses.dataclass(frozen=True)
class Stride:
    """Statistics from patches on a grid `stride` times as coarse as the convolution's.

    The grid begins in the corner, as the original's does, unless it is `centred` (`ops.patch_moments`).

    Source: `sampling_stride` of the original code; `centred` is ours.

    Example:
      >>> from netdeconv_jax.whitening import Stride
      >>> Stride(5)
      Stride(stride=5, centred=False)
    """

    stride: int = 3
    centred: bool = False

    def __post_init__(self):
        grouping_ops.check_count("sampling_stride", self.stride)
        _check_centred(self.centred)

    def choose(self, rows_at: Callable[[int], int], width: int, largest: int) -> int:
        """Return the stride: always the same."""
        del rows_at, width, largest
        return self.stride


@dataclasses.dataclass(frozen=True)
class Budget:
    """Statistics from the coarsest grid that still gives `rows_per_dim` samples per whitened dimension.

    A fixed stride takes far more samples than it needs in early layers, and can take fewer than there are
    dimensions in late ones. A grid finer than `Stride()` is taken only as far as `finer_below` asks for: on
    maps of a few pixels, where each channel has a whitener, it would cost more than all else.

    The grid is `centred` (`ops.patch_moments`) unless that is False: one that is coarse and begins in the
    corner sees mostly the border of a map.

    Source: ours.

    Example:
      >>> from netdeconv_jax.whitening import Budget
      >>> Budget(4).choose(lambda stride: 1000 // stride**2, width=27, largest=9)
      3
    """

    rows_per_dim: int = 16
    finer_below: int = 8
    centred: bool = True

    def __post_init__(self):
        grouping_ops.check_count("rows_per_dim", self.rows_per_dim)
        grouping_ops.check_count("finer_below", self.finer_below)
        _check_centred(self.centred)

    def choose(self, rows_at: Callable[[int], int], width: int, largest: int) -> int:
        """Return the stride, at most `largest` and at least 1, of the coarsest grid with rows enough.

        Of several strides with as many rows it is the one in the middle: the smallest leave a margin at the
        far side of a map, the largest reach its border there.
        """

        def coarsest(rows_per_dim: int, largest: int) -> int:
            enough = rows_per_dim * width
            rows = {stride: rows_at(stride) for stride in range(1, largest + 1)}
            fewest = min((n for n in rows.values() if n >= enough), default=rows[1])
            alike = [stride for stride, n in rows.items() if n == fewest]
            return alike[(len(alike) - 1) // 2]

        stride, usual = coarsest(self.rows_per_dim, largest), min(Stride().stride, largest)
        return stride if stride >= usual else max(stride, coarsest(self.finer_below, usual))


@dataclasses.dataclass(frozen=True)
class Interleaved:
    """Groups as in the original code: neighbouring columns of a patch fall into different groups.

    Source: the original code.

    Example:
      >>> from netdeconv_jax.whitening import Interleaved
      >>> Interleaved(16)
      Interleaved(block_size=16, shared=True)
    """

    block_size: int = 64
    shared: bool = True
    kind = "interleaved"

    def __post_init__(self):
        grouping_ops.check_count("block_size", self.block_size)
        grouping_ops.check_shared(self.shared)


@dataclasses.dataclass(frozen=True)
class Contiguous:
    """Groups as in the paper's text: neighbouring channels are whitened together.

    Source: Ye et al. 2020, section 3.5; `shared=False` is ours.

    Example:
      >>> from netdeconv_jax.whitening import Contiguous
      >>> Contiguous(16, shared=False)
      Contiguous(block_size=16, shared=False)
    """

    block_size: int = 64
    shared: bool = True
    kind = "contiguous"

    def __post_init__(self):
        grouping_ops.check_count("block_size", self.block_size)
        grouping_ops.check_shared(self.shared)


@dataclasses.dataclass(frozen=True)
class Freeze:
    """Compute statistics in the first `active_steps` of every `period`; use the running ones in the rest.

    The original's stems compute them in steps 0 to 100 of every thousand: the defaults.

    Source: `freeze` and `freeze_iter` of the original code.

    Example:
      >>> from netdeconv_jax.whitening import Freeze
      >>> Freeze()
      Freeze(active_steps=101, period=1000)
    """

    active_steps: int = 101
    period: int = 1000

    def __post_init__(self):
        grouping_ops.check_count("active_steps", self.active_steps)
        grouping_ops.check_count("period", self.period)
        if self.period < self.active_steps:
            raise ValueError(
                f"`period` must be at least `active_steps` {self.active_steps}, got {self.period}."
            )
