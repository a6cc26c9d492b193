"""The record of a run: `<folder>/<experiment>/<cell>-seed<n>.json`.

experiment, cell, seed   what was run
command                  runs exactly this again
note                     of some: why it diverged, or what was written into the record afterwards
status                   "done", or "diverged" if the loss or the state became infinite
seconds                  wall time, compilation included, pauses between sessions left out
compile_seconds          of these, if this run compiled
minutes                  what the cell was thought to take, see `Cell.minutes`
device, processor        what it ran on; of a CPU both are one
device_count             how many devices JAX saw
date, versions           of the day and the packages
config                   every setting, by its dotted name; of a measurement its arguments
spec                     with deconvolution: what the settings and the preset came to on that day
epochs                   a row an epoch, as in metrics.jsonl
steps                    of some cells: the loss of every step
figures                  of measurements
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from train import metrics
from train.experiments.cell import Experiment, Result, Results, Run

NEEDED = (
    "experiment",
    "cell",
    "seed",
    "status",
    "seconds",
    "minutes",
    "device",
    "date",
    "versions",
    "config",
)


def path(folder: Path, run: Run) -> Path:
    """Return where the record of `run` is, or would be."""
    return folder / run.experiment / f"{run.name}.json"


def read(folder: Path, experiment: Experiment) -> Results:
    """Return what there is of an experiment, seeds in rising order, those of other seeds included.

    Raises:
      ValueError: a file that is not what `write` writes.
    """
    found: dict[str, list[Result]] = {}
    for cell in experiment.cells:
        for file in (folder / experiment.name).glob(f"{cell.name}-seed*.json"):
            try:
                result = json.loads(file.read_text())
                _check(result, experiment.name, cell.name, file.stem)
            except (ValueError, TypeError, AttributeError) as error:
                raise ValueError(f"{file} is no record of a run: {error}") from error
            found.setdefault(cell.name, []).append(result)
    return {name: sorted(rows, key=lambda r: r["seed"]) for name, rows in found.items()}


def _check(result: Result, experiment: str, cell: str, stem: str) -> None:
    """Raise ValueError for a file that holds another run than its name says, or less than a page needs."""
    missing = [name for name in NEEDED if name not in result]
    if not {"epochs", "figures"} & set(result):
        missing.append("epochs or figures")
    if missing:
        raise ValueError(f"it has no {', '.join(missing)}")
    said = (result["experiment"], result["cell"], result["seed"])
    if said[:2] != (experiment, cell) or stem != f"{cell}-seed{said[2]}":
        raise ValueError(f"it holds {said[0]}/{said[1]}-seed{said[2]}")
    if result["config"].get("seed", said[2]) != said[2]:
        raise ValueError(f"its config has seed {result['config']['seed']}")


def write(folder: Path, run: Run, content: Mapping[str, Any]) -> Path:
    """Write the record of `run` whole or not at all; return where."""
    file = path(folder, run)
    file.parent.mkdir(parents=True, exist_ok=True)
    head = {
        "experiment": run.experiment,
        "cell": run.cell.name,
        "seed": run.seed,
        "command": f"python -m train.reproduce {run.experiment}/{run.cell.name} --seed={run.seed} --again "
        "--data_dir=DIR",
    }
    record = metrics.plain(head | dict(content) | machine())
    metrics.replace(file, _json(record).encode())
    return file


def machine() -> dict[str, Any]:
    """Return what a record says of the machine."""
    found = metrics.environment()
    versions = {name: found[name] for name in ("python", *metrics.PACKAGES)}
    on_cpu = found["platform"] == "cpu"
    return {
        "device": found["processor"] if on_cpu else found["device"],
        "device_count": found["device_count"],
        "processor": found["processor"],
        "date": found["date"],
        "versions": versions,
    }


def _json(record: Mapping[str, Any]) -> str:
    """One line a key, and one a row: small changes stay small in a diff, and the file short."""
    lines = []
    for name, value in record.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            rows = ",\n  ".join(json.dumps(row, allow_nan=False) for row in value)
            text = f"[\n  {rows}\n ]"
        else:
            text = json.dumps(value, allow_nan=False)
        lines.append(f" {json.dumps(name)}: {text}")
    return "{\n" + ",\n".join(lines) + "\n}\n"
