"""Figure 9 and the filters: sparse features, and what of it looks centre-surround."""

from typing import Any

from train.experiments import images
from train.experiments.cell import Cell, Experiment, Results, Verdict
from train.experiments.measurement import (
    DATASETS,
    figures_of,
    measurement,
    on_each_dataset,
)
from train.experiments.tables import counted, table

NETWORKS = ("cnn", "vgg11")  # one that two cores can train, and the paper's
_NEVER = "never published"
CHANCE = 1 / 18  # of a random normal 3x3 filter to be centre-surround


def _judge_features(results: Results) -> list[Verdict]:
    found = figures_of(results)
    claims = (
        "Figure 9: deconvolved features are sparser",
        "Ours: learnt filters of the first layer, D w, look centre-surround",
    )
    verdicts = []
    for network in NETWORKS:
        if network not in found:
            verdicts += [
                Verdict(f"{claims[0]} ({network})", "not run", "a picture"),
                Verdict(f"{claims[1]} ({network})", "not run", _NEVER, own=True),
            ]
            continue
        one = found[network]
        hidden = [layer for name, layer in one["layers"].items() if name != "conv1"]
        up = sum(layer["deconvolved"]["hoyer"] > layer["input"]["hoyer"] for layer in hidden)
        sharper = sum(
            layer["deconvolved"]["kurtosis"] > layer["input"]["kurtosis"] for layer in hidden
        )
        centred = sum(layer["deconvolved"]["hoyer"] > layer["centred"]["hoyer"] for layer in hidden)
        total = len(hidden)
        verdicts.append(
            Verdict(
                f"{claims[0]} ({network})",
                "yes" if up == sharper == total else "no" if up == sharper == 0 else "in part",
                "a picture",
                f"{sharper} of {total} layers by kurtosis, {up} by Hoyer",
                "",
                "1",
                "Against the output of the ReLU itself, which is full of exact zeros; against the centred "
                f"one Hoyer's sparseness rises in {centred} of {total}.",
            )
        )
        filters = one["filters"]
        applied, batch = filters["deconvolution: D w, end"], filters["batch norm: w, end"]
        start = filters["deconvolution: D w, start"]
        stands_out = applied["share"] > max(2 * CHANCE, batch["share"])
        verdicts.append(
            Verdict(
                f"{claims[1]} ({network})",
                "yes" if applied["share"] >= 0.5 else "in part" if stands_out else "no",
                _NEVER,
                f"{applied['share']:.0%} of {applied['count']} filters",
                "",
                "1",
                f"Batch norm's filters {batch['share']:.0%}, D w before training {start['share']:.0%}, "
                f"chance {CHANCE:.0%} (in brightness: centre the largest weight, surround of the "
                f"other sign). Rows of D itself: {one['whitener']['share']:.0%}.",
                own=True,
            )
        )
    return verdicts


def _tell_features(results: Results, draw: Any) -> list[str]:
    lines = []
    for network, one in figures_of(results).items():
        accuracy = {norm: f"{100 * value:.1f}%" for norm, value in one["test_accuracy"].items()}
        lines += [
            f"`{network}`, trained on CIFAR-10: batch norm {accuracy['batch']}, deconvolution "
            f"{accuracy['deconv']}.",
            "",
        ]
        pictures = {k: images.unpack(v) for k, v in one["pictures"].items()}
        title = f"Channels of the input of {one['layer']} and the same deconvolved, {network}"
        lines += [
            draw.images(f"figure9-{network}", pictures, title=title),
            "",
            f"Photo: {one['photo']}.",
            "",
        ]
        rows = [
            [
                name,
                *(
                    f"{layer[state][k]:.2f}"
                    for k in ("kurtosis", "hoyer")
                    for state in ("input", "centred", "deconvolved")
                ),
            ]
            for name, layer in one["layers"].items()
        ]
        heads = [
            "",
            "kurtosis: input",
            "centred",
            "deconvolved",
            "Hoyer: input",
            "centred",
            "deconvolved",
        ]
        lines += [*table(heads, rows), ""]
        rows = {
            f"D, channel {c}": planes
            for c, planes in zip("RGB", one["whitener"]["all"], strict=True)
        }
        rows |= {
            name.removesuffix(", end"): f["planes"]
            for name, f in one["filters"].items()
            if name.endswith("end")
        }
        lines += [
            draw.filters(
                f"filters-{network}",
                rows,
                title=f"Rows of D and filters of the first layer, twelve of each, {network}",
            ),
            "",
        ]
        shares = [
            [name, f"{f['share']:.0%}", f"{f['balance']:.2f}"] for name, f in one["filters"].items()
        ]
        shares.append(
            ["rows of D", f"{one['whitener']['share']:.0%}", f"{one['whitener']['balance']:.2f}"]
        )
        lines += [*table(["", "centre-surround", "median balance"], shares), ""]
    return lines or ["Not run."]


def _trained(network: str, layer: str, minutes: float, **changes: Any) -> Cell:
    return measurement(
        network, "features:measure", minutes, network=network, layer=layer, **changes
    )


FIGURE9 = Experiment(
    "figure9",
    "sparsity of deconvolved features, and filters, of trained networks",
    (_trained("cnn", "conv3", 20, width=0.5), _trained("vgg11", "conv5", 200)),
    _judge_features,
    _tell_features,
)


def _judge_rows(results: Results) -> list[Verdict]:
    found = figures_of(results)
    claim = "ICLR abstract: deconvolution filters of the first layer, the rows of D, are centre-surround"
    if not found:
        return [Verdict(claim, "not run", "in words")]
    rows = [row for one in found.values() for row in one["rows"].values()]
    share = sum(row["share"] for row in rows) / len(rows)
    balances = [one["rows"]["5x5, 5 iterations"]["balance"] for one in found.values()]
    return [
        Verdict(
            claim,
            "yes" if share > 0.9 else "in part" if share > 0.5 else "no",
            "in words",
            f"{share:.0%} of middle rows",
            "",
            counted(len(found), "dataset"),
            "Of each D the three rows that belong to the middle pixel, as they see their own channel; three "
            "kernel sizes and three roots. The surround cancels "
            + ", ".join(f"{b:.0%}" for b in balances)
            + f" of the centre ({', '.join(DATASETS[n] for n in found)}; 5x5, five iterations, median).",
        )
    ]


def _tell_rows(results: Results, draw: Any) -> list[str]:
    lines = []
    for name, one in figures_of(results).items():
        planes = {kind: row["planes"] for kind, row in one["rows"].items()}
        title = f"Rows of D for the middle pixel of R, G and B, {DATASETS[name]}"
        lines += [draw.filters(f"rows-{name}", planes, title=title, columns="RGB"), ""]
        rows = [
            [kind, f"{row['share']:.0%}", f"{row['balance']:.2f}"]
            for kind, row in one["rows"].items()
        ]
        lines += [*table([DATASETS[name], "centre-surround", "surround / centre"], rows), ""]
    return lines or ["Not run."]


ROWS = Experiment(
    "rows",
    "the rows of the first layer's D as filters",
    on_each_dataset("rows"),
    _judge_rows,
    _tell_rows,
)
