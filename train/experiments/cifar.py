"""Accuracies on CIFAR-10: the columns of Table 1.

The recipe is the original code's, see `configs/cifar10.py`, and so are the networks (`layout="original"`). A
column of one epoch is a run of one epoch, its learning rate brought to zero within it.
"""

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from train.experiments.cell import Cell, Experiment, Result, Results, Verdict
from train.experiments.published import FINAL, PREPRINT, REPLICATED
from train.experiments.tables import mean_range, table

IN_PYTORCH = (
    Path(__file__).parents[2] / "benchmarks" / "results" / "torch_batch_norm.json"
)  # not one of our runs
NORMS = {"batch": "batch norm", "channel": "channel deconvolution", "deconv": "deconvolution"}
CLOSE = {
    1: 5.0,
    20: 0.5,
}  # percent: as near to a published figure of one run as one may hope, by epochs
# Minutes of an epoch on two cores with batch norm and with deconvolution: by multiply-adds, from ResNet-18's;
# those with depthwise convolutions by a step, EfficientNet's by its runs.
MINUTES = {
    "resnet18": (8, 15),
    "preact_resnet18": (8.1, 15.1),
    "senet18": (8.2, 15.2),
    "vgg11": (15, 25),
    "efficientnet_b0": (6, 8),
    "vgg16": (20, 40),
    "resnext29_32x4d": (20.1, 25),
    "resnet50": (25, 35),
    "densenet121": (21, 45),
    "mobilenetv2": (14, 22),
    "dpn92": (50, 70),
    "pnasnet_a": (36, 60),
}


def _cells(published: Mapping[str, Any], epochs: int, norms: Sequence[str]) -> Iterable[Cell]:
    for network in published:
        for norm in norms:
            yield Cell(
                f"{network}-{norm}",
                epochs * MINUTES[network][norm != "batch"],
                f"configs/cifar10.py:{network},{norm}",
                {"epochs": epochs, "model.layout": "original"},
            )


def accuracies(runs: Sequence[Result], epoch: int = 0) -> list[float]:
    """Return the test accuracy of each seed after an epoch, in percent; what diverged is left out.

    Args:
      runs: records.
      epoch: from 1; 0 is the last one.
    """
    done = [run["epochs"] for run in runs if run["status"] == "done"]
    return [100 * epochs[epoch - 1]["test_accuracy"] for epochs in done]


def _found(results: Results, network: str) -> dict[str, list[float]]:
    cells = {norm: accuracies(results.get(f"{network}-{norm}", ())) for norm in NORMS}
    return {norm: values for norm, values in cells.items() if values}


def _judge(
    results: Results, *, published: Mapping[str, Any], epochs: int, name: str
) -> list[Verdict]:
    found = {network: _found(results, network) for network in published}
    both = {n: cells for n, cells in found.items() if {"batch", "deconv"} <= set(cells)}
    claim = (
        f"{name}, {epochs} {'epoch' if epochs == 1 else 'epochs'}: deconvolution beats batch norm"
    )
    if not both:
        return [Verdict(claim, "not run")]
    gains = {
        n: statistics.fmean(c["deconv"]) - statistics.fmean(c["batch"]) for n, c in both.items()
    }
    theirs = [published[n][epochs]["deconv"] - published[n][epochs]["batch"] for n in both]
    won = sum(gain > 0 for gain in gains.values())
    lost = ", ".join(n for n, gain in gains.items() if gain <= 0)
    gain, their = statistics.fmean(gains.values()), statistics.fmean(theirs)
    seeds = seed_counts(both)
    verdicts = [
        Verdict(
            claim,
            "yes" if won == len(both) else "no" if won == 0 else "in part",
            f"{their:+.1f} on average",
            f"{gain:+.1f}, {won} of {len(both)} networks",
            f"{gain - their:+.1f}",
            seeds,
            f"Of {len(published)} networks {len(both)} are run."
            + (f" Not in {lost}." if lost else ""),
        )
    ]
    channel = {n: c for n, c in both.items() if "channel" in c}
    if channel:
        between = [
            n
            for n, c in channel.items()
            if statistics.fmean(c["channel"]) < statistics.fmean(c["deconv"])
        ]
        verdicts.append(
            Verdict(
                f"{name}: full deconvolution beats channel deconvolution",
                "yes" if len(between) == len(channel) else "no" if not between else "in part",
                "3 of 3 networks",
                f"{len(between)} of {len(channel)}",
                "",
                seed_counts(channel),
            )
        )
    off = [
        statistics.fmean(values) - published[n][epochs][norm]
        for n, cells in found.items()
        for norm, values in cells.items()
        if norm in published[n][epochs]
    ]
    near = sum(abs(value) <= CLOSE[epochs] for value in off)
    verdicts.append(
        Verdict(
            f"{name}, {epochs} {'epoch' if epochs == 1 else 'epochs'}: the published accuracies are reached",
            "yes"
            if min(off) > -CLOSE[epochs]
            else "no"
            if max(off) < -CLOSE[epochs]
            else "in part",
            "one run each",
            f"{near} of {len(off)} within {CLOSE[epochs]:g} points",
            f"{min(off):+.1f} to {max(off):+.1f}",
            seeds,
            f"{sum(value > CLOSE[epochs] for value in off)} are better by more than that.",
        )
    )
    return verdicts


def seed_counts(found: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """Return how many seeds stand behind each cell, as a number or a range."""
    counts = [len(values) for cells in found.values() for values in cells.values()]
    return str(counts[0]) if len(set(counts)) == 1 else f"{min(counts)} to {max(counts)}"


def _tell(
    results: Results, draw: Any, *, published: Mapping[str, Any], epochs: int, name: str
) -> list[str]:
    rows, dots = [], []
    for network, columns in published.items():
        found = _found(results, network)
        if not found:
            continue
        dot: dict[str, Any] = {"label": network}
        for norm, values in found.items():
            theirs = columns[epochs].get(norm)
            dot[norm] = {"ours": values, "published": theirs}
            again = REPLICATED.get(network, {}).get(norm) if epochs == 20 else None
            rows.append(
                [
                    network,
                    NORMS[norm],
                    mean_range(values, "{:.2f}"),
                    "" if theirs is None else f"{theirs:.2f}",
                    f"{again[0]:.1f} to {again[1]:.1f}" if again else "",
                    "" if theirs is None else f"{statistics.fmean(values) - theirs:+.2f}",
                    str(len(values)),
                    cost(results[f"{network}-{norm}"]),
                ]
            )
        dots.append(dot)
    if not rows:
        return ["Not run."]
    title = f"{name}: CIFAR-10 after {epochs} {'epoch' if epochs == 1 else 'epochs'}"
    heads = ["", "", "ours", "published", "replicated", "difference", "n", "seconds a run"]
    picture = draw.dots(
        name.lower().replace(" ", "_") + f"_{epochs}", dots, title=title, what="test accuracy, %"
    )
    return [picture, "", *table(heads, rows), *(_in_pytorch() if epochs == 1 else [])]


def _in_pytorch() -> list[str]:
    """What PyTorch has by the same recipe: a published batch norm that we miss may be missed there too."""
    if not IN_PYTORCH.exists():
        return []
    told = [
        f"{100 * run['epochs'][-1]['test_accuracy']:.2f} (width {run['width']}, "
        f"{len(run['epochs'])} {'epoch' if len(run['epochs']) == 1 else 'epochs'}, seed {run['seed']})"
        for run in json.loads(IN_PYTORCH.read_text())
    ]
    return [
        "",
        "ResNet-18 with batch norm in PyTorch, by the same recipe (`benchmarks/torch_batch_norm.py`), to be "
        f"compared with the published figures as well: {', '.join(told)}. Those of width 16 belong beside "
        "`batch` of the ablation.",
    ]


def cost(runs: Sequence[Result]) -> str:
    """Return the median seconds of a run, and on what."""
    devices = {run["device"] for run in runs}
    seconds = statistics.median(run["seconds"] for run in runs)
    return f"{seconds:.0f} ({', '.join(sorted(devices))})"


def _column(
    name: str, shows: str, published: Any, epochs: int, norms: Sequence[str], title: str
) -> Experiment:
    settings = {"published": published, "epochs": epochs, "name": title}
    return Experiment(
        name,
        shows,
        tuple(_cells(published, epochs, norms)),
        lambda results: _judge(results, **settings),
        lambda results, draw: _tell(results, draw, **settings),
        seeds_last=epochs > 1,
    )


EPOCH1 = _column(
    "table1_epoch1", "CIFAR-10, 1 epoch, ten networks", FINAL, 1, ("batch", "deconv"), "Table 1"
)
EPOCH20 = _column(
    "table1_epoch20", "CIFAR-10, 20 epochs, ten networks", FINAL, 20, ("batch", "deconv"), "Table 1"
)
PREPRINT20 = _column(
    "preprint_table1",
    "CIFAR-10, 20 epochs, three networks and three norms",
    PREPRINT,
    20,
    ("batch", "channel", "deconv"),
    "Preprint table 1",
)
