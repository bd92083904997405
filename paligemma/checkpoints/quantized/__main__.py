"""Writes a checkpoint with int8 weights, or lists and removes the int8 and int4 weights that loading keeps beside the Hub's cache."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence

from ...config import PaliGemmaError
from .checkpoint import write_int8_checkpoint
from .store import remove_outdated, stores


def main(arguments: Sequence[str] | None = None) -> None:
    """Do what the command line asks for, or end with a sentence on standard error and the status 1.

    Args:
        arguments: those of the command line; None takes the program's own.
    """
    parser = argparse.ArgumentParser(
        "python -m paligemma.checkpoints.quantized", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("source", metavar="SOURCE", nargs="?", help="a folder or a Hub id")
    parser.add_argument("folder", metavar="FOLDER", nargs="?", help="where its int8 weights go; made anew")
    parser.add_argument("--tokenizer", metavar="PATH", help="a tokenizer.json (default: the one beside the checkpoint)")
    parser.add_argument(
        "--clean",
        action="store_true",
        help="list the int8 and int4 weights kept here, and remove those that nothing reads",
    )
    given = parser.parse_args(arguments)
    if given.clean == (given.folder is not None) or (given.clean and given.source is not None):
        parser.error("please give SOURCE and FOLDER, or --clean alone")
    # So that what is unfinished is removed then, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        if given.clean:
            clean()
        else:
            folder = write_int8_checkpoint(given.source, given.folder, given.tokenizer, show)
            print(f"\r{folder} is written.{' ' * 40}", file=sys.stderr)
    except PaliGemmaError as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit(130)


def clean() -> None:
    """Print a line for each folder of weights that is kept, and remove those that no loading will read."""
    for folder, size, is_current in stores():
        print(f"{size / 1e9:6.2f} GB  {'kept   ' if is_current else 'removed'}  {folder}")
    remove_outdated()


def show(doing: str, fraction: float | None) -> None:
    """Overwrite the terminal's line with what is being done and how much of it is."""
    print(f"\r{doing}{'' if fraction is None else f' {fraction:4.0%}'}", end=" ", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
