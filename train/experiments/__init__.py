"""The experiments of the paper by name, those that tell most for their cost first."""

from train.experiments.ablation import ABLATION, ABLATION10
from train.experiments.cell import Experiment
from train.experiments.cifar import EPOCH1, EPOCH20, PREPRINT20
from train.experiments.figure2 import FIGURE2
from train.experiments.figure3 import FIGURE3
from train.experiments.figure4 import FIGURE4A, FIGURE4B, FIGURE4CD
from train.experiments.figure8a import FIGURE8A
from train.experiments.figure9 import FIGURE9, ROWS
from train.experiments.race import RACE
from train.experiments.race_cpu import RACE_CPU
from train.experiments.speedrun import SPEEDRUN

EXPERIMENTS: dict[str, Experiment] = {
    one.name: one
    for one in (
        FIGURE4A,
        FIGURE4B,
        FIGURE4CD,
        FIGURE2,
        FIGURE3,
        ROWS,
        RACE,
        RACE_CPU,
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
