"""What becomes of each layer when a model is converted, and the report of it: the same for every Flax API."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from netdeconv_jax.whitening.layer import check_flag, layer_spec
from netdeconv_jax.whitening.spec import WhiteningSpec
from netdeconv_jax.whitening.strategies import Contiguous

Path = tuple[str, ...]
DenseRule = bool | str | Sequence[str] | Callable[[str, int, int], bool]

DENSE_BLOCK = 512  # of `DeconvDense`, whatever the blocks of the convolutions

REPLACED, DROPPED, KEPT = "replaced", "dropped", "kept"
UNFOLDED = "cannot be folded: not all that follows one whitening layer"
UNSEEN = "not run in evaluation, where nothing is known of it"


@dataclasses.dataclass(frozen=True)
class Entry:
    """What became of one layer.

    Attributes:
      path: of the layer, "/" between names; "" for a model that is one layer.
      kind: name of the layer's class.
      action: `"replaced"`, `"dropped"` or `"kept"`.
      why: in words.

    Source: ours.

    Example:
      >>> from netdeconv_jax.whitening import Entry
      >>> Entry("bn1", "BatchNorm", "dropped", "follows conv1, which whitens").action
      'dropped'
    """

    path: str
    kind: str
    action: str
    why: str


@dataclasses.dataclass(frozen=True)
class Report:
    """What became of every convolution, dense layer and batch norm of a model; prints as a table.

    Attributes:
      entries: one `Entry` for each layer, in the order in which the model runs them.

    Source: ours.

    Example:
      >>> from netdeconv_jax.whitening import Entry, Report
      >>> report = Report((Entry("conv", "Conv", "replaced", "by DeconvConv"),))
      >>> report.replaced, report.kept
      (('conv',), ())
      >>> print(report)
      replaced  conv  Conv  by DeconvConv
      1 replaced, 0 dropped, 0 kept
    """

    entries: tuple[Entry, ...]

    @property
    def replaced(self) -> tuple[str, ...]:
        """Paths of the layers that whiten now."""
        return self._paths(REPLACED)

    @property
    def dropped(self) -> tuple[str, ...]:
        """Paths of the batch norms that are the identity now, or a scalar."""
        return self._paths(DROPPED)

    @property
    def kept(self) -> tuple[str, ...]:
        """Paths of the layers that are what they were."""
        return self._paths(KEPT)

    def _paths(self, action: str) -> tuple[str, ...]:
        return tuple(entry.path for entry in self.entries if entry.action == action)

    def __str__(self) -> str:
        rows = [(e.action, e.path or "(the model)", e.kind, e.why) for e in self.entries]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        counts = (f"{len(self._paths(action))} {action}" for action in (REPLACED, DROPPED, KEPT))
        return "\n".join([*lines, ", ".join(counts)])


@dataclasses.dataclass(frozen=True)
class Rules:
    """Which layers of a model are converted, and how the new ones whiten.

    Attributes:
      spec: of every layer that whitens, None for the default.
      dense: whether dense layers are converted: False, True, patterns, or a function of (path, in_features,
        features).
      keep: patterns of the layers that stay what they are.
      use_running_average: of every layer that whitens; None to follow the model's mode.
      axis_name: mapped axis over which statistics are pooled.
      unfolded: paths of batch norms that a warm start had to leave.
      unseen: paths of modules that a warm start did not see run.
      warm: whether what is learnt must stay as it is, as in a warm start.
    """

    spec: WhiteningSpec | None = None
    dense: bool | tuple[str, ...] | Callable[[str, int, int], bool] = False
    keep: tuple[str, ...] = ()
    use_running_average: bool | None = None
    axis_name: Any = None
    unfolded: frozenset[Path] = frozenset()
    unseen: frozenset[Path] = frozenset()
    warm: bool = False

    def wants_dense(self, path: Path, in_features: int, features: int) -> bool:
        """Return whether a dense layer is to be converted."""
        if isinstance(self.dense, tuple):
            return matches(path, self.dense)
        if callable(self.dense):
            return bool(self.dense("/".join(path), in_features, features))
        return self.dense

    def why_kept(self, path: Path) -> str | None:
        """Return why a layer is to stay what it is, None if it is not."""
        if matches(path, self.keep):
            return "named in `keep`"
        if path in self.unfolded:
            return UNFOLDED
        if path in self.unseen:
            return UNSEEN
        return None

    def why_strided(self, strides: int | Sequence[int] | None) -> str | None:
        """Return why a transposed convolution of these strides is to stay what it is, None if it is not."""
        if self.warm and any(s != 1 for s in np.atleast_1d(1 if strides is None else strides)):
            return "its strides make phases, which once whitened would each need a bias of its own"
        return None

    @property
    def dense_spec(self) -> WhiteningSpec | None:
        """The spec of dense layers: blocks are no smaller than those of `DeconvDense` by default."""
        if self.spec is None:
            return None
        block = max(self.spec.grouping.block_size, DENSE_BLOCK)
        return self.spec.replace(grouping=Contiguous(block, self.spec.grouping.shared))

    def check_used(self, paths: Iterable[Path]) -> None:
        """Raise if a pattern names none of the layers that a model ran."""
        paths = list(paths)
        given = {"keep": self.keep, "dense": self.dense if isinstance(self.dense, tuple) else ()}
        for name, patterns in given.items():
            for pattern in patterns:
                if paths and not any(matches(path, (pattern,)) for path in paths):
                    have = ", ".join("/".join(path) or "(the model)" for path in paths[:8])
                    raise ValueError(
                        f"`{name}` names no layer of the model: {pattern!r}; there are {have}"
                        f"{', ...' if len(paths) > 8 else ''}."
                    )


def rules(
    spec: WhiteningSpec | None,
    dense: DenseRule,
    keep: str | Sequence[str],
    use_running_average: bool | None,
    axis_name: Any,
) -> Rules:
    """Return checked `Rules`.

    Raises:
      TypeError: `spec`, `dense`, `keep` or `use_running_average` is of the wrong type.
      ValueError: a pattern is empty.
    """
    layer_spec(spec, WhiteningSpec())
    check_flag("use_running_average", use_running_average)
    if isinstance(axis_name, list):
        axis_name = tuple(axis_name)  # rules are hashed
    if not isinstance(dense, bool) and not callable(dense):
        dense = _patterns("dense", dense)
    return Rules(spec, dense, _patterns("keep", keep), use_running_average, axis_name)


def _patterns(name: str, given: Any) -> tuple[str, ...]:
    patterns = (given,) if isinstance(given, str) else given
    if isinstance(patterns, Sequence) and all(isinstance(pattern, str) for pattern in patterns):
        if any(not pattern.strip("/") for pattern in patterns):
            raise ValueError(f"`{name}` must name layers, got an empty pattern in {given!r}.")
        return tuple(patterns)
    raise TypeError(f"`{name}` must be a pattern of paths or several, got {given!r}.")


def matches(path: Path, patterns: Iterable[str]) -> bool:
    """Return whether a pattern names the layer at `path`, or a module that holds it.

    A pattern is compared, as file names are, with every run of consecutive names of the path: `"bn1"`,
    `"stage1/*/bn1"`, `"Stem_0"`. With a "/" in front it must start at the root. The path of a model that is
    one layer is "", which `"*"` names.
    """
    if not path:
        return any(pattern and fnmatchcase("", pattern) for pattern in patterns)
    for pattern in patterns:
        starts = range(1) if pattern.startswith("/") else range(len(path))
        wanted = pattern.removeprefix("/")
        for start in starts:
            ends = range(start + 1, len(path) + 1)
            if any(fnmatchcase("/".join(path[start:end]), wanted) for end in ends):
                return True
    return False


def explain_unwhitened(source: Path) -> str:
    """Return why a batch norm is kept that stands behind the layer at `source`, which is kept too."""
    return f"follows {'/'.join(source) or 'the model'}, which does not whiten"


def explain_norm(source: Path | None, *, scalar: bool, warm: bool = False) -> str:
    """Return why a batch norm is dropped that stands behind the whitening layer at `source`, or none."""
    why = (
        f"follows {'/'.join(source) or 'the model'}, which whitens"
        if source is not None
        else "pre-activation or other: not all of one whitening layer's output; `keep` would keep it"
    )
    if not scalar:
        return why
    start = "one, as its scale is folded" if warm else "zero"
    return f"{why}; started at scale zero: a learnt scalar that starts at {start}"
