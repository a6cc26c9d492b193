"""The claims of figure 4 and section 3.3, judged."""

import statistics
from collections.abc import Mapping, Sequence

from train.experiments.cell import Results, Verdict
from train.experiments.sweeps import best, first_below, loss_at, rate, stable

EARLY = 5  # iterations


def regression(results: Results, *, loss: str) -> list[Verdict]:
    """Judge whether few iterations at rate 1.0 reach what plain SGD has after an epoch."""
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


def limit(results: Results) -> list[Verdict]:
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
            f"pixels, it is {ours:.2g}, and {stable(results)['none']:g} is the largest of our sweep that "
            "did not diverge.",
        )
    ]


def one_step(results: Results) -> list[Verdict]:
    """Judge section 3.3."""
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


def mlp(results: Results) -> list[Verdict]:
    """Judge figure 4(c, d)."""
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
        *_pixels(last),
    ]


def _pixels(last: Mapping[str, Sequence[float]]) -> list[Verdict]:
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
