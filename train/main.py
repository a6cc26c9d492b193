r"""Train a network as a config says, or several norms side by side.

  python -m train.main --config=configs/fashion_mnist.py:lenet,deconv --workdir=runs/x --config.epochs=3
  python -m train.main --config=configs/digits.py:cnn --compare=batch,deconv --seeds=0,1,2 \
      --workdir=runs/demo

The same command resumes what is in the workdir. What a run leaves there: train/workdir.py. A comparison ends
with a table, a picture of the curves and `comparison.json`, and starts anew each time.

Exit status: 0 when all is done; 143 after SIGTERM and 130 after Ctrl-C, with everything on disk: run the
same command again; 1 for a loss that is not finite, for data that cannot be read once training has begun, and
for results that cannot be written; 2 for a mistake in the command, its config or its data. Each comes with
one line that says what happened.
"""

import contextlib
import dataclasses
import logging as std_logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from absl import app, flags, logging

from train import cluster, compare, data, loop, stopping
from train import config as configs
from train.data.prepared import expanded
from train.workdir import Workdir

FLAGS = flags.FLAGS
flags.DEFINE_string("config", None, "File and config string: configs/digits.py:cnn,deconv.")
flags.DEFINE_string("workdir", None, "Folder for everything that a run writes.")
flags.DEFINE_list("compare", [], "Norms to train side by side, for that of the config string.")
flags.DEFINE_list("seeds", [], "Seeds of a comparison, for that of the config.")
flags.DEFINE_string("coordinator", None, "host:port of process 0, where no scheduler tells it.")
flags.DEFINE_integer("num_processes", None, "Number of processes, with --coordinator.")
flags.DEFINE_integer("process_id", None, "Which of them this one is, with --coordinator.")
flags.DEFINE_string(
    "compilation_cache", "~/.cache/netdeconv_jax", "Folder of compiled programs; empty: none."
)
flags.mark_flags_as_required(["config", "workdir"])


def main(argv: list[str]) -> int:
    """Train; return the exit status."""
    started = time.monotonic()
    logging.set_verbosity(logging.WARNING)  # JAX tells of every backend that is not there
    # Of a checkpoint that could not be written, which we have told, Orbax leaves tasks that nobody awaits.
    std_logging.getLogger("asyncio").setLevel(std_logging.CRITICAL)
    if not FLAGS.compare:
        # Nothing is to be saved before training begins, and a compiler that Python interrupts crashes.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        cluster.connect(FLAGS.coordinator, FLAGS.num_processes, FLAGS.process_id)
    except (ValueError, OSError) as error:
        return _complain(error, 2)
    try:
        # ---- What to train: every mistake of the user's is found here.
        work = cluster.together(
            lambda: _prepare(argv, started),
            foreseen=(ValueError, TypeError, OSError, ModuleNotFoundError),
            status=lambda error: 2,
            facts=_Work.facts,
        )
        # ---- Training.
        try:
            if work.output is None:
                return _compare(compare.Comparison(work.trainers, work.seeds), work.folder)
            (trainer,) = work.trainers.values()
            return _train(trainer, work.output, work.stop)
        finally:
            work.examples.close()
    except cluster.AgreedError as error:
        return _complain(error, error.status)
    except (data.DataError, OSError) as error:  # of what lies on disk
        return _leave(_complain(error, 1))
    except Exception as error:
        if jax.process_count() == 1:
            raise
        traceback.print_exc()
        if isinstance(error, jax.errors.JaxRuntimeError):
            error = f"{cluster.first_line(error)} - if another process has ended, it says why."
        return _leave(_complain(error, 1))


@dataclasses.dataclass
class _Work:
    """What is to be done. `output` is None for a comparison."""

    examples: data.Input
    trainers: dict[str, loop.Trainer]
    seeds: Sequence[int]
    folder: Path
    stop: stopping.Stop
    output: Workdir | None

    def facts(self) -> dict[str, Any]:
        """Return what all processes must have been given alike; where the data lie is each one's own."""
        trainer = next(iter(self.trainers.values()))  # the only one: a comparison has one process
        config = {k: v for k, v in configs.flat(trainer.config).items() if k != "data_dir"}
        return config | self.examples.sizes()


def _prepare(argv: list[str], started: float) -> _Work:
    _cache_programs(FLAGS.compilation_cache)
    overrides = configs.overrides(argv[1:])
    seeds = configs.seeds(FLAGS.seeds)
    if FLAGS.compare:
        if jax.process_count() > 1:
            raise ValueError(f"`--compare` is for one process, got {jax.process_count()}.")
        sources = {norm: _with_norm(FLAGS.config, norm) for norm in FLAGS.compare}
        chosen = {norm: configs.load(each, overrides) for norm, each in sources.items()}
    elif seeds:
        raise ValueError("`--seeds` is for `--compare`; a single run takes `--config.seed`.")
    else:
        config = configs.load(FLAGS.config, overrides)
        chosen = {config.norm: config}
    config = next(iter(chosen.values()))
    examples = data.create(config)
    trainers = {norm: loop.Trainer(config, examples) for norm, config in chosen.items()}
    folder, stop = _workdir(FLAGS.workdir), stopping.Stop()
    output = None if FLAGS.compare else Workdir(folder, trainers[config.norm], stop, started)
    return _Work(examples, trainers, seeds or [config.seed], folder, stop, output)


def _train(trainer: loop.Trainer, workdir: Workdir, stop: stopping.Stop) -> int:
    """Run to the end, or to where it has to stop."""
    workdir.say(f"{trainer.config.network}, {trainer.config.norm}, {_devices()}: compiling ...")
    workdir.say(f"Compiled in {trainer.compile():.1f} s.")
    try:
        with stop:
            for _ in trainer.run(trainer.config.seed, workdir):
                pass
    except stopping.Stopped as stopped:
        workdir.close()
        cluster.together(lambda: None)  # or JAX would give process 0 five minutes to write
        workdir.say(f"{stopped} The same command goes on from there.")
        return stopped.exit_status
    except loop.NonFiniteLossError as error:
        workdir.close()
        workdir.leave("nonfinite.json", {"step": error.step, "layers": error.layers})
        layers = (
            f" Not finite are the statistics of: {', '.join(error.layers)}." if error.layers else ""
        )
        return _complain(f"{error}{layers} A lower learning rate may help.", 1)
    finally:
        workdir.close()
    cluster.together(workdir.check_lost, foreseen=(OSError,))
    workdir.say(f"Done: {workdir.path / 'report.html'}")
    return 0


def _compare(comparison: compare.Comparison, workdir: Path) -> int:
    """Train several norms, an epoch of each in turn."""
    status = 0
    signal.signal(signal.SIGTERM, _terminate)
    try:
        for trainer in comparison.trainers.values():
            seconds = trainer.compile()
            name = f"{trainer.config.network}, {trainer.config.norm}"
            print(f"{name}: compiled in {seconds:.1f} s", flush=True)
        for line in compare.train(comparison, workdir):
            print(line, flush=True)
    except KeyboardInterrupt as interrupt:
        print("\nInterrupted: what was measured until here stays.", file=sys.stderr)
        status = 143 if isinstance(interrupt, _Terminated) else 130
    except loop.NonFiniteLossError as error:
        status = _complain(f"{error} A lower learning rate may help.", 1)
    if comparison.epochs:
        print(compare.write(comparison, workdir))
    return status


class _Terminated(KeyboardInterrupt):
    """SIGTERM, which a comparison takes as it takes Ctrl-C."""


def _terminate(number: int, frame: Any) -> None:
    raise _Terminated


def _with_norm(source: str, norm: str) -> str:
    """Return a config string with another norm; what follows the norm stays."""
    path, _, arg = source.partition(":")
    network, *rest = arg.split(",")
    return f"{path}:{','.join([network, norm, *rest[1:]])}"


def _devices() -> str:
    count, processes = jax.device_count(), jax.process_count()
    kind = (
        f"{count} x {jax.devices()[0].device_kind}" if count > 1 else jax.devices()[0].device_kind
    )
    return kind + (f" of {processes} processes" if processes > 1 else "")


def _workdir(name: str) -> Path:
    """Return the folder `name`, made if it is not there."""
    if not name:  # of a variable that is not set; the current folder is `.`
        raise ValueError("`--workdir` must name a folder, got ''.")
    folder = expanded(name, "--workdir")
    try:
        if jax.process_index() == 0:
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"`--workdir` {folder} cannot be made: {error.strerror}.") from error
    return folder


def _complain(error: object, status: int) -> int:
    print(f"train: {cluster.first_line(error)}", file=sys.stderr)
    return status


def _leave(status: int) -> int:
    """End with a mistake that the other processes may not have: JAX would wait for them first, minutes."""
    if jax.process_count() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


def _cache_programs(folder: str) -> None:
    """Keep compiled programs, so that a run that is resumed compiles nothing."""
    if folder and not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        with contextlib.suppress(RuntimeError):  # who has no home gets no cache
            jax.config.update("jax_compilation_cache_dir", str(Path(folder).expanduser()))


def parse_flags(argv: list[str]) -> list[str]:
    """Parse absl's flags; leave `--config.x=y` for the config that it changes."""
    ours = [arg for arg in argv[1:] if configs.is_override(arg)]
    try:
        return FLAGS(argv[:1] + [arg for arg in argv[1:] if arg not in ours]) + ours
    except flags.Error as error:  # a flag that is unknown, missing or no number
        sys.exit(_complain(error, 2))


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
