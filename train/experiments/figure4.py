"""Figure 4: one layer on Fashion-MNIST with either loss, and a sigmoid MLP on MNIST.

Plain SGD at a constant rate, without momentum for the one layer, as section 3.3 argues. Each norm gets the
best of a sweep of rates, by the training loss of its last epoch; the paper gives deconvolution 1.0 and names
0.02 to 0.1 for plain SGD. Batches are of 512, fewer than there are pixels. Channel deconvolution of a grey
image is one mean and one variance for all its pixels; the MLP's hidden layers are whitened as in the full
form.
"""

from typing import Any

from train.experiments import figure4_claims
from train.experiments.cell import SEEDS, Cell, Experiment, Results
from train.experiments.figure4_claims import EARLY
from train.experiments.sweeps import NORMS, best, largest_tried, loss_at, rate, stable
from train.experiments.tables import counted, mean_range, table

SMALL = (0.001, 0.003, 0.01, 0.03, 0.1)
SQUARED = dict.fromkeys(("none", "batch", "channel"), SMALL) | {"deconv": (0.1, 0.3, 1.0)}
LOGISTIC = dict.fromkeys(("none", "batch", "channel"), (*SMALL, 0.3)) | {
    "deconv": (0.3, 1.0, 3.0, 10.0)
}
MLP = dict.fromkeys(NORMS, (0.1, 0.3, 1.0, 3.0))


def _cells(file: str, network: str, rates: dict[str, tuple[float, ...]], **changes: Any):
    for norm, choices in rates.items():
        for value in choices:
            yield Cell(
                f"{norm}-lr{value:g}",
                minutes=changes["epochs"] * (0.3 if norm == "deconv" else 0.03),
                config=f"configs/{file}.py:{network},{norm}",
                changes={
                    "batch_size": 512,
                    "optimizer.schedule": "constant",
                    "optimizer.weight_decay": 0.0,
                    "optimizer.learning_rate": value,
                    **changes,
                },
                seeds=SEEDS,
                steps=True,
            )


_ONE_LAYER = {"epochs": 2, "optimizer.momentum": 0.0}
_OPTIMUM = Cell("optimum", 0.5, measure="train.experiments.one_step:measure", seeds=(0,))


def _rows(chosen, largest, tried):
    for norm, runs in chosen.items():
        last = [100 * run["epochs"][-1]["test_accuracy"] for run in runs]
        yield [
            NORMS[norm],
            f"{rate(runs):g}",
            ("≥ " if largest[norm] == tried[norm] else "") + f"{largest[norm]:g}",
            *(
                f"{loss_at(runs, step):.3f}"
                for step in (1, EARLY, 20, 100)
                if step <= len(runs[0]["steps"])
            ),
            mean_range([run["epochs"][-1]["train_loss"] for run in runs], "{:.4f}"),
            mean_range(last, "{:.1f}%"),
            str(len(runs)),
        ]


def _picture(results, draw, name, title, ceiling):
    curves = {
        f"{NORMS[norm]}, rate {rate(runs):g}": (
            norm,
            [[(step, loss) for step, loss in run["steps"]] for run in runs],
        )
        for norm, runs in best(results).items()
    }
    line = None
    if "optimum" in results:
        line = ("closed-form optimum", results["optimum"][0]["figures"]["optimum"]["train_loss"])
    return draw.loss_curves(name, curves, title=title, line=line, ceiling=ceiling)


def _tell(results: Results, draw: Any, *, name: str, title: str, ceiling: float) -> list[str]:
    chosen = best(results)
    if not chosen:
        return ["Not run."]
    heads = [
        "",
        "best rate",
        "largest without divergence",
        "loss at 1",
        f"at {EARLY}",
        "at 20",
        "at 100",
        "last epoch",
        "test accuracy",
        "n",
    ]
    config = (
        chosen["none"][0]["config"]
        if "none" in chosen
        else next(iter(chosen.values()))[0]["config"]
    )
    momentum = config["optimizer.momentum"]
    lines = [
        _picture(results, draw, name, title, ceiling),
        "",
        f"Batches of {config['batch_size']}, {counted(config['epochs'], 'epoch')}, a constant rate, "
        f"{f'momentum {momentum:g}' if momentum else 'no momentum'} in all, the best rate of a sweep by the "
        "training loss of the last epoch. Channel deconvolution of grey images is one scale for all pixels, "
        "so that in a first layer it is plain SGD at another rate. ≥: no larger rate was tried.",
        "",
        *table(heads, list(_rows(chosen, stable(results), largest_tried(results)))),
    ]
    if "optimum" in results:
        optimum = results["optimum"][0]["figures"]["optimum"]
        lines += [
            "",
            f"The closed-form optimum has a training loss of {optimum['train_loss']:.4f}, a test loss of "
            f"{optimum['test_loss']:.4f} and a test accuracy of {100 * optimum['test_accuracy']:.1f}%.",
        ]
    return lines


def _tell_a(results: Results, draw: Any) -> list[str]:
    lines = _tell(
        results, draw, name="figure4a", title="Least squares on Fashion-MNIST", ceiling=0.7
    )
    if "optimum" in results:
        figures = results["optimum"][0]["figures"]
        rows = [
            [
                name,
                f"{curve['rate']:.2g}",
                *(f"{curve['loss_above_optimum'][step]:.2e}" for step in (0, 1, 2, 5, 20)),
            ]
            for name, curve in figures["curves"].items()
        ]
        lines += [
            "",
            "**Section 3.3.** Gradient descent on the whole training set, loss above the optimum by step; "
            f"the covariance of the pixels has a condition of {figures['condition']:.1e}:",
            "",
            *table(["whitened by", "rate", "start", "1 step", "2", "5", "20"], rows),
        ]
    return lines


FIGURE4A = Experiment(
    "figure4a",
    "one layer, least squares, Fashion-MNIST; and section 3.3, one step to the solution",
    (*_cells("fashion_mnist", "linear", SQUARED, loss="l2", **_ONE_LAYER), _OPTIMUM),
    lambda results: [
        *figure4_claims.regression(results, loss="squared loss"),
        *figure4_claims.limit(results),
        *figure4_claims.one_step(results),
    ],
    _tell_a,
)
FIGURE4B = Experiment(
    "figure4b",
    "one layer, logistic loss, Fashion-MNIST",
    tuple(_cells("fashion_mnist", "linear", LOGISTIC, loss="cross_entropy", **_ONE_LAYER)),
    lambda results: figure4_claims.regression(results, loss="logistic loss"),
    lambda results, draw: _tell(
        results, draw, name="figure4b", title="Logistic regression on Fashion-MNIST", ceiling=2.5
    ),
)
FIGURE4CD = Experiment(
    "figure4cd",
    "three hidden layers of 128 sigmoid units, MNIST",
    tuple(_cells("mnist", "mlp", MLP, epochs=3)),
    figure4_claims.mlp,
    lambda results, draw: _tell(
        results, draw, name="figure4cd", title="A sigmoid MLP on MNIST", ceiling=2.5
    ),
)
