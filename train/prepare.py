r"""Prepare a dataset of TFDS as array_record, once, for the trainer to read without TensorFlow.

  python -m train.prepare cifar10
  python -m train.prepare imagenet2012 --data_dir=/data --manual_dir=/downloads

Any dataset of TFDS will do, a config of one as `name/config`. This alone needs TensorFlow: in an environment
of its own, if need be, `pip install ".[prepare]"`. ImageNet is made from its original archives,
ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar, which lie in `--manual_dir`. Exit status 0 says that the
data are there, even if they were before; 1 that they are not, with one line that says why; 130 is Ctrl-C.
"""

import argparse
import importlib.util
import os
import sys
import tarfile
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from train.data import prepared

PAGE = "https://image-net.org/download-images"
# Sizes in bytes of what is to be had there.
ARCHIVES = {
    "ILSVRC2012_img_train.tar": 147_897_477_120,
    "ILSVRC2012_img_val.tar": 6_744_924_160,
}
PATIENCE = 5  # seconds for a server to answer, before anything is downloaded


class CannotPrepareError(Exception):
    """Why not, in one line."""


def main(argv: list[str] | None = None) -> int:
    """Prepare what the command line asks for; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m train.prepare", description="Prepare a dataset."
    )
    parser.add_argument("name", help="as TFDS calls it: mnist, cifar10, imagenet2012")
    parser.add_argument("--data_dir", default="", help="default: TFDS's, ~/tensorflow_datasets")
    parser.add_argument(
        "--manual_dir", default="", help="default: downloads/manual in the data_dir"
    )
    parser.add_argument(
        "--allow_partial", action="store_true", help="take ImageNet archives of any size"
    )
    args = parser.parse_args(argv)
    try:
        folder = prepare(args.name, args.data_dir, args.manual_dir, args.allow_partial)
    except KeyboardInterrupt:
        print("\nprepare: interrupted, nothing is prepared; run it again.", file=sys.stderr)
        return 130
    except (CannotPrepareError, ValueError, ModuleNotFoundError) as error:
        print(f"prepare: {_line(error)}", file=sys.stderr)
        return 1
    print(folder)
    return 0


def prepare(
    name: str, data_dir: str = "", manual_dir: str = "", allow_partial: bool = False
) -> str:
    """Prepare a dataset unless it is; return a line that says what is there.

    Args:
      name: as TFDS calls it.
      data_dir: where to, "" is TFDS's default.
      manual_dir: where what cannot be downloaded lies, "" is TFDS's default.
      allow_partial: ImageNet's archives may be others than the originals, for a trial.
    Raises:
      CannotPrepareError: something is missing, or failed.
      ValueError: what is there already is damaged.
    """
    root = prepared.root(data_dir)
    done = prepared.find(name, data_dir)
    if done is not None:
        return f"Already prepared: {describe(done)}"
    manual = Path(manual_dir).expanduser() if manual_dir else root / "downloads" / "manual"
    if name.partition("/")[0] == "imagenet2012":
        check_archives(manual, allow_partial)
    for package in ("tensorflow", "tensorflow_datasets"):
        if importlib.util.find_spec(package) is None:
            raise CannotPrepareError(f'preparing needs {package}; run: pip install ".[prepare]"')
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # TensorFlow greets with a page
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.download import download_manager, extractor

    try:
        builder = tfds.builder(name, data_dir=str(root), file_format="array_record")
    except (tfds.core.DatasetNotFoundError, OSError, ValueError) as error:
        raise CannotPrepareError(f"TFDS cannot make {name!r}: {_line(error)}") from error
    if builder.MANUAL_DOWNLOAD_INSTRUCTIONS is None:
        check_network(builder, root / "downloads")
    try:
        builder.download_and_prepare(
            download_config=tfds.download.DownloadConfig(manual_dir=str(manual))
        )
    except (
        OSError,  # no space, no permission, and what requests raises
        AssertionError,  # TFDS: nothing in manual_dir
        tarfile.TarError,
        tfds.download.DownloadError,
        download_manager.NonMatchingChecksumError,
        extractor.ExtractError,
    ) as error:
        raise CannotPrepareError(f"{name} could not be prepared: {_line(error)}") from error
    done = prepared.find(name, data_dir)
    if done is None:
        raise CannotPrepareError(f"TFDS has prepared {name} somewhere else than {root / name}.")
    return f"Prepared: {describe(done)}"


def describe(folder: Path) -> str:
    """Return the folder and its numbers of examples.

    Raises:
      ValueError: it is damaged.
    """
    splits = prepared.open_folder(folder).info.splits
    return f"{folder}, " + ", ".join(f"{n} {splits[n].num_examples}" for n in sorted(splits))


def check_archives(manual: Path, allow_partial: bool = False) -> None:
    """Check for ImageNet's archives before anything else; TFDS would go ahead without.

    Raises:
      CannotPrepareError: one is missing, or is not as long as the original.
    """
    lost = [archive for archive in ARCHIVES if not (manual / archive).is_file()]
    if lost:
        raise CannotPrepareError(
            f"`manual_dir` lacks {' and '.join(lost)}, looked in {manual.absolute()}; they are to be had "
            f"at {PAGE} for those who register."
        )
    for archive, expected in ARCHIVES.items():
        size = (manual / archive).stat().st_size
        if size != expected and not allow_partial:
            raise CannotPrepareError(
                f"{manual / archive} has {size} bytes, the original {expected}: download it again. (TFDS "
                "labels validation images by their place in the archive. For a trial: --allow_partial.)"
            )


def check_network(builder: Any, downloads: Path) -> None:
    """Ask the server of the first file whether it is there; TFDS would try for minutes.

    Raises:
      CannotPrepareError: it cannot be reached, and nothing was downloaded before.
    """
    url = next(iter(builder.url_infos), None)
    if url is None or any(downloads.glob("*.INFO")):
        return
    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=PATIENCE).close()
    except (
        urllib.error.HTTPError
    ) as answer:  # it is there; what it will say to a GET, TFDS finds out
        answer.close()
    except OSError as error:
        raise CannotPrepareError(
            f"{builder.name} is to be downloaded, and {url} cannot be reached: {_line(error)}. Prepare it on "
            f"a machine with a network and copy {builder.data_dir}."
        ) from error


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


if __name__ == "__main__":
    sys.exit(main())
