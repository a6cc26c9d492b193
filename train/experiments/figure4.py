"""Figure 4: one layer on Fashion-MNIST with either loss, and a sigmoid MLP on MNIST.

Plain SGD at a constant rate, without momentum for the one layer, as section 3.3 argues. Each norm gets the
best of a sweep of rates, by the training loss of its last epoch; the paper gives deconvolution 1.0 and names
0.02 to 0.1 for plain SGD. Batches are of 512, fewer than there are pixels. Channel deconvolution of a grey
image is one mean and one variance for all its pixels; the MLP's hidden layers are whitened as in the full
form.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from train.experiments.cell import SEEDS, Cell, Experiment, Result, Results, Verdict
from train.experiments.tables import mean_range, table

NORMS = {
    "none": "plain SGD",
    "batch": "batch norm",
    "channel": "channel deconvolution",
    "deconv": "deconvolution",
}
SMALL = (0.001, 0.003, 0.01, 0.03, 0.1)
SQUARED = dict.fromkeys(("none", "batch", "channel"), SMALL) | {"deconv": (0.1, 0.3, 1.0)}
LOGISTIC = dict.fromkeys(("none", "batch", "channel"), (*SMALL, 0.3)) | {
    "deconv": (0.3, 1.0, 3.0, 10.0)
}
MLP = dict.fromkeys(NORMS, (0.1, 0.3, 1.0))
EARLY = 5  # iterations


def _cells(file: str, network: str, rates: dict[str, tuple[float, ...]], **changes: Any):
    for norm, choices in rates.items():
        for rate in choices:
            yield Cell(
                f"{norm}-lr{rate:g}",
                minutes=changes["epochs"] * (0.3 if norm == "deconv" else 0.03),
                config=f"configs/{file}.py:{network},{norm}",
                changes={
                    "batch_size": 512,
                    "optimizer.schedule": "constant",
                    "optimizer.weight_decay": 0.0,
                    "optimizer.learning_rate": rate,
                    **changes,
                },
                seeds=SEEDS,
                steps=True,
            )


_ONE_LAYER = {"epochs": 2, "optimizer.momentum": 0.0}
_OPTIMUM = Cell("optimum", 0.5, measure="train.experiments.one_step:measure", seeds=(0,))


def best(results: Results) -> dict[str, Sequence[Result]]:
    """Return by norm the runs at the rate with the least training loss in the last epoch."""
    chosen: dict[str, tuple[float, Sequence[Result]]] = {}
    for cell, runs in results.items():
        norm, _, rate = cell.partition("-lr")
        if not rate or any(run["status"] != "done" for run in runs):
            continue
        loss = statistics.fmean(run["epochs"][-1]["train_loss"] for run in runs)
        if norm not in chosen or loss < chosen[norm][0]:
            chosen[norm] = (loss, runs)
    return {norm: chosen[norm][1] for norm in NORMS if norm in chosen}


def rate(runs: Sequence[Result]) -> float:
    """Return the learning rate of a cell's runs."""
    return runs[0]["config"]["optimizer.learning_rate"]


def loss_at(runs: Sequence[Result], step: int) -> float:
    """Return the mean over seeds of the training loss that step number `step` saw."""
    return statistics.fmean(run["steps"][step - 1][1] for run in runs)


def first_below(runs: Sequence[Result], loss: float) -> int | None:
    """Return the first step whose loss, averaged over seeds, is at most `loss`."""
    steps = range(1, min(len(run["steps"]) for run in runs) + 1)
    return next((step for step in steps if loss_at(runs, step) <= loss), None)


def _rows(chosen, stable):
    for norm, runs in chosen.items():
        last = [100 * run["epochs"][-1]["test_accuracy"] for run in runs]
        yield [
            NORMS[norm],
            f"{rate(runs):g}",
            f"{stable[norm]:g}",
            *(
                f"{loss_at(runs, step):.3f}"
                for step in (1, EARLY, 20, 100)
                if step <= len(runs[0]["steps"])
            ),
            mean_range([run["epochs"][-1]["train_loss"] for run in runs], "{:.4f}"),
            mean_range(last, "{:.1f}%"),
            str(len(runs)),
        ]


def _stable(results: Results) -> dict[str, float]:
    """Return by norm the largest rate of the sweep at which no run diverged and the loss fell."""
    largest: dict[str, float] = {}
    for cell, runs in results.items():
        norm, _, tried = cell.partition("-lr")
        if not tried:
            continue
        fell = all(
            r["status"] == "done" and r["epochs"][-1]["train_loss"] < r["steps"][0][1] for r in runs
        )
        if fell:
            largest[norm] = max(largest.get(norm, 0.0), float(tried))
    return {norm: largest.get(norm, math.nan) for norm in NORMS}


def _picture(results, draw, name, title, ceiling):
    curves = {
        NORMS[norm]: (norm, [[(step, loss) for step, loss in run["steps"]] for run in runs])
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
        "rate",
        "largest stable",
        "loss at 1",
        f"at {EARLY}",
        "at 20",
        "at 100",
        "last epoch",
        "test accuracy",
        "n",
    ]
    heads = [h for h in heads if h]
    lines = [
        _picture(results, draw, name, title, ceiling),
        "",
        *table(["", *heads], list(_rows(chosen, _stable(results)))),
    ]
    if "optimum" in results:
        optimum = results["optimum"][0]["figures"]["optimum"]
        lines += [
            "",
            f"The closed-form optimum has a training loss of {optimum['train_loss']:.4f}, a test loss of "
            f"{optimum['test_loss']:.4f} and a test accuracy of {100 * optimum['test_accuracy']:.1f}%.",
        ]
    return lines


def _judge_regression(results: Results, *, loss: str) -> list[Verdict]:
    chosen = best(results)
    at_one = results.get("deconv-lr1", ())
    claim = f"{loss}: with deconvolution at rate 1.0 about 5 iterations to a low cost"
    if "none" not in chosen or not at_one:
        return [Verdict(claim, "not run")]
    plain = chosen["none"]
    low, per_epoch = plain[0]["epochs"][0]["train_loss"], plain[0]["epochs"][0]["step"]
    steps = first_below(at_one, low)
    others = {
        rate(runs): step
        for cell, runs in results.items()
        if cell.startswith("deconv-lr") and all(run["status"] == "done" for run in runs)
        if (step := first_below(runs, low)) is not None
    }
    fastest = min(others, key=lambda r: others[r], default=None)
    better = (
        ""
        if fastest in (None, 1.0)
        else f" At rate {fastest:g} it is {others[fastest]} iterations."
    )
    return [
        Verdict(
            claim,
            "no" if steps is None else "yes" if steps <= 2 * EARLY else "in part",
            "~5 iterations",
            f"{steps} iterations" if steps else "never",
            f"{steps - EARLY:+d}" if steps else "",
            str(len(at_one)),
            f"Low is what plain SGD at its best rate has on average over its first {per_epoch} iterations, "
            f"{low:.3f}. After {EARLY} the loss is {loss_at(at_one, EARLY):.3f}, plain SGD's "
            f"{loss_at(plain, EARLY):.3f}.{better}",
        )
    ]


def _judge_limit(results: Results) -> list[Verdict]:
    """The paper does not give the scales of its pixels and its loss, on which the limit depends."""
    claim = "squared loss: plain SGD needs a rate of 0.02 to 0.1, or it diverges"
    if "optimum" not in results or "none" not in best(results):
        return [Verdict(claim, "not run")]
    limits = results["optimum"][0]["figures"]["largest_rates"]
    ours, theirs = limits["standardized, half squared"], limits["mean squared error"]
    return [
        Verdict(
            claim,
            "yes" if 0.02 <= theirs <= 0.2 else "no",
            "0.02-0.1",
            f"below {theirs:.2g}",
            "",
            str(len(best(results)["none"])),
            "By the largest eigenvalue of the Hessian, with PyTorch's mean squared error on pixels from 0 to "
            "1; the paper does not say what it had. In our units, half the squared distance on standardized "
            f"pixels, it is {ours:.2g}, and {_stable(results)['none']:g} is the largest of our sweep that "
            "did not diverge.",
        )
    ]


def _judge_one_step(results: Results) -> list[Verdict]:
    if "optimum" not in results:
        return []
    figures = results["optimum"][0]["figures"]
    above = {name: curve["loss_above_optimum"] for name, curve in figures["curves"].items()}
    exact = above["exact root"]
    left = {name: (gaps[1] / gaps[0], gaps[20] / gaps[0]) for name, gaps in above.items()}
    return [
        Verdict(
            "Section 3.3: one step at rate 1 solves least squares",
            "yes" if exact[1] < 1e-6 * exact[0] else "no",
            "exact",
            f"{max(exact[1] / exact[0], 1e-15):.0e} of the gap left, or less",
            "",
            "1",
            "On the whole training set with the exact root. With the paper's five iterations the first step "
            f"leaves {left['5 iterations'][0]:.1%} of the gap and twenty {left['5 iterations'][1]:.1%}; "
            f"without whitening {left['none'][0]:.0%} and {left['none'][1]:.0%}.",
        )
    ]


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


def _judge_mlp(results: Results) -> list[Verdict]:
    chosen = best(results)
    claim = "MLP: deconvolution trains better than batch norm"
    if not {"batch", "deconv"} <= set(chosen):
        return [Verdict(claim, "not run")]
    last = {n: [100 * r["epochs"][-1]["test_accuracy"] for r in runs] for n, runs in chosen.items()}
    loss = {
        n: statistics.fmean(r["epochs"][-1]["train_loss"] for r in runs)
        for n, runs in chosen.items()
    }
    better = statistics.fmean(last["deconv"]) > statistics.fmean(last["batch"])
    verdict = (
        ("yes" if better else "in part")
        if loss["deconv"] < loss["batch"]
        else ("in part" if better else "no")
    )
    gap = statistics.fmean(last["deconv"]) - statistics.fmean(last["batch"])
    return [
        Verdict(
            claim,
            verdict,
            "a picture",
            f"{statistics.fmean(last['deconv']):.2f}% against {statistics.fmean(last['batch']):.2f}%",
            f"{gap:+.2f}",
            str(len(chosen["deconv"])),
            f"Test accuracy after {len(chosen['batch'][0]['epochs'])} epochs, each at its best rate; "
            f"training loss of the last epoch {loss['deconv']:.3f} against {loss['batch']:.3f}, of iteration "
            f"20 {loss_at(chosen['deconv'], 20):.3f} against {loss_at(chosen['batch'], 20):.3f}.",
        ),
        *_judge_pixels(last),
    ]


def _judge_pixels(last: Mapping[str, Sequence[float]]) -> list[Verdict]:
    if "channel" not in last:
        return []
    full, channel = statistics.fmean(last["deconv"]), statistics.fmean(last["channel"])
    return [
        Verdict(
            "MLP: full deconvolution trains better than channel deconvolution",
            "yes" if full > channel else "no",
            "a picture",
            f"{full:.2f}% against {channel:.2f}%",
            f"{full - channel:+.2f}",
            str(len(last["deconv"])),
            "They differ in the first layer only: 784 pixels whitened together, from batches of 512, or "
            "standardized together.",
        )
    ]


FIGURE4A = Experiment(
    "figure4a",
    "one layer, least squares, Fashion-MNIST; and section 3.3, one step to the solution",
    (*_cells("fashion_mnist", "linear", SQUARED, loss="l2", **_ONE_LAYER), _OPTIMUM),
    lambda results: [
        *_judge_regression(results, loss="squared loss"),
        *_judge_limit(results),
        *_judge_one_step(results),
    ],
    _tell_a,
)
FIGURE4B = Experiment(
    "figure4b",
    "one layer, logistic loss, Fashion-MNIST",
    tuple(_cells("fashion_mnist", "linear", LOGISTIC, loss="cross_entropy", **_ONE_LAYER)),
    lambda results: _judge_regression(results, loss="logistic loss"),
    lambda results, draw: _tell(
        results, draw, name="figure4b", title="Logistic regression on Fashion-MNIST", ceiling=2.5
    ),
)
FIGURE4CD = Experiment(
    "figure4cd",
    "three hidden layers of 128 sigmoid units, MNIST",
    tuple(_cells("mnist", "mlp", MLP, epochs=3)),
    _judge_mlp,
    lambda results, draw: _tell(
        results, draw, name="figure4cd", title="A sigmoid MLP on MNIST", ceiling=2.5
    ),
)
