"""The experiments of the paper by name, those that tell most for their cost first."""

from train.experiments.ablation import ABLATION, ABLATION10
from train.experiments.cell import Experiment
from train.experiments.cifar import EPOCH1, EPOCH20, FIGURE8A, PREPRINT20, SPEEDRUN
from train.experiments.figure4 import FIGURE4A, FIGURE4B, FIGURE4CD
from train.experiments.looks import FIGURE2, FIGURE3, FIGURE9, ROWS

EXPERIMENTS: dict[str, Experiment] = {
    one.name: one
    for one in (
        FIGURE4A,
        FIGURE4B,
        FIGURE4CD,
        FIGURE2,
        FIGURE3,
        ROWS,
        EPOCH1,
        ABLATION,
        FIGURE9,
        PREPRINT20,
        SPEEDRUN,
        EPOCH20,
        FIGURE8A,
        ABLATION10,
    )
}
