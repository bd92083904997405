"""Answers a prompt about images in the terminal, token by token: `python -m paligemma IMAGE … PROMPT`."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence

import paligemma

from .images import open_image


def main(arguments: Sequence[str] | None = None) -> None:
    """Stream the answer to standard output, or end with a sentence on standard error and the status 1.

    Args:
        arguments: those of the command line; None takes the program's own.
    """
    parser = argparse.ArgumentParser("python -m paligemma", description="Ask a PaliGemma checkpoint about images.")
    parser.add_argument(
        "images", metavar="IMAGE", nargs="+", help="an image file; several come before the prompt together"
    )
    parser.add_argument("prompt", metavar="PROMPT", help="for example: caption en")
    parser.add_argument("--model", metavar="SOURCE", help="a folder or a Hub id (default: the embedded checkpoint)")
    parser.add_argument("--tokenizer", metavar="PATH", help="a tokenizer.json (default: the one beside the checkpoint)")
    parser.add_argument("--adapter", metavar="SOURCE", help="a LoRA adapter for it; can be given as --model as well")
    parser.add_argument("--device", help="cpu, cuda or mps (default: a GPU if there is one)")
    parser.add_argument("--dtype", default="auto", help="auto, float32, bfloat16, float16, int8 or int4")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="the answer's longest length")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token")
    parser.add_argument("--top-k", type=int, default=0, help="sample among so many tokens, 0: among all")
    parser.add_argument("--top-p", type=float, default=1.0, help="sample among the likeliest of this total probability")
    parser.add_argument("--seed", type=int, help="the same one gives the same answer")
    settings = vars(parser.parse_intermixed_args(arguments))
    paths, prompt, source = (settings.pop(name) for name in ("images", "prompt", "model"))
    loading = {name: settings.pop(name) for name in ("device", "dtype", "tokenizer", "adapter")}
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # characters that a terminal cannot show are no reason to end
    try:
        images = [open_image(path) for path in paths]  # before the checkpoint, which may take minutes
        for token in paligemma.load(source, **loading).stream(images, prompt, **settings):
            print(token.text, end="", flush=True)
        print()
    except paligemma.PaliGemmaError as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # whoever read has had enough; nothing is left for Python to flush at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


if __name__ == "__main__":
    main()
