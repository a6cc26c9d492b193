r"""The paper, reproduced: every figure and table, one command each.

  python -m train.reproduce list
  python -m train.reproduce 'figure4*' --data_dir=DIR
  python -m train.reproduce all --budget=30m --device=gpu --data_dir=DIR
  python -m train.reproduce 'ablation/block*' --seed=3 --data_dir=DIR
  python -m train.reproduce report

NAME is an experiment, or one of its cells as experiment/cell; * and ? stand for anything. What is recorded
already is left out; what was stopped is resumed, but for measurements (figures 2, 3 and 9, `rows` and
`figure4a/optimum`), which begin anew; small cells come first. A budget takes the cells that fit and hands
what does not to the next command. `report` makes docs/reproduction.md and its pictures from the records
alone.

Exit status: 0; 143 and 130 after SIGTERM and Ctrl-C, with everything on disk: run the same command again; 1
if a dataset could not be read, whose cells were passed over, or a file not written; 2 for a mistake in the
command.
"""

import argparse
import math
import os
import re
import sys
from pathlib import Path

RESULTS, WORKDIR, PAGE = "benchmarks/results", "runs/reproduce", "docs/reproduction.md"
SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0}


def main(argv: list[str]) -> int:
    """Do what the command says; return the exit status."""
    arguments = _parser().parse_args(argv)
    # Here, after `--help`: what follows imports JAX.
    from train.experiments import EXPERIMENTS, results
    from train.experiments.cell import choose

    folder = Path(arguments.results)
    try:
        known = {name: results.read(folder, one) for name, one in EXPERIMENTS.items()}
        if [name.lower() for name in arguments.names] == ["list"]:
            return _list(EXPERIMENTS, known)
        if [name.lower() for name in arguments.names] == ["report"]:
            if not any(known.values()):
                raise ValueError(f"`--results` has no record: {folder}")
            from train.reproduction_page import write_page

            write_page(Path(PAGE), EXPERIMENTS, known)
            _say(f"{PAGE} is written")
            return 0
        runs = choose(arguments.names, EXPERIMENTS, arguments.seed)
        _use(arguments)
    except ValueError as error:
        print(f"reproduce: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"reproduce: {error}", file=sys.stderr)
        return 1
    recorded = [r for r in runs if results.path(folder, r).is_file()]
    _say(f"{len(recorded)} of {len(runs)} cells are recorded in {folder}")
    try:
        return _run(
            arguments, runs if arguments.again else [r for r in runs if r not in recorded], known
        )
    except OSError as error:
        print(f"reproduce: {error}", file=sys.stderr)
        return 1


def _use(arguments) -> None:
    """Choose the device and where what is compiled is kept."""
    import jax
    from absl import logging

    from train.experiments.runner import use_device

    logging.set_verbosity(logging.WARNING)
    use_device(arguments.device)
    if arguments.compilation_cache and not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        cache = str(Path(arguments.compilation_cache).expanduser())
        jax.config.update("jax_compilation_cache_dir", cache)


def _run(arguments, runs, known) -> int:
    from train.experiments.runner import Runner
    from train.stopping import Stopped

    records = [r for found in known.values() for one in found.values() for r in one]
    folder, workdir = Path(arguments.results), Path(arguments.workdir)
    runner = Runner(folder, workdir, arguments.data_dir, _say, records)
    try:
        folder.mkdir(parents=True, exist_ok=True)  # before hours are spent
        done = runner.run(runs, arguments.budget)
    except Stopped as stopped:
        _say("stopped; the same command goes on from there")
        return stopped.exit_status
    _say(f"{done} cells done, {len(runs) - done} left")
    for why in runner.passed_over:
        print(f"reproduce: {why}", file=sys.stderr)
    return 1 if runner.passed_over else 0


def _list(experiments, known) -> int:
    """Name every experiment: how many of its runs are recorded, and what the others take two CPU cores."""
    _say("runs done, and what those left take on two CPU cores")
    width = max(map(len, experiments))
    for name, one in experiments.items():
        runs = one.runs()
        have = {(cell, r["seed"]) for cell, rows in known[name].items() for r in rows}
        left = [run for run in runs if (run.cell.name, run.seed) not in have]
        minutes = sum(run.cell.minutes for run in left)
        done = f"{len(runs) - len(left):3}/{len(runs):<3}"
        _say(f"{name:{width}} {done} {_lasting(minutes):>10}   {one.shows}")
    return 0


def _lasting(minutes: float) -> str:
    """Return `90 min`, `30 h` or `12 days`; "" for none."""
    if minutes < 120:
        return f"{minutes:.0f} min" if minutes else ""
    return f"{minutes / 60:.0f} h" if minutes < 2880 else f"{minutes / 1440:.0f} days"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m train.reproduce",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("names", nargs="+", metavar="NAME", help="experiments or cells; all; list or report alone")
    add("--data_dir", default="", help="folder of prepared datasets or of <dataset>.npz files")
    add(
        "--budget",
        type=_seconds,
        default=math.inf,
        help="such as 90s, 30m or 2h; default: no limit",
    )
    add("--device", choices=("cpu", "gpu", "tpu"), help="default: JAX's choice")
    add("--seed", type=int, help="in place of the cells' seeds")
    add("--again", action="store_true", help="run what is recorded already, and replace it")
    add("--results", default=RESULTS, help=f"folder of the records, default {RESULTS}")
    add("--workdir", default=WORKDIR, help=f"folder of the checkpoints, default {WORKDIR}")
    add("--compilation_cache", default="~/.cache/netdeconv_jax", help="empty: none")
    return parser


def _seconds(text: str) -> float:
    """Return what a `--budget` means; argparse words the error.

    Example:
      >>> _seconds("1.5h")
      5400.0
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"must be a time such as 90s, 30m or 2h, got {text!r}")
    return float(match[1]) * SECONDS[match[2] or "s"]


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
