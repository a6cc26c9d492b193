"""Figure 8(a): weight decay with and without deconvolution, on CIFAR-10; the paper has CIFAR-100."""

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from train.experiments import evidence
from train.experiments.cell import Cell, Experiment, Results, Verdict
from train.experiments.columns import NORMS, accuracies, seed_counts
from train.experiments.tables import mean_range, table

DECAYS = (5e-4, 1e-3, 2e-3, 5e-3)
NETWORKS = ("lenet", "vgg13")  # one that two cores can train, and the paper's


def _decay_cells(
    network: str, decays: Sequence[float], epochs: int, minutes: tuple[float, float]
) -> Iterable[Cell]:
    for norm in ("batch", "deconv"):
        for decay in decays:
            yield Cell(
                f"{network}-{norm}-wd{decay:g}",
                epochs * minutes[norm == "deconv"],
                f"configs/cifar10.py:{network},{norm}",
                {"epochs": epochs, "optimizer.weight_decay": decay},
            )


def _decays(results: Results, network: str) -> dict[str, dict[float, list[float]]]:
    found: dict[str, dict[float, list[float]]] = {"batch": {}, "deconv": {}}
    for cell, runs in results.items():
        head, _, decay = cell.partition("-wd")
        name, _, norm = head.rpartition("-")
        if name == network and accuracies(runs):
            found[norm][float(decay)] = accuracies(runs)
    return {norm: dict(sorted(cells.items())) for norm, cells in found.items()}


def _judge_decay(results: Results) -> list[Verdict]:
    verdicts = []
    for network in NETWORKS:
        found = _decays(results, network)
        claim = f"Figure 8(a): weight decay 1e-3 to 5e-3 helps deconvolution and hurts batch norm ({network})"
        if any(not {1e-3, 5e-3} <= set(cells) for cells in found.values()):
            verdicts.append(Verdict(claim, "not run", "a picture"))
            continue
        noise = evidence.noise(values for cells in found.values() for values in cells.values())
        change = {
            n: statistics.fmean(c[5e-3]) - statistics.fmean(c[1e-3]) for n, c in found.items()
        }
        counts = {n: evidence.least(noise, len(c[5e-3]), len(c[1e-3])) for n, c in found.items()}
        right = (change["deconv"] > counts["deconv"]) + (change["batch"] < -counts["batch"])
        wrong = (change["deconv"] < -counts["deconv"]) + (change["batch"] > counts["batch"])
        clear, lengths = right + wrong == 2, (len(found["batch"][5e-3]), len(found["batch"][1e-3]))
        verdicts.append(
            Verdict(
                claim,
                ("no", "in part", "yes")[right] if clear else "undecided",
                "a picture",
                f"deconvolution {change['deconv']:+.2f}, batch norm {change['batch']:+.2f}",
                "",
                seed_counts({n: {str(d): v for d, v in c.items()} for n, c in found.items()}),
                ("" if clear else f"{evidence.unsure(noise, *lengths)} ")
                + "Change of the test accuracy in points, CIFAR-10. The paper has VGG-13 on CIFAR-100.",
            )
        )
    return verdicts


def _tell_decay(results: Results, draw: Any) -> list[str]:
    lines = []
    for network in NETWORKS:
        found = _decays(results, network)
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
        title = f"Test accuracy by weight decay, {network}"
        lines += [draw.dots(f"figure8a_{network}", dots, title=title, what="test accuracy, %"), ""]
        lines += [*table([f"weight decay, {network}", *(NORMS[n] for n in found), "n"], rows), ""]
    return lines or ["Not run."]


FIGURE8A = Experiment(
    "figure8a",
    "weight decay with and without deconvolution: LeNet, 10 epochs, and VGG-13, 20 epochs, on CIFAR-10",
    (
        *_decay_cells("lenet", DECAYS, 10, (0.2, 0.6)),
        *_decay_cells("vgg13", (1e-3, 5e-3), 20, (18, 30)),
    ),
    _judge_decay,
    _tell_decay,
    seeds_last=True,
)
