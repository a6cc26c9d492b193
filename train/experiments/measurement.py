"""Experiments that are one measurement a cell, without seeds: the figures that show what whitening does."""

from typing import Any

from train.experiments.cell import Cell, Results

DATASETS = {"cifar10": "CIFAR-10", "imagenet2012": "ImageNet photos"}


def measurement(name: str, function: str, minutes: float, **changes: Any) -> Cell:
    """Return a cell that calls `train.experiments.<module>:<function>` with `changes`."""
    return Cell(name, minutes, measure=f"train.experiments.{function}", changes=changes, seeds=(0,))


def on_each_dataset(function: str) -> tuple[Cell, ...]:
    """Return a cell for each dataset that calls that function of `inputs`."""
    return tuple(measurement(name, f"inputs:{function}", 1, dataset=name) for name in DATASETS)


def figures_of(results: Results) -> dict[str, Any]:
    """Return by cell what was measured."""
    return {name: runs[0]["figures"] for name, runs in results.items()}
