"""Accuracies on CIFAR-10, CIFAR-100 and ImageNet: the columns of the paper's tables.

The recipe is the original code's, see `configs/cifar10.py`, and so are the networks (`layout="original"`). A
column of one epoch is a run of one epoch, its learning rate brought to zero within it. Long, since what a
column runs, what it must show and how it is told all hang on the same figures, and nothing else uses them.
"""

import dataclasses
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from train.experiments import evidence
from train.experiments.cell import Cell, Experiment, Result, Results, Verdict
from train.experiments.published import (
    FINAL,
    FINAL_CIFAR100,
    FINAL_IMAGENET,
    PREPRINT,
    PREPRINT_CIFAR100,
    REPLICATED,
    REPLICATION,
)
from train.experiments.tables import counted, device, listed, mean_range, table

IN_PYTORCH = (
    Path(__file__).parents[2] / "benchmarks" / "results" / "torch_batch_norm.json"
)  # not one of our runs
NORMS = {"batch": "batch norm", "channel": "channel deconvolution", "deconv": "deconvolution"}
DATASETS = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "imagenet": "ImageNet"}
CLOSE = {
    1: 5.0,
    20: 0.5,
    90: 0.5,
    100: 0.5,
}  # percent: as near to a published figure of one run as one may hope, by epochs
# Of ResNet-18 of width 16 after 2 epochs, as the records of `ablation` have it; for runs of one epoch until
# these have seeds enough of their own.
ABLATION_NOISE = evidence.Noise(1.09, 14)
# Of how much seeds differ, by dataset and epochs.
LENDERS = {
    ("cifar10", 1): "the ablation below, of width 16 and 2 epochs",
    ("cifar10", 20): REPLICATION,
}
# Minutes of an epoch on two cores with batch norm and with deconvolution: by multiply-adds, from ResNet-18's;
# those with depthwise convolutions by a step, EfficientNet's by its runs; ImageNet's by multiply-adds.
MINUTES = {
    "resnet18": (8, 15),
    "preact_resnet18": (8.1, 15.1),
    "senet18": (8.2, 15.2),
    "vgg11": (15, 25),
    "vgg13": (17, 32),
    "efficientnet_b0": (6, 8),
    "vgg16": (20, 40),
    "resnext29_32x4d": (20.1, 25),
    "resnet50": (25, 35),
    "densenet121": (21, 45),
    "mobilenetv2": (14, 22),
    "dpn92": (50, 70),
    "pnasnet_a": (36, 60),
}
IMAGENET_MINUTES = {"resnet18": (660, 720), "densenet121": (1050, 1250), "vgg11": (2800, 3000)}


@dataclasses.dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
      name: of the experiment.
      title: of the table.
      published: accuracies by network, epochs and norm.
      epochs: of a run.
      dataset: by name.
      norms: that the table has.
      changes: what the table's recipe has in the place of the original code's.
    """

    name: str
    title: str
    published: Mapping[str, Mapping[int, Mapping[str, float]]]
    epochs: int
    dataset: str = "cifar10"
    norms: tuple[str, ...] = ("batch", "deconv")
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def after(self) -> str:
        """What it is of, `Table 1, CIFAR-10, 1 epoch`."""
        return f"{self.title}, {DATASETS[self.dataset]}, {counted(self.epochs, 'epoch')}"

    @property
    def lender(self) -> str | None:
        """Who tells how much seeds differ where the column has too few of its own."""
        return LENDERS.get((self.dataset, self.epochs))

    def cells(self) -> Iterable[Cell]:
        """Every network with every norm."""
        for network in self.published:
            for norm in self.norms:
                minutes = IMAGENET_MINUTES if self.dataset == "imagenet" else MINUTES
                yield Cell(
                    f"{network}-{norm}",
                    self.epochs * minutes[network][norm != "batch"],
                    f"configs/{self.dataset}.py:{network},{norm}",
                    {"epochs": self.epochs, "model.layout": "original", **self.changes},
                )

    def experiment(self, shows: str) -> Experiment:
        """Return it as an experiment that shows `shows`."""
        return Experiment(
            self.name,
            shows,
            tuple(self.cells()),
            lambda results: _judge(results, self),
            lambda results, draw: _tell(results, draw, self),
            seeds_last=self.epochs > 1,
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


def _judge(results: Results, column: Column) -> list[Verdict]:
    found = {network: _found(results, network) for network in column.published}
    every = [values for cells in found.values() for values in cells.values()]
    claims = {"batch": "deconvolution beats batch norm"}
    if "channel" in column.norms:
        claims["channel"] = "full deconvolution beats channel deconvolution"
    return [
        *(_beats(found, column, other, claim, every) for other, claim in claims.items()),
        _reached(found, column),
    ]


def _beats(
    found: Mapping[str, Mapping[str, list[float]]],
    column: Column,
    other: str,
    claim: str,
    every: Sequence[Sequence[float]],
) -> Verdict:
    """Judge deconvolution against another norm over all networks that have both."""
    claim, published, epochs = f"{column.after}: {claim}", column.published, column.epochs
    both = {n: cells for n, cells in found.items() if {other, "deconv"} <= set(cells)}
    all_theirs = [c[epochs]["deconv"] - c[epochs][other] for c in published.values()]
    if not both:
        return Verdict(claim, "not run", f"{statistics.fmean(all_theirs):+.1f} on average")
    noise = evidence.noise(every)
    borrowed = column.lender and (noise is None or noise.freedom < evidence.ENOUGH)
    lent = {n: _borrowed(n, epochs) if borrowed else None for n in both}
    said = {n: evidence.better(c["deconv"], c[other], lent[n] or noise) for n, c in both.items()}
    gains = {n: statistics.fmean(c["deconv"]) - statistics.fmean(c[other]) for n, c in both.items()}
    theirs = {n: published[n][epochs]["deconv"] - published[n][epochs][other] for n in both}
    gain, their = statistics.fmean(gains.values()), statistics.fmean(theirs.values())
    won = sum(holds == "yes" for holds in said.values())
    lost = [n for n, holds in said.items() if holds == "no"]
    open_ = [n for n, holds in said.items() if holds == "undecided"]
    if len(lost) > won:
        holds = "no"
    elif won:
        holds = "yes" if won == len(published) else "in part"
    else:
        holds = "undecided"
    return Verdict(
        claim,
        holds,
        f"{their:+.1f} on average",
        f"{gain:+.1f}, {won} of {counted(len(both), 'network')}",
        f"{gain - their:+.1f}",
        seed_counts({n: {k: c[k] for k in (other, "deconv")} for n, c in both.items()}),
        f"Of {len(published)} networks {len(both)} {'is' if len(both) == 1 else 'are'} run: "
        + ", ".join(f"{n} {gains[n]:+.1f} (published {theirs[n]:+.1f})" for n in both)
        + "."
        + (f" The other way round: {', '.join(lost)}." if lost else "")
        + (f" Chance may make as much of so few runs: {', '.join(open_)}." if open_ else "")
        + (f" How much seeds differ is taken from {column.lender}." if any(lent.values()) else "")
        + (" No condition has two seeds." if not any(lent.values()) and noise is None else ""),
    )


def _borrowed(network: str, epochs: int) -> evidence.Noise | None:
    if epochs == 1:
        return ABLATION_NOISE
    return evidence.of_ranges(REPLICATED.get(network, {}).values())


def _reached(found: Mapping[str, Mapping[str, list[float]]], column: Column) -> Verdict:
    """Judge whether the published accuracies themselves are reached; of one run each, so within a margin."""
    published, epochs, margin = column.published, column.epochs, CLOSE[column.epochs]
    claim = f"{column.after}: the published accuracies are reached"
    off = {
        f"{n} {NORMS[norm]}": statistics.fmean(values) - published[n][epochs][norm]
        for n, cells in found.items()
        for norm, values in cells.items()
        if norm in published[n][epochs]
    }
    if not off:
        return Verdict(claim, "not run", "one run each")
    short = {name: gap for name, gap in off.items() if gap < -margin}
    planned = sum(len(columns[epochs]) for columns in published.values())
    holds = (
        "no"
        if len(short) == len(off)
        else "yes"
        if not short and len(off) == planned
        else "in part"
    )
    return Verdict(
        claim,
        holds,
        "one run each",
        f"{sum(abs(gap) <= margin for gap in off.values())} of {len(off)} within {margin:g} points",
        f"{min(off.values()):+.1f} to {max(off.values()):+.1f}",
        seed_counts(found),
        f"{planned - len(off)} of {planned} are not run."
        + (
            f" Short of it: {', '.join(f'{n} {g:+.1f}' for n, g in short.items())}."
            if short
            else ""
        )
        + (
            " PyTorch misses ResNet-18's with batch norm too (below the table)."
            if column.name == "table1_epoch1" and "resnet18 batch norm" in short
            else ""
        ),
    )


def seed_counts(found: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """Return how many seeds stand behind each cell, as a number or a range."""
    counts = [len(values) for cells in found.values() for values in cells.values()]
    return str(counts[0]) if len(set(counts)) == 1 else f"{min(counts)} to {max(counts)}"


def _tell(results: Results, draw: Any, column: Column) -> list[str]:
    rows, dots, epochs = [], [], column.epochs
    replicated = REPLICATED if (column.dataset, epochs) == ("cifar10", 20) else {}
    for network, columns in column.published.items():
        found = _found(results, network)
        if not found:
            continue
        dot: dict[str, Any] = {"label": network}
        for norm, values in found.items():
            theirs = columns[epochs].get(norm)
            dot[norm] = {"ours": values, "published": theirs}
            again = replicated.get(network, {}).get(norm)
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
    title = f"{column.title}: {DATASETS[column.dataset]} after {counted(epochs, 'epoch')}"
    heads = ["", "", "ours", "published", "replicated", "difference", "n", "seconds a run"]
    if not replicated:
        heads, *rows = ([*row[:4], *row[5:]] for row in (heads, *rows))
    picture = draw.dots(column.name, dots, title=title, what="test accuracy, %")
    beside = _in_pytorch() if column.name == "table1_epoch1" else []
    return [picture, "", *table(heads, rows), *beside]


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
    devices = {device(run["device"]) for run in runs}
    seconds = statistics.median(run["seconds"] for run in runs)
    return f"{seconds:.0f}, {listed(devices)}"


THREE = ("batch", "channel", "deconv")
TABLE1 = {
    (dataset, epochs): Column(
        f"table1_epoch{epochs}" if dataset == "cifar10" else f"table1_{dataset}_epoch{epochs}",
        "Table 1",
        published,
        epochs,
        dataset,
    ).experiment(f"{DATASETS[dataset]}, {counted(epochs, 'epoch')}, ten networks")
    for dataset, published in (("cifar10", FINAL), ("cifar100", FINAL_CIFAR100))
    for epochs in (1, 20, 100)
}
IMAGENET = Column("table2", "Table 2", FINAL_IMAGENET, 90, "imagenet").experiment(
    "ImageNet, 90 epochs, three networks, for several accelerators"
)
PREPRINT20 = Column("preprint_table1", "Preprint table 1", PREPRINT, 20, norms=THREE).experiment(
    "CIFAR-10, 20 epochs, three networks and three norms"
)
PREPRINT100 = Column(
    "preprint_table1_cifar100",
    "Preprint table 1",
    PREPRINT_CIFAR100,
    100,
    "cifar100",
    THREE,
    {"batch_size": 256, "optimizer.weight_decay": 5e-3},
).experiment("CIFAR-100, 100 epochs, three networks and three norms")
