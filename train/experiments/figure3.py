"""Figure 3: deconvolved images are sparse."""

from typing import Any

from train.experiments import images
from train.experiments.cell import Experiment, Results, Verdict
from train.experiments.measurement import (
    DATASETS,
    figures_of,
    measurement,
    on_each_dataset,
)
from train.experiments.tables import bars, counted, table


def _judge_sparsity(results: Results) -> list[Verdict]:
    found = {name: one["states"] for name, one in figures_of(results).items()}
    claim = "Figure 3: deconvolved inputs are much sparser"
    if not found:
        return [Verdict(claim, "not run", "a picture")]
    five = [s["5 iterations"]["kurtosis"] for s in found.values()]
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
            counted(len(found), "set"),
            f"Excess kurtosis of centred and of deconvolved pixels ({', '.join(names[n] for n in found)}), "
            "with fifteen iterations as in the stem of VGG; Hoyer's sparseness "
            f"{bars([b['hoyer'] for b, _ in pairs], '{:.2f}')} to "
            f"{bars([a['hoyer'] for _, a in pairs], '{:.2f}')}. Five iterations reach a kurtosis of "
            f"{bars(five, '{:.1f}')}.",
        )
    ]


def _tell_sparsity(results: Results, draw: Any) -> list[str]:
    names, found, lines = {**DATASETS, "photo": "one photo"}, figures_of(results), []
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
    (*on_each_dataset("sparsity"), measurement("photo", "inputs:photo", 0.5)),
    _judge_sparsity,
    _tell_sparsity,
)
