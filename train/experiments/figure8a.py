"""Figure 8(a): weight decay with and without deconvolution."""

import statistics
from collections.abc import Sequence
from typing import Any

from train.experiments.cell import Cell, Experiment, Results, Verdict
from train.experiments.cifar import NORMS, accuracies, seed_counts
from train.experiments.tables import mean_range, table

DECAYS = (5e-4, 1e-3, 2e-3, 5e-3)


def _decay_cells(
    prefix: str, network: str, decays: Sequence[float], minutes: tuple[float, float], **changes: Any
):
    for norm in ("batch", "deconv"):
        for decay in decays:
            changes = {**changes, "optimizer.weight_decay": decay}
            yield Cell(
                f"{prefix}-{norm}-wd{decay:g}",
                changes["epochs"] * minutes[norm == "deconv"],
                f"configs/cifar10.py:{network},{norm}",
                changes,
            )


def _decays(results: Results, prefix: str) -> dict[str, dict[float, list[float]]]:
    found: dict[str, dict[float, list[float]]] = {"batch": {}, "deconv": {}}
    for cell, runs in results.items():
        head, _, decay = cell.partition("-wd")
        name, _, norm = head.rpartition("-")
        if name == prefix and accuracies(runs):
            found[norm][float(decay)] = accuracies(runs)
    return {norm: dict(sorted(cells.items())) for norm, cells in found.items()}


def _judge_decay(results: Results) -> list[Verdict]:
    verdicts = []
    for prefix in ("small", "vgg13"):
        found = _decays(results, prefix)
        claim = f"Figure 8a: weight decay 1e-3 to 5e-3 helps deconvolution and hurts batch norm ({prefix})"
        if any(not {1e-3, 5e-3} <= set(cells) for cells in found.values()):
            verdicts.append(Verdict(claim, "not run"))
            continue
        change = {
            n: statistics.fmean(c[5e-3]) - statistics.fmean(c[1e-3]) for n, c in found.items()
        }
        right = (change["deconv"] > 0) + (change["batch"] < 0)
        verdicts.append(
            Verdict(
                claim,
                ("no", "in part", "yes")[right],
                "a picture",
                f"{change['deconv']:+.2f} and {change['batch']:+.2f}",
                "",
                seed_counts({n: {str(d): v for d, v in c.items()} for n, c in found.items()}),
                "Change of the test accuracy in points. The paper has 100 epochs of VGG-13 on CIFAR-100.",
            )
        )
    return verdicts


def _tell_decay(results: Results, draw: Any) -> list[str]:
    lines = []
    for prefix in ("small", "vgg13"):
        found = _decays(results, prefix)
        decays = sorted({decay for cells in found.values() for decay in cells})
        if not decays:
            continue
        dots = [
            {"label": f"{decay:g}"}
            | {norm: {"ours": cells[decay]} for norm, cells in found.items() if decay in cells}
            for decay in decays
        ]
        rows = [
            [
                f"{decay:g}",
                *(
                    mean_range(cells[decay], "{:.2f}") if decay in cells else ""
                    for cells in found.values()
                ),
                str(max(len(cells.get(decay, ())) for cells in found.values())),
            ]
            for decay in decays
        ]
        title = f"Test accuracy by weight decay, {prefix}"
        lines += [draw.dots(f"figure8a_{prefix}", dots, title=title, what="test accuracy, %"), ""]
        lines += [*table([f"weight decay, {prefix}", *(NORMS[n] for n in found), "n"], rows), ""]
    return lines or ["Not run."]


FIGURE8A = Experiment(
    "figure8a",
    "weight decay with and without deconvolution: ResNet-18 of width 16, 5 epochs; VGG-13, 20 epochs",
    (
        *_decay_cells("small", "resnet18", DECAYS, (1.5, 3), **{"epochs": 5, "model.width": 0.25}),
        *_decay_cells("vgg13", "vgg13", (1e-3, 5e-3), (18, 30), **{"epochs": 20}),
    ),
    _judge_decay,
    _tell_decay,
    seeds_last=True,
)
