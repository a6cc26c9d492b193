"""Figures 2, 3 and 9, and the claim that first-layer filters look centre-surround."""

from typing import Any

from train.experiments import images
from train.experiments.cell import Cell, Experiment, Results, Verdict
from train.experiments.tables import bars, table

DATASETS = {"cifar10": "CIFAR-10", "imagenet2012": "ImageNet photos"}
ROOTS = ("5 iterations", "15 iterations", "exact root")
CHANCE = 1 / 18  # of a random normal 3x3 filter to be centre-surround


def _measure(name: str, function: str, minutes: float, **changes: Any) -> Cell:
    return Cell(name, minutes, measure=f"train.experiments.{function}", changes=changes, seeds=(0,))


def _each(function: str) -> tuple[Cell, ...]:
    return tuple(_measure(name, f"inputs:{function}", 1, dataset=name) for name in DATASETS)


def _trained(network: str, layer: str, minutes: float, **changes: Any) -> Cell:
    return _measure(network, "features:measure", minutes, network=network, layer=layer, **changes)


def _figures(results: Results) -> dict[str, Any]:
    return {name: runs[0]["figures"] for name, runs in results.items()}


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")


# ---- Figure 2


def _judge_covariance(results: Results) -> list[Verdict]:
    found = {name: one["states"] for name, one in _figures(results).items()}
    claims = (
        "Figure 2: pixels of one channel correlate more than channels do",
        "Figure 2: whitening leaves no correlation",
    )
    if not found:
        return [Verdict(claim, "not run") for claim in claims]
    before = [states["before"] for states in found.values()]
    holds = [s["pixels"] > s["across"] for s in before]
    names = ", ".join(DATASETS[name] for name in found)
    five = [s["5 iterations"] for s in found.values()]
    far = max(s["correlation"] for s in five)
    return [
        Verdict(
            claims[0],
            "yes" if all(holds) else "in part" if any(holds) else "no",
            "a picture",
            ", ".join(f"{s['pixels']:.2f} against {s['across']:.2f}" for s in before),
            "",
            _count(len(found), "dataset"),
            f"Mean absolute correlation within the diagonal blocks and in the others ({names}). Two channels "
            f"of one pixel correlate by {bars([s['channels'] for s in before], '{:.2f}')}.",
        ),
        Verdict(
            claims[1],
            "yes" if far < 0.02 else "in part",
            "a picture",
            ", ".join(
                f"{a['correlation']:.2f} to {b['correlation']:.3f}"
                for a, b in zip(before, five, strict=True)
            ),
            "",
            _count(len(found), "dataset"),
            "Mean absolute correlation before and after five iterations. They shrink the covariance's "
            f"condition from {bars([s['condition'] for s in before], '{:.0f}')} to "
            f"{bars([s['condition'] for s in five], '{:.0f}')}; the exact root takes it to 1.",
        ),
    ]


def _tell_covariance(results: Results, draw: Any) -> list[str]:
    lines, rows = [], []
    for name, one in _figures(results).items():
        states = one["states"]
        matrices = {"covariance of 3x3 patches": states["before"]["covariance"]} | {
            f"after: {root}": states[root]["covariance"] for root in ROOTS
        }
        title = f"Covariance of the first layer's patches before and after, {DATASETS[name]}"
        lines += [draw.matrices(f"figure2-{name}", matrices, block=9, title=title), ""]
        for state, row in states.items():
            figures = [f"{row[k]:.3f}" for k in ("pixels", "channels", "across")]
            rows.append(
                [DATASETS[name], state, *figures, f"{row['condition']:.3g}", f"{one['images']:,}"]
            )
    if not rows:
        return ["Not run."]
    heads = [
        "",
        "",
        "pixels of a channel",
        "channels of a pixel",
        "all across channels",
        "condition",
        "images",
    ]
    return [
        *lines,
        "Mean absolute correlations, and the condition of the covariance:",
        "",
        *table(heads, rows),
    ]


FIGURE2 = Experiment(
    "figure2",
    "the 27x27 covariance of the first layer, before and after",
    _each("covariance"),
    _judge_covariance,
    _tell_covariance,
)


# ---- Figure 3


def _judge_sparsity(results: Results) -> list[Verdict]:
    found = {name: one["states"] for name, one in _figures(results).items()}
    claim = "Figure 3: deconvolved inputs are much sparser"
    if not found:
        return [Verdict(claim, "not run")]
    pairs = [(s["centred"], s["15 iterations"]) for s in found.values()]
    holds = [
        after["kurtosis"] > before["kurtosis"] + 1 and after["hoyer"] > before["hoyer"]
        for before, after in pairs
    ]
    names = {**DATASETS, "photo": "one photo"}
    return [
        Verdict(
            claim,
            "yes" if all(holds) else "in part" if any(holds) else "no",
            "a picture",
            ", ".join(f"{b['kurtosis']:.1f} to {a['kurtosis']:.1f}" for b, a in pairs),
            "",
            _count(len(found), "set"),
            f"Excess kurtosis of centred and of deconvolved pixels ({', '.join(names[n] for n in found)}); "
            f"Hoyer's sparseness {bars([b['hoyer'] for b, _ in pairs], '{:.2f}')} to "
            f"{bars([a['hoyer'] for _, a in pairs], '{:.2f}')}.",
        )
    ]


def _tell_sparsity(results: Results, draw: Any) -> list[str]:
    names, found, lines = {**DATASETS, "photo": "one photo"}, _figures(results), []
    if not found:
        return ["Not run."]
    if "photo" in found:
        pictures = {k: images.unpack(v) for k, v in found["photo"]["pictures"].items()}
        lines += [draw.images("figure3", pictures, title="A photo, centred and deconvolved"), ""]
        lines += [
            f"Photo: {found['photo']['photo']}; fifteen iterations, as in the stem of VGG.",
            "",
        ]
    panels = {
        names[name]: {
            state: (one["states"][state]["density"], one["states"][state]["edges"])
            for state in ("centred", "15 iterations")
        }
        for name, one in found.items()
    }
    lines += [
        draw.densities(
            "figure3-densities", panels, title="Densities of centred and deconvolved pixels"
        ),
        "",
    ]
    rows = [
        [names[name], state, f"{row['kurtosis']:.2f}", f"{row['hoyer']:.3f}"]
        for name, one in found.items()
        for state, row in one["states"].items()
    ]
    return [*lines, *table(["", "", "excess kurtosis", "Hoyer's sparseness"], rows)]


FIGURE3 = Experiment(
    "figure3",
    "sparsity of deconvolved images",
    (*_each("sparsity"), _measure("photo", "inputs:photo", 0.5)),
    _judge_sparsity,
    _tell_sparsity,
)


# ---- Figure 9 and the filters


def _judge_features(results: Results) -> list[Verdict]:
    found = _figures(results)
    claims = (
        "Figure 9: deconvolved features are sparser",
        "Later abstract: first-layer filters D w look centre-surround",
    )
    if not found:
        return [Verdict(claim, "not run") for claim in claims]
    verdicts = []
    for network, one in found.items():
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
                "in words",
                f"{applied['share']:.0%} of {applied['count']} filters",
                "",
                "1",
                f"Batch norm's filters {batch['share']:.0%}, D w before training {start['share']:.0%}, "
                f"chance {CHANCE:.0%} (in brightness: centre the largest weight, surround of the "
                f"other sign). Rows of D itself: {one['whitener']['share']:.0%}.",
            )
        )
    return verdicts


def _tell_features(results: Results, draw: Any) -> list[str]:
    lines = []
    for network, one in _figures(results).items():
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
                f"filters-{network}", rows, title=f"Rows of D and first-layer filters, {network}"
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


FIGURE9 = Experiment(
    "figure9",
    "sparsity of deconvolved features, and filters, of trained networks",
    (_trained("cnn", "conv3", 20, width=0.5), _trained("vgg11", "conv5", 200)),
    _judge_features,
    _tell_features,
)


def _judge_rows(results: Results) -> list[Verdict]:
    found = _figures(results)
    claim = "Rows of D are centre-surround filters"
    if not found:
        return [Verdict(claim, "not run")]
    rows = [row for one in found.values() for row in one["rows"].values()]
    share = sum(row["share"] for row in rows) / len(rows)
    balances = [one["rows"]["5x5, 5 iterations"]["balance"] for one in found.values()]
    return [
        Verdict(
            claim,
            "yes" if share > 0.9 else "in part" if share > 0.5 else "no",
            "in words",
            f"{share:.0%} of rows",
            "",
            _count(len(found), "dataset"),
            "The surround cancels "
            + ", ".join(f"{b:.0%}" for b in balances)
            + f" of the centre ({', '.join(DATASETS[n] for n in found)}; 5x5, five iterations, median).",
        )
    ]


def _tell_rows(results: Results, draw: Any) -> list[str]:
    lines = []
    for name, one in _figures(results).items():
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
    _each("rows"),
    _judge_rows,
    _tell_rows,
)
