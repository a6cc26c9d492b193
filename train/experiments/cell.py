"""What an experiment is made of: cells, each a config or a measurement, run once for every seed."""

import dataclasses
import fnmatch
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Result = dict[str, Any]  # what a finished cell leaves, see train/experiments/results.py
Results = Mapping[str, Sequence[Result]]  # by the cell's name, one for each seed that is done

SEEDS = (0, 1, 2)


@dataclasses.dataclass(frozen=True)
class Cell:
    """One line of a table, to be filled in.

    Attributes:
      name: of the cell within its experiment, of the files too.
      minutes: what one seed takes on two slow CPU cores; small ones are run first, and on another device it
        tells how long one cell takes when another is known.
      config: file and config string, as `--config` of `train.main`; "" for a measurement.
      changes: values by dotted name, laid over the config.
      measure: `module:function` of a measurement, called as `function(load, seed, **changes)`, where
        `load(name)` returns a dataset; it returns figures that JSON can hold.
      seeds: run once for each.
      steps: keep the loss of every step, not of every epoch alone.
    """

    name: str
    minutes: float
    config: str = ""
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    measure: str = ""
    seeds: tuple[int, ...] = SEEDS
    steps: bool = False


@dataclasses.dataclass(frozen=True)
class Run:
    """A cell with one of its seeds: what is run, stopped, resumed and recorded."""

    experiment: str
    cell: Cell
    seed: int

    @property
    def name(self) -> str:
        """Of the files, without their endings."""
        return f"{self.cell.name}-seed{self.seed}"

    def __str__(self) -> str:
        return f"{self.experiment}/{self.name}"


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What became of one claim.

    Attributes:
      claim: a short sentence, in the paper's sense where it is the paper's.
      holds: "yes"; "in part", true of a part of what is claimed; "undecided", too few runs to tell from
        chance, or nothing to compare with; "no"; or "not run".
      published, ours, difference: figures as text; "" where there are none.
      seeds: how many runs stand behind a figure.
      why: what a reader should know of it, a sentence or two.
      own: the paper does not claim it.
    """

    claim: str
    holds: str
    published: str = ""
    ours: str = ""
    difference: str = ""
    seeds: str = ""
    why: str = ""
    own: bool = False


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Cells, and what they must show.

    Attributes:
      name: on the command line, of the folder of results.
      shows: one line.
      cells: see `Cell`.
      judge: from the results so far to verdicts, one a claim.
      tell: from the results so far and a function that draws to the lines of the page; see
        `train/reproduction_page.py`.
      seeds_last: a first seed of every cell before the second of any: for cells that take long, so that a
        grid that is broken off has all conditions.
    """

    name: str
    shows: str
    cells: tuple[Cell, ...]
    judge: Callable[[Results], list[Verdict]]
    tell: Callable[[Results, Any], list[str]]
    seeds_last: bool = False

    def runs(self) -> list[Run]:
        """Return every cell with every seed, small ones first."""
        runs = [Run(self.name, cell, seed) for cell in self.cells for seed in cell.seeds]
        if self.seeds_last:
            return sorted(runs, key=lambda r: (r.cell.seeds.index(r.seed), r.cell.minutes))
        return sorted(runs, key=lambda r: r.cell.minutes)


def choose(
    names: Sequence[str], experiments: Mapping[str, Experiment], seed: int | None = None
) -> list[Run]:
    """Return the runs that `names` mean, in the order of the names, small ones first within each.

    Args:
      names: `experiment`, `experiment/cell`, or either with * and ?; "all".
      experiments: by name.
      seed: in place of the cells' own seeds.
    Raises:
      ValueError: a name that no cell has, or a seed out of range.
    """
    if seed is not None and not 0 <= seed < 2**32:
        raise ValueError(f"`--seed` must be from 0 to 4294967295, got {seed}.")
    chosen: dict[str, Run] = {}
    for name in names:
        experiment, _, cell = ("*" if name == "all" else name).partition("/")
        found = [
            run if seed is None else dataclasses.replace(run, seed=seed)
            for one in experiments.values()
            if fnmatch.fnmatchcase(one.name, experiment)
            for run in one.runs()
            if fnmatch.fnmatchcase(run.cell.name, cell or "*")
        ]
        if not found:
            raise ValueError(
                f"NAME must be one of {tuple(experiments)}, with /CELL or without, or `all`, or alone `list` "
                f"or `report`; got {name!r}."
            )
        chosen |= {str(run): run for run in found}
    return list(chosen.values())
