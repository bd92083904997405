"""The options of `python app.py`, each of which an environment variable of a Space sets as well."""

from __future__ import annotations

import argparse
import importlib.util
import os
from collections.abc import Callable

from ..config import PaliGemmaError
from . import hosting
from .serving import EMBEDDED


def parse_arguments(description: str | None) -> argparse.Namespace:
    """Options and environment variables, as the README lists them; `sources` are the checkpoints to offer."""
    parser = argparse.ArgumentParser(description=description)

    def add(name: str, help: str, type: Callable[[str], object] = str.strip) -> None:
        """An option that an environment variable sets as well."""
        default = os.environ.get(f"PALIGEMMA_{name.upper().replace('-', '_')}") or None
        parser.add_argument(f"--{name}", type=type, default=default, help=help)

    add("model", "folder or Hub id[@revision]")
    add("models", f"several of them, with commas between, for a menu; `{EMBEDDED}` is the small one that ships inside")
    add("adapter", "a LoRA adapter for --model, a folder or Hub id; it can be given as --model as well")
    add("device", "cpu, cuda or mps")
    add("dtype", "auto, float32, bfloat16, float16, or on x86 CPUs int8 or int4")
    add("tokenizer", "a tokenizer.json, or a folder that holds one, for all checkpoints but the embedded one")
    parser.add_argument("--compile", action="store_true", help="compile encoder, prefill and decode step (CUDA)")
    host, port = (os.environ.get(f"GRADIO_SERVER_{name}") or None for name in ("NAME", "PORT"))
    parser.add_argument("--host", default=host, help="address to listen on, such as 0.0.0.0")
    parser.add_argument("--port", type=int, default=port)
    parser.add_argument("--share", action="store_true", help="make a public link")
    add("auth", "USER:PASSWORD: let in only who knows them; the environment variable is seen by fewer")
    parser.add_argument("--mcp", action="store_true", help="serve the endpoints as tools for agents as well")
    add("cluster", "let a Ray cluster answer: auto, local or ray://HOST:PORT")
    add("replicas", "of each checkpoint on the cluster, such as 2 or 1-8", type=_replicas)
    add("replica-cores", "CPU cores of each of them", type=int)
    metrics = os.environ.get("PALIGEMMA_METRICS", "").strip().lower() in ("1", "true", "yes", "on")
    parser.add_argument("--metrics", action="store_true", default=metrics, help="serve /metrics for Prometheus")
    arguments = parser.parse_args()
    if arguments.auth:
        user, _, password = arguments.auth.partition(":")
        if not (user and password):
            parser.error("--auth takes a name and a password with a colon between them: --auth ada:lovelace")
        if arguments.mcp:
            parser.error("--mcp cannot be protected with --auth, since agents have no login; please choose one of them")
        arguments.auth = user, password
    for option, module, package in (
        ("mcp", "mcp", '"gradio[mcp]"'),
        ("metrics", "prometheus_client", "prometheus_client"),
        ("cluster", "ray", '"ray[serve]"'),
    ):
        if getattr(arguments, option) and importlib.util.find_spec(module) is None:
            parser.error(f"--{option} needs one more package: pip install {package}")
    try:
        hosting.check_address(arguments.host, arguments.port)
    except PaliGemmaError as error:
        parser.error(str(error))
    if not arguments.model and arguments.adapter:  # its config names the model
        arguments.model, arguments.adapter = arguments.adapter, None
    names = [arguments.model or "", *(arguments.models or "").split(",")]
    arguments.sources = list(dict.fromkeys(filter(None, map(str.strip, names)))) or [EMBEDDED]
    return arguments


def _replicas(text: str) -> tuple[int, int]:
    """The least and the most of `2-8`, or of `2`, which is both."""
    least, _, most = text.strip().partition("-")
    if not (least.isdecimal() and (most or least).isdecimal() and 1 <= int(least) <= int(most or least)):
        raise argparse.ArgumentTypeError(f"{text} is no number of replicas; please give one, such as 2, or two: 1-8")
    return int(least), int(most or least)
