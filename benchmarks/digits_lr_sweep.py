"""Each norm's best learning rate on the digits, chosen without the test set.

Every rate trains with the loop and the recipe of configs/digits.py on three quarters of the training set and
is measured on the fourth, for each of the four quarters and two seeds: eight runs, in which each image is
held out twice. The best rate has the highest mean accuracy over what the demo's table shows: after the first,
the fifth and the last epoch. A run whose loss becomes NaN or infinite counts as accuracy 0.

  python -m benchmarks.digits_lr_sweep
"""

import json
from pathlib import Path

import numpy as np

from configs import digits
from train import data, loop, metrics
from train.config import Config

RESULT = Path(__file__).parent / "results" / "digits_lr_sweep.json"
RATES = (0.02, 0.05, 0.1, 0.2, 0.5)
SEEDS = (0, 1)
FOLDS = 4
COLUMNS = {"first_epoch": 1, "fifth_epoch": 5, "last_epoch": 0}  # 0: whichever is the last


def main() -> None:
    """Sweep both norms and write `RESULT`."""
    dataset = data.load_dataset("digits")
    folds = [data.hold_out(dataset, fold, FOLDS) for fold in range(FOLDS)]
    sweep = {norm: [measure(norm, rate, folds) for rate in RATES] for norm in digits.LEARNING_RATES}
    best = {norm: choose(rows) for norm, rows in sweep.items()}
    figures = {
        "command": "python -m benchmarks.digits_lr_sweep",
        "environment": metrics.environment(),
        "config": digits.get_config().to_dict(),
        "seeds": SEEDS,
        "folds": FOLDS,
        "train_examples": len(folds[0].train),
        "validation_examples": len(folds[0].test),
        "chosen_by": "the highest mean accuracy over the first, the fifth and the last epoch",
        "best": best,
        "sweep": sweep,
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(figures, indent=1) + "\n")
    print(f"Best: {best}. Written to {RESULT}.")


def choose(rows: list[dict]) -> float:
    """Return the best learning rate of one norm."""
    return max(rows, key=lambda row: np.mean([np.mean(row[name]) for name in COLUMNS]))[
        "learning_rate"
    ]


def measure(norm: str, rate: float, folds: list[data.Dataset]) -> dict:
    """Return accuracies after the epochs of `COLUMNS`, of every fold and seed."""
    config: Config = digits.get_config(f"cnn,{norm}")
    config.optimizer.learning_rate = rate
    trainer = loop.Trainer(config, data.Resident(folds[0], config))
    trainer.compile()
    runs = []
    for fold in folds:
        trainer.use(data.Resident(fold, config))
        runs += [accuracies(trainer, seed) for seed in SEEDS]
    result: dict = {"learning_rate": rate}
    for name, epoch in COLUMNS.items():
        result[name] = [run[min(epoch, len(run)) - 1 if epoch else -1] for run in runs]
    means = "  ".join(f"{name} {100 * np.mean(result[name]):5.2f}" for name in COLUMNS)
    print(f"{norm:6}  learning rate {rate:<5}  {means}", flush=True)
    return result


def accuracies(trainer: loop.Trainer, seed: int) -> list[float]:
    """Return the accuracy after each epoch, 0 at the end of a run that broke down."""
    result = []
    try:
        for row in trainer.run(seed):
            result.append(row["test_accuracy"])
    except loop.NonFiniteLossError:
        result.append(0.0)
    return result


if __name__ == "__main__":
    main()
