"""The experiments of the paper by name, those that tell most for their cost first."""

from train.experiments.ablation import ABLATION, ABLATION10
from train.experiments.cell import Experiment
from train.experiments.columns import IMAGENET, PREPRINT20, PREPRINT100, TABLE1
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
        TABLE1["cifar10", 1],
        TABLE1["cifar100", 1],
        ABLATION,
        FIGURE9,
        PREPRINT20,
        SPEEDRUN,
        TABLE1["cifar10", 20],
        TABLE1["cifar100", 20],
        FIGURE8A,
        ABLATION10,
        PREPRINT100,
        TABLE1["cifar10", 100],
        TABLE1["cifar100", 100],
        IMAGENET,
    )
}
