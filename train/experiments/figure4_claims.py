"""The claims of figure 4 and section 3.3, judged."""

import statistics
from collections.abc import Mapping, Sequence

from train.experiments import evidence
from train.experiments.cell import Result, Results, Verdict
from train.experiments.sweeps import best, first_below, loss_at, rate, stable

EARLY = 5  # iterations
_WINDOW = 10  # iterations whose mean is the loss at the end of an epoch


def regression(results: Results, *, loss: str) -> list[Verdict]:
    """Judge whether few iterations at rate 1.0 reach what plain SGD has after an epoch, and who is better."""
    return [_early(results, loss), _against_batch(results, loss)]


def _early(results: Results, loss: str) -> Verdict:
    chosen = best(results)
    at_one = results.get("deconv-lr1", ())
    claim = f"Figure 4, {loss}: with deconvolution at rate 1.0 about 5 iterations to a low cost"
    if "none" not in chosen or not at_one:
        return Verdict(claim, "not run", "~5 iterations")
    plain = chosen["none"]
    epoch = plain[0]["epochs"][0]["step"]
    low = statistics.fmean(
        loss_at(plain, step) for step in range(max(1, epoch - _WINDOW + 1), epoch + 1)
    )
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
        else f" At rate {fastest:g} it takes {others[fastest]} iterations."
    )
    return Verdict(
        claim,
        "yes"
        if steps and steps <= 2 * EARLY
        else "in part"
        if steps and steps <= 4 * EARLY
        else "no",
        "~5 iterations",
        f"{steps} iterations" if steps else "never",
        f"{steps - EARLY:+d}" if steps else "",
        str(len(at_one)),
        f"Low is what plain SGD at its best rate has at the end of an epoch, after {epoch} iterations, "
        f"{low:.3f}; up to {2 * EARLY} are about {EARLY}, up to {4 * EARLY} in part. After {EARLY} the loss "
        f"is {loss_at(at_one, EARLY):.3f}, plain SGD's {loss_at(plain, EARLY):.3f}.{better}",
    )


def _against_batch(results: Results, loss: str) -> Verdict:
    chosen = best(results)
    claim = f"Figure 4, {loss}: deconvolution is more effective than batch norm"
    if not {"batch", "deconv"} <= set(chosen):
        return Verdict(claim, "not run", "a picture")
    last = accuracies(chosen)
    ours, batch = last["deconv"], last["batch"]
    mine, theirs = losses(chosen, "deconv"), losses(chosen, "batch")
    return Verdict(
        claim,
        evidence.better(ours, batch, evidence.noise(last.values())),
        "a picture",
        f"{statistics.fmean(ours):.1f}% against {statistics.fmean(batch):.1f}%",
        f"{statistics.fmean(ours) - statistics.fmean(batch):+.1f}",
        str(len(ours)),
        f"Test accuracy after {len(chosen['batch'][0]['epochs'])} epochs, each at its best rate; training "
        f"loss of the last epoch {mine:.3f} against {theirs:.3f}.",
    )


def accuracies(chosen: Mapping[str, Sequence[Result]]) -> dict[str, list[float]]:
    """Return by norm the test accuracy of each seed at the end, in percent."""
    return {
        norm: [100 * run["epochs"][-1]["test_accuracy"] for run in runs]
        for norm, runs in chosen.items()
    }


def losses(chosen: Mapping[str, Sequence[Result]], norm: str) -> float:
    """Return the mean training loss of the last epoch."""
    return statistics.fmean(run["epochs"][-1]["train_loss"] for run in chosen[norm])


def limit(results: Results) -> list[Verdict]:
    """The paper does not give the scales of its pixels and its loss, on which the limit depends."""
    claim = "Section 4, squared loss: plain SGD needs a rate of 0.02 to 0.1, or it diverges"
    if "optimum" not in results or "none" not in best(results):
        return [Verdict(claim, "not run", "0.02-0.1")]
    limits = results["optimum"][0]["figures"]["largest_rates"]
    ours, theirs = limits["standardized, half squared"], limits["mean squared error"]
    return [
        Verdict(
            claim,
            "undecided",
            "0.02-0.1",
            f"below {theirs:.2g} or {ours:.2g}",
            "",
            "1",
            "The limit is that of the Hessian's largest eigenvalue, and the paper does not say in which "
            f"units: with PyTorch's mean squared error on pixels from 0 to 1 it is {theirs:.2g}, near its "
            f"figures; in ours, half the squared distance on standardized pixels, {ours:.2g}, and "
            f"{stable(results)['none']:g} is the largest rate of our sweep that did not diverge.",
        )
    ]


def one_step(results: Results) -> list[Verdict]:
    """Judge section 3.3."""
    if "optimum" not in results:
        return [Verdict("Section 3.3: one step at rate 1 solves least squares", "not run", "exact")]
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


def mlp(results: Results) -> list[Verdict]:
    """Judge figure 4(c, d)."""
    chosen = best(results)
    last = accuracies(chosen)
    noise = evidence.noise(last.values())
    claims = {
        "batch": "Figure 4, MLP: deconvolution trains better than batch norm",
        "channel": "Figure 4, MLP: full deconvolution trains better than channel deconvolution",
    }
    notes = {
        "batch": "",
        "channel": " They differ in the first layer only: 784 pixels whitened together, from batches of "
        "512, or standardized together.",
    }
    verdicts = []
    for norm, claim in claims.items():
        if not {norm, "deconv"} <= set(chosen):
            verdicts.append(Verdict(claim, "not run", "a picture"))
            continue
        ours, other = last["deconv"], last[norm]
        verdicts.append(
            Verdict(
                claim,
                evidence.better(ours, other, noise),
                "a picture",
                f"{statistics.fmean(ours):.2f}% against {statistics.fmean(other):.2f}%",
                f"{statistics.fmean(ours) - statistics.fmean(other):+.2f}",
                str(len(ours)),
                f"Test accuracy after {len(chosen[norm][0]['epochs'])} epochs, each at its best rate; "
                f"training loss of the last epoch {losses(chosen, 'deconv'):.3f} against "
                f"{losses(chosen, norm):.3f}, of iteration 20 {loss_at(chosen['deconv'], 20):.3f} against "
                f"{loss_at(chosen[norm], 20):.3f}.{notes[norm]}",
            )
        )
    return verdicts
