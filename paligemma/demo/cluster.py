"""Checkpoints on a Ray cluster (https://docs.ray.io), each as a Ray Serve deployment of as many replicas as it is busy.

    page ──> RemoteModel ──> deployment handle ──> replica: a VisionLanguageModel with its engine

A replica answers up to `MAX_ROWS` requests together, on a GPU of its own where there are some. Requests about the same
image go to the same replica, which has its features, as long as that one has a place.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import re
import signal
import threading
import uuid
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, islice, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack, cast

import numpy as np
import ray
import torch
from PIL import Image
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException, RequestCancelledError

from ..config import PaliGemmaConfig, PaliGemmaError
from ..engine import MAX_ROWS
from ..generation import AnswerBatch, Images, ImageSource, Settings, VisionLanguageModel, as_list
from ..images import open_image, to_rgb
from ..mask_decoder import MaskDecoder
from ..processor import Processor
from .serving import EMBEDDED, load_checkpoint, look_inside

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

    from ..inspection import EncoderInspection, Inspection
    from ..walk import WalkStep

ROUTER = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"
TARGET_ONGOING_REQUESTS = MAX_ROWS / 2  # of each replica; above that there are more replicas
UPSCALE_SECONDS, DOWNSCALE_SECONDS = 10, 300
LAST_ANSWERS_SECONDS = 90  # for what a replica answers when it is replaced
HEALTH_SECONDS = 5
FIGURES_SECONDS = 5  # for all replicas to tell what they do
TRIES_TO_START = 3  # of replicas in a row, until a checkpoint counts as one that cannot be loaded
TRIES = 2  # to begin an answer, if a replica fails before its first token
GONE = "The machine that made this answer has failed; please ask again, another one answers."

Event = Any  # of an answer's stream: what `VisionLanguageModel.stream_batch` or `look_inside` yields

log = logging.getLogger(__name__)


class Replica:
    """A checkpoint in a process of the cluster.

    Args:
        source, settings: see `load_checkpoint`.
    """

    def __init__(self, source: str | None, settings: dict[str, Any]):
        self._vlm = load_checkpoint(source, settings)
        self._threads = ThreadPoolExecutor(max_workers=2 * MAX_ROWS, thread_name_prefix="requests")

    def parts(self) -> dict[str, object]:
        """What a page needs of the checkpoint beside its model."""
        vlm = self._vlm
        return {name: getattr(vlm, name) for name in ("processor", "mask_decoder", "device", "weight_dtype")}

    def figures(self) -> dict[str, int]:
        """See `VisionLanguageModel.figures`."""
        return self._vlm.figures()

    def answer(
        self, images: list[Image.Image], numbers: Sequence[Sequence[int]], prompts: Sequence[str], settings: Settings
    ) -> AnswerBatch:
        """See `VisionLanguageModel.stream_batch`; `numbers` are those of each prompt's images."""
        return self._vlm.stream_batch([[images[one] for one in some] for some in numbers], prompts, **settings)

    def look(self, images: list[Image.Image], *arguments: Any) -> Iterator[Any]:  # noqa: ANN401
        """See `look_inside`."""
        return look_inside(self._vlm, images, *arguments)

    async def stream(self, work: str, images: Sequence[np.ndarray], *arguments: object) -> AsyncIterator[list[Event]]:
        """Yield what `answer` or `look` yields, as many at once as there are, and a `PaliGemmaError` as the last.

        Errors are values, since of those that are raised Ray makes others. Who cancels this ends the work.

        Args:
            work: which of the two.
            images: uint8 [height, width, 3] each.
            arguments: the others of `work`.
        """
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[Event] = asyncio.Queue()
        is_over = threading.Event()
        begun: list[Iterator[Event]] = []

        def answer() -> None:
            try:
                batch = getattr(self, work)([Image.fromarray(image) for image in images], *arguments)
                begun.append(batch)
                for event in takewhile(lambda _: not is_over.is_set(), batch):
                    loop.call_soon_threadsafe(events.put_nowait, event)
            except PaliGemmaError as error:
                loop.call_soon_threadsafe(events.put_nowait, error)
            finally:
                loop.call_soon_threadsafe(events.put_nowait, None)

        self._threads.submit(answer)
        try:
            while True:
                some = [await events.get()]
                while not events.empty():
                    some.append(events.get_nowait())
                if found := [event for event in some if event is not None]:
                    yield found
                if some[-1] is None:
                    return
        finally:
            is_over.set()
            for batch in begun:
                if isinstance(batch, AnswerBatch):  # others end with the next that they yield
                    batch.close()


class Link:
    """The way to the replicas of a deployment, through its handle."""

    def __init__(self, handle: DeploymentHandle):
        self._handle = handle

    def begin(self, key: str, arguments: tuple) -> Any:  # noqa: ANN401  # an iterator with `cancel`
        """The stream of `Replica.stream(*arguments)`; those with the same key go to the same replica."""
        return self._handle.options(stream=True, session_id=key).stream.remote(*arguments)

    def parts(self) -> dict[str, object]:
        """Of any replica."""
        return self._handle.parts.remote().result()

    def figures(self) -> list[object]:
        """Of each replica, or an error in its place."""
        return self._handle.broadcast("figures").results(timeout_s=FIGURES_SECONDS, return_exceptions=True)

    def close(self) -> None:
        """End the threads that keep the connection to the replicas."""
        self._handle.shutdown()


class Relay:
    """An actor of the cluster that hands on what replicas stream to a page that is only a client of the cluster.

    To such a page, which is what `ray://` makes it, Ray Serve itself streams nothing.
    """

    def __init__(self, application: str):
        self._handle = serve.get_app_handle(application)
        self._streams: dict[str, Any] = {}

    async def begin(self, name: str, key: str, arguments: tuple) -> None:
        self._streams[name] = Link(self._handle).begin(key, arguments)

    async def read(self, name: str) -> list[Event] | None:
        """What has come since the last time, once something has; None at the end."""
        try:
            return await anext(self._streams[name])
        except (StopAsyncIteration, KeyError, asyncio.CancelledError, RequestCancelledError):
            self._streams.pop(name, None)
            return None

    async def cancel(self, name: str) -> None:
        if stream := self._streams.pop(name, None):
            stream.cancel()

    async def parts(self) -> dict[str, object]:
        return await self._handle.parts.remote()

    async def figures(self) -> list[object]:
        responses = self._handle.broadcast("figures")
        return await responses.results_async(timeout_s=FIGURES_SECONDS, return_exceptions=True)


class RelayedStream:
    """A stream of a `Relay`: an iterator that any thread may cancel."""

    def __init__(self, relay: Any, key: str, arguments: tuple):  # noqa: ANN401  # the handle of an actor
        self._relay, self._name = relay, uuid.uuid4().hex
        relay.begin.remote(self._name, key, arguments)

    def __next__(self) -> list[Event]:
        some = ray.get(self._relay.read.remote(self._name))
        if some is None:
            raise StopIteration
        return some

    def cancel(self) -> None:
        self._relay.cancel.remote(self._name)


class RelayedLink:
    """As `Link`, through a `Relay`."""

    def __init__(self, application: str):
        actor = ray.remote(Relay).options(num_cpus=0, max_restarts=-1, max_concurrency=1000)
        self._relay = actor.remote(application)

    def begin(self, key: str, arguments: tuple) -> RelayedStream:
        return RelayedStream(self._relay, key, arguments)

    def parts(self) -> dict[str, object]:
        return ray.get(self._relay.parts.remote())

    def figures(self) -> list[object]:
        return ray.get(self._relay.figures.remote())

    def close(self) -> None:
        ray.kill(self._relay)


class RemoteAnswers:
    """What a replica streams: an iterator as `AnswerBatch` is, which any thread may close."""

    def __init__(self, link: Link | RelayedLink, key: str, arguments: tuple):
        self._link, self._key, self._arguments = link, key, arguments
        self._response: Any = None
        self._events: deque[Event] = deque()
        self._tries_left = TRIES  # none once the first token has come
        self._is_closed = False
        self._lock = threading.Lock()

    def __iter__(self) -> RemoteAnswers:
        return self

    def __next__(self) -> Event:
        while not self._events or self._is_closed:
            with self._lock:
                if self._is_closed:
                    raise StopIteration
                if self._response is None:
                    self._tries_left -= 1
                    self._response = self._link.begin(self._key, self._arguments)
            try:
                self._events.extend(next(self._response))
                self._tries_left = 0
            except (StopIteration, RequestCancelledError):
                self._is_closed = True
            except (RayError, RayServeException) as error:
                log.warning("a replica has failed: %s", type(error).__name__)
                if not self._tries_left and not self._is_closed:
                    raise PaliGemmaError(GONE) from error
                self._response = None
        event = self._events.popleft()
        if isinstance(event, PaliGemmaError):
            raise event
        return event

    def take(self) -> list[Event]:
        """See `AnswerBatch.take`."""
        taken = list(islice(self, 1))
        while self._events and not isinstance(self._events[0], PaliGemmaError):
            taken.append(self._events.popleft())
        return taken

    def close(self) -> None:
        """End the work at the replica; there are no more tokens."""
        with self._lock:
            was_closed, self._is_closed = self._is_closed, True
        if self._response is not None and not was_closed and ray.is_initialized():
            self._response.cancel()

    def __del__(self) -> None:
        self.close()


class RemoteAnswer:
    """An answer that a replica has made, with the methods of `generation.Answer` that look inside it.

    Args:
        look: streams what a method of this name, called with the further arguments, returns there.
    """

    def __init__(self, look: Callable[..., RemoteAnswers]):
        self._look = look

    def inspect(self, index: int) -> Inspection:
        return next(self._look("inspect", index))

    def branch(self, index: int, token_id: int, **settings: Unpack[Settings]) -> RemoteAnswers:
        return self._look("branch", index, token_id, **settings)

    def seconds_without_cache(self) -> list[float]:
        return next(self._look("seconds_without_cache"))

    def walk_through(self) -> tuple[WalkStep, ...]:
        return next(self._look("walk_through"))


class RemoteModel:
    """A checkpoint of the cluster with the public face of `VisionLanguageModel`, as far as the page needs it."""

    processor: Processor
    mask_decoder: MaskDecoder | None
    device: torch.device
    weight_dtype: torch.dtype

    def __init__(self, link: Link | RelayedLink):
        self._link = link
        self.refresh()

    @property
    def config(self) -> PaliGemmaConfig:
        return self.processor.config

    def refresh(self) -> None:
        """Fetch the parts that are used here from a replica."""
        vars(self).update(self._link.parts())

    def stream_batch(
        self,
        images: Sequence[Images],
        prompts: Sequence[str],
        **settings: Any,  # noqa: ANN401
    ) -> RemoteAnswers:
        """See `VisionLanguageModel.stream_batch`; what is wrong with the arguments is raised with the first token."""
        own = [as_list(some) for some in images]
        different = {id(image): image for image in chain(*own)}  # those that several prompts are about travel once
        places = {identity: place for place, identity in enumerate(different)}
        numbers = [[places[id(image)] for image in some] for some in own]
        return self._stream("answer", different.values(), numbers, list(prompts), settings)

    def resume(self, image: Images, prompt: str, token_ids: Sequence[int]) -> RemoteAnswer:
        """See `VisionLanguageModel.resume`; what it is asked goes where the keys and values of the answer should be."""
        images = as_list(image)
        return RemoteAnswer(
            lambda method, *of, **settings: self.look(images, [prompt], settings, token_ids, method, of)
        )

    def inspect_encoder(self, image: ImageSource, patch: int) -> EncoderInspection:
        """See `VisionLanguageModel.inspect_encoder`."""
        return next(self.look([image], [""], {}, [], "inspect_encoder", (patch,)))

    def look(self, images: Sequence[ImageSource], *arguments: object) -> RemoteAnswers:
        """See `look_inside`."""
        return self._stream("look", images, *arguments)

    def _stream(self, work: str, images: Iterable[ImageSource], *arguments: object) -> RemoteAnswers:
        pixels = [self._pixels(image) for image in images]
        key = hashlib.sha256(pixels[0].data).hexdigest() if pixels else ""
        return RemoteAnswers(self._link, key, (work, pixels, *arguments))

    def generate(self, image: Images, prompt: str, **settings: Any) -> str:  # noqa: ANN401
        """The whole answer at once."""
        return "".join(token.text for _, token in self.stream_batch([image], [prompt], **settings) if token)

    def decode_mask(self, codes: Sequence[int]) -> np.ndarray | None:
        """See `VisionLanguageModel.decode_mask`."""
        return VisionLanguageModel.decode_mask(cast(VisionLanguageModel, self), codes)  # it needs `mask_decoder` only

    def figures(self) -> dict[str, int]:
        """Those of all replicas that tell them in time together, see `VisionLanguageModel.figures`."""
        total: dict[str, int] = {}
        for figures in self.figures_of_replicas():
            for name, value in figures.items():
                total[name] = total.get(name, 0) + value
        return total

    def figures_of_replicas(self) -> list[dict[str, int]]:
        """The figures of each replica."""
        try:
            told = self._link.figures()
        except (RayError, RayServeException, TimeoutError):  # there is none at present
            return []
        return [figures for figures in told if isinstance(figures, dict)]

    def close(self) -> None:
        """Leave the replicas."""
        self._link.close()

    def _pixels(self, image: ImageSource) -> np.ndarray:
        """The image as the processor resizes it, uint8 [image_size, image_size, 3], which is all that has to travel."""
        opened = image if isinstance(image, Image.Image) else open_image(image)
        size = self.config.vision.image_size
        return np.asarray(to_rgb(opened).resize((size, size), Image.Resampling.BICUBIC))


class Cluster:
    """Loads checkpoints as deployments of a Ray cluster.

    Args:
        address: `auto` for the cluster that this machine belongs to, `ray://HOST:PORT` for another that it is a client of,
            `local` for one of this machine alone.
        replicas: how many of each checkpoint there are at least and at most; None: one to as many as fit now.
        cpus: cores of each; None: one beside a GPU, else all that a machine has.
        device: `cuda`, `cpu`, or None for GPUs where the cluster has any.
        ray_settings: further arguments of `ray.init`.

    Raises:
        PaliGemmaError: there is no such cluster.
    """

    def __init__(
        self,
        address: str,
        replicas: tuple[int, int] | None = None,
        cpus: int | None = None,
        device: str | None = None,
        **ray_settings: Any,  # noqa: ANN401
    ):
        if cpus is not None and cpus < 1:
            raise PaliGemmaError(f"A replica cannot have {cpus} cores; please give one or more.")
        _connect(address, ray_settings)
        self._is_client = address.startswith("ray://")
        resources = ray.cluster_resources()
        gpus = int(resources.get("GPU", 0)) if device != "cpu" else 0
        if device == "cuda" and not gpus:
            raise PaliGemmaError(f"The cluster {address} has no GPU; please choose the device cpu.")
        self.device = "cuda" if gpus else "cpu"
        machines = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
        self._cpus = cpus or (1 if gpus else max(1, min(filter(None, machines), default=1)))
        fitting = gpus or sum(cores // self._cpus for cores in machines)
        self.replicas = replicas or (1, max(1, fitting))
        self._loaded: dict[str, tuple[str | None, dict[str, Any], RemoteModel]] = {}
        # No proxies: requests come through handles, and no port is opened.
        serve.start(proxy_location="Disabled")

    @property
    def rows(self) -> int:
        """How many requests all replicas of a checkpoint answer together."""
        return MAX_ROWS * self.replicas[1]

    def load(
        self,
        source: str | None,
        settings: dict[str, Any],
        progress: Callable[..., object],
        adapters: Mapping[str | None, str] | None = None,
        **_: object,
    ) -> VisionLanguageModel:
        """As `load_checkpoint`, on the cluster; there is nothing to make room for."""
        progress("Starting replicas", None)
        settings = settings | {"device": self.device, "adapter": (adapters or {}).get(source)}
        name = _application_name(source)
        handle = self._deploy(name, source, settings)
        remote = RemoteModel(RelayedLink(name) if self._is_client else Link(handle))
        self._loaded[name] = source, settings, remote
        return cast(VisionLanguageModel, remote)  # all of it that the page uses

    def update(self) -> None:
        """Load all checkpoints again, as they are now, one replica after another; what is being answered is finished."""
        for name, (source, settings, remote) in list(self._loaded.items()):  # others may be loaded meanwhile
            try:
                self._deploy(name, source, settings)
                remote.refresh()
                log.info("%s is loaded anew on the cluster", source or EMBEDDED)
            except PaliGemmaError as error:
                log.warning("%s cannot be loaded anew, so what was there stays: %s", source or EMBEDDED, error)

    def close(self) -> None:
        """Take the checkpoints off the cluster, and leave it."""
        for name, (_, _, remote) in self._loaded.items():
            remote.close()
            serve.delete(name, _blocking=False)
        ray.shutdown()

    def _deploy(self, name: str, source: str | None, settings: dict[str, Any]) -> DeploymentHandle:
        """Start replicas, or replace those that are there, and wait until they can answer."""
        least, most = self.replicas
        deployment = serve.deployment(Replica).options(
            name="checkpoint",
            autoscaling_config={
                "min_replicas": least,
                "max_replicas": most,
                "target_ongoing_requests": TARGET_ONGOING_REQUESTS,
                "upscale_delay_s": UPSCALE_SECONDS,
                "downscale_delay_s": DOWNSCALE_SECONDS,
            },
            max_ongoing_requests=MAX_ROWS,
            ray_actor_options={"num_cpus": self._cpus, "num_gpus": int(self.device == "cuda")},
            request_router_config={"request_router_class": ROUTER},
            graceful_shutdown_timeout_s=LAST_ANSWERS_SECONDS,
            health_check_period_s=HEALTH_SECONDS,
            max_constructor_retry_count=TRIES_TO_START,
        )
        try:
            return serve.run(deployment.bind(source, settings), name=name, route_prefix=None)
        except RuntimeError as error:
            states = serve.status().applications[name].deployments.values()
            sentence = re.search(r"PaliGemmaError: (.*)", "".join(state.message for state in states))
            raise PaliGemmaError(
                sentence[1] if sentence else f"The cluster cannot load {source or EMBEDDED}; please see Ray's log."
            ) from error


def _connect(address: str, settings: dict[str, Any]) -> None:
    """`ray.init`, with this package sent along, so that the cluster's machines need only what it imports."""
    package = str(Path(__file__).parents[1])
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # else Ray tells its makers about a cluster that it starts
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    before = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(
            address,
            runtime_env={"py_modules": [package]},
            log_to_driver=False,
            logging_level=logging.WARNING,
            **settings,
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        raise PaliGemmaError(
            f"There is no Ray cluster at {address} ({reason}); please start one with: ray start --head"
        ) from error
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)  # Ray has put its own in its place


def _application_name(source: str | None) -> str:
    """The name of a checkpoint's application on the cluster."""
    words = re.sub(r"[^\w.-]+", "-", source or EMBEDDED).strip("-")
    return f"paligemma-{words}-{hashlib.sha256((source or '').encode()).hexdigest()[:8]}"
