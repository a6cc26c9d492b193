r"""Train a network as a config says, or several norms side by side.

  python -m train.main --config=configs/digits.py:cnn,deconv --workdir=runs/x --config.epochs=3
  python -m train.main --config=configs/digits.py:cnn --compare=batch,deconv --seeds=0,1,2 \
      --workdir=runs/demo

`metrics.jsonl` below the workdir gets a line an epoch. A comparison ends with a table, a picture of the
curves and `comparison.json`, all figures. Ctrl-C leaves what was measured so far, and exit status 130; a bad
config ends with status 2, a loss that is not finite with status 1, each with one line.
"""

import sys
from pathlib import Path

from absl import app, flags, logging

from train import compare, data, loop, metrics
from train import config as configs

FLAGS = flags.FLAGS
flags.DEFINE_string("config", None, "File and config string: configs/digits.py:cnn,deconv.")
flags.DEFINE_string("workdir", None, "Folder for everything that a run writes.")
flags.DEFINE_list("compare", [], "Norms to train side by side, for that of the config string.")
flags.DEFINE_list("seeds", [], "Seeds of a comparison, for that of the config.")
flags.mark_flags_as_required(["config", "workdir"])


def main(argv: list[str]) -> int:
    """Train; return the exit status."""
    logging.set_verbosity(logging.WARNING)  # JAX tells of every backend that is not there
    # ---- What to train: every mistake of the user's is found here.
    try:
        overrides = configs.overrides(argv[1:])
        seeds = configs.seeds(FLAGS.seeds)
        if FLAGS.compare:
            source = FLAGS.config.partition(",")[0]
            chosen = {norm: configs.load(f"{source},{norm}", overrides) for norm in FLAGS.compare}
        elif seeds:
            raise ValueError("`--seeds` is for `--compare`; a single run takes `--config.seed`.")
        else:
            config = configs.load(FLAGS.config, overrides)
            chosen = {config.norm: config}
        config = next(iter(chosen.values()))
        dataset = data.load(config.dataset, config.data_dir)
        trainers = {norm: loop.Trainer(config, dataset) for norm, config in chosen.items()}
        workdir = Path(FLAGS.workdir)
        workdir.mkdir(parents=True, exist_ok=True)
    except (ValueError, TypeError, OSError) as error:
        print(f"train: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2

    # ---- Training, an epoch at a time.
    comparison = compare.Comparison(trainers, seeds or [config.seed])
    status = 0
    try:
        for trainer in trainers.values():
            seconds = trainer.compile()
            print(
                f"{trainer.config.network}, {trainer.config.norm}: compiled in {seconds:.1f} s",
                flush=True,
            )
        if FLAGS.compare:
            for line in compare.train(comparison, workdir):
                print(line, flush=True)
        else:
            log = metrics.JsonLines(workdir / "metrics.jsonl")
            for row in trainers[config.norm].run(config.seed):
                log.write(row)
                print(metrics.progress(row, config.epochs), flush=True)
            print(f"Metrics: {workdir / 'metrics.jsonl'}")
    except KeyboardInterrupt:
        print("\nInterrupted: what was measured until here stays.", file=sys.stderr)
        status = 130
    except loop.NonFiniteLossError as error:
        print(f"train: {error} A lower learning rate may help.", file=sys.stderr)
        status = 1

    # ---- What came of it.
    if comparison.epochs:
        print(compare.write(comparison, workdir))
    return status


def parse_flags(argv: list[str]) -> list[str]:
    """Parse absl's flags; leave `--config.x=y` for the config that it changes."""
    ours = [arg for arg in argv[1:] if configs.is_override(arg)]
    return FLAGS(argv[:1] + [arg for arg in argv[1:] if arg not in ours]) + ours


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
