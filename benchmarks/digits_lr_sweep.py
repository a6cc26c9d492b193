"""Each norm's best learning rate on the digits, chosen without the test set.

Every rate trains with the loop and the recipe of configs/digits.py on three quarters of the training set and
is measured on the fourth, for each of the four quarters and three seeds: twelve runs, in which each image is
held out three times. Rates whose mean accuracy after the last epoch is within one standard error of the
highest cannot be told apart by it; of those, the best is the one with the highest accuracy after the first
epoch. A run whose loss becomes NaN or infinite counts as accuracy 0.

  python -m benchmarks.digits_lr_sweep
"""

import json
from pathlib import Path

import numpy as np

from configs import digits
from train import data, loop, metrics
from train.config import Config

RESULT = Path(__file__).parent / "results" / "digits_lr_sweep.json"
RATES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
SEEDS = (0, 1, 2)
FOLDS = 4


def main() -> None:
    """Sweep both norms and write `RESULT`."""
    dataset = data.load("digits")
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
        "chosen_by": "the highest mean accuracy after the first epoch among rates whose mean accuracy "
        "after the last epoch is within one standard error of the highest",
        "best": best,
        "sweep": sweep,
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(figures, indent=1) + "\n")
    print(f"Best: {best}. Written to {RESULT}.")


def choose(rows: list[dict]) -> float:
    """Return the best learning rate of one norm."""
    highest = max(rows, key=lambda row: np.mean(row["last_accuracy"]))["last_accuracy"]
    error = np.std(highest, ddof=1) / np.sqrt(len(highest))
    equal = [row for row in rows if np.mean(row["last_accuracy"]) >= np.mean(highest) - error]
    return max(equal, key=lambda row: np.mean(row["first_accuracy"]))["learning_rate"]


def measure(norm: str, rate: float, folds: list[data.Dataset]) -> dict:
    """Return accuracies after the first and the last epoch of every fold and seed."""
    config: Config = digits.get_config(f"cnn,{norm}")
    config.optimizer.learning_rate = rate
    trainer = loop.Trainer(config, folds[0])
    trainer.compile()
    runs = []
    for fold in folds:
        trainer.use(fold)
        runs += [accuracies(trainer, seed) for seed in SEEDS]
    result = {
        "learning_rate": rate,
        "first_accuracy": [run[0] for run in runs],
        "last_accuracy": [run[-1] for run in runs],
    }
    first, last = (100 * np.mean(result[f"{which}_accuracy"]) for which in ("first", "last"))
    print(
        f"{norm:6}  learning rate {rate:<5}  first epoch {first:5.2f}  last {last:5.2f}",
        flush=True,
    )
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
