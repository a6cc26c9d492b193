"""The record of a run: `<folder>/<experiment>/<cell>-seed<n>.json`.

experiment, cell, seed   what was run
command                  runs exactly this again
note                     of some: what was written into the record afterwards
status                   "done", or "diverged" if the loss or the state became infinite
seconds                  wall time, compilation included, pauses between sessions left out
device, processor        what it ran on; of a CPU both are one
date, versions           of the day and the packages
config                   every setting, by its dotted name; of a measurement its arguments
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
                found.setdefault(result["cell"], []).append(result)
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{file} is no record of a run: {error}") from error
    return {name: sorted(rows, key=lambda r: r["seed"]) for name, rows in found.items()}


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
