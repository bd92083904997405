"""`gr.Blocks` for everybody: limits and turns of its callers, and sentences where Gradio's own answers hold none."""

from __future__ import annotations

import inspect
import logging
import math
import os
import time
import traceback
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from copy import copy
from functools import partial, update_wrapper
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr
from fastapi import HTTPException
from gradio.blocks import BlocksConfig
from gradio.server_messages import ProcessCompletedMessage
from pydantic import ValidationError
from starlette.responses import JSONResponse

from ..config import PaliGemmaError
from .streaming import Answerings

if TYPE_CHECKING:
    import fastapi
    from gradio.blocks import BlockFunction
    from gradio.data_classes import PredictBodyInternal
    from gradio.queueing import Event
    from gradio.state_holder import SessionState
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

log = logging.getLogger(__name__)

LAST_MESSAGES_SECONDS = 5  # for answers to reach those who wait for them
POSITION_SECONDS = 0.5  # between two messages to all who wait on their places
SESSIONS_KEPT = 4  # for each place in the queue: sessions whose messages can still be read


class Page(gr.Blocks):
    """Blocks whose calls with values that no handler gets to see, and those beyond the queue, end with a sentence."""

    def __init__(self, title: str):
        super().__init__(title=title)
        self.default_config = _PageConfig(self)
        self.answerings = Answerings()
        self.refused: Counter[str] = Counter()  # calls that were asked to come again, by reason

    def event(
        self, handler: Callable, *given: object, show: Callable = lambda shown: shown, write: Callable = str
    ) -> Callable:
        """A handler as Gradio calls it, with its first arguments given and its errors as Gradio's.

        Args:
            show: turns what the handler returns, or each thing that it yields, into what Gradio takes.
            write: turns the sentence of a `PaliGemmaError` into what is shown.
        """
        call = partial(handler, *given)

        @contextmanager
        def sentences() -> Iterator[None]:
            try:
                yield
            except PaliGemmaError as error:
                raise gr.Error(write(str(error)), print_exception=False) from error

        def event(*values: object) -> object:
            with sentences():
                return show(call(*values))

        async def stream(*values: object) -> AsyncIterator[object]:
            with sentences():
                async with aclosing(self.answerings.stream(call(*values))) as steps:
                    async for step in steps:
                        yield show(step)

        called = stream if inspect.isgeneratorfunction(handler) else event
        called.__signature__ = inspect.signature(call)  # type: ignore[attr-defined]  # Gradio reads it
        return update_wrapper(called, handler)

    async def process_api(self, *arguments: Any, **keywords: Any) -> dict[str, Any]:  # noqa: ANN401
        """Answer a call; every error is a sentence, and what is logged of it holds none of the call's values."""
        try:
            return await super().process_api(*arguments, **keywords)
        except gr.Error as error:
            error.print_exception = False
            raise
        except Exception as error:
            _log("a call", error)
            raise gr.Error(_sentence(error), print_exception=False) from None

    async def preprocess_data(
        self, block_fn: BlockFunction, inputs: list[object], state: SessionState | None, explicit_call: bool = False
    ) -> list[object]:
        """Check and convert the values of a call, of which the last may be left out if its function has defaults for them.

        An error other than `gr.Error` would reach clients as null.
        """
        if block_fn.fn is not None:
            left_out = list(inspect.signature(block_fn.fn).parameters.values())[len(inputs) :]
            if all(parameter.default is not parameter.empty for parameter in left_out):
                inputs = [*inputs, *(parameter.default for parameter in left_out)]
        try:
            return await super().preprocess_data(block_fn, inputs, state, explicit_call)
        except gr.Error:
            raise
        except Exception as error:
            reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error).partition("\n")[0]
            raise gr.Error(
                f"A value of this call cannot be used ({reason.rstrip('.')}); please send uploaded files and all values, "
                "as “Use via API” at the foot of the page shows.",
                print_exception=False,
            ) from error

    async def postprocess_data(
        self, block_fn: BlockFunction, predictions: list | dict, state: SessionState | None
    ) -> list[Any]:
        """Convert what a handler returns; of components by name only these, where Gradio would make all others anew."""
        if not isinstance(predictions, dict) or not predictions.keys() & set(block_fn.outputs):
            return await super().postprocess_data(block_fn, predictions, state)
        changed = copy(block_fn)
        changed.outputs = [output for output in block_fn.outputs if output in predictions]
        values = iter(await super().postprocess_data(changed, predictions, state))
        return [next(values) if output in predictions else gr.skip() for output in block_fn.outputs]

    def stop(self, session: str) -> None:
        """End what a session has asked for: what was answered so far stays, what waits leaves the queue."""
        for one in self._queue.event_queue_per_concurrency_id.values():
            for event in [event for event in one.queue if event.session_hash == session]:
                one.queue.remove(event)
                self._queue.event_ids_to_events.pop(event._id, None)
                unchanged = {"data": [gr.skip()] * len(event.fn.outputs), "is_generating": False}
                self._queue.send_message(event, ProcessCompletedMessage(output=unchanged, success=True))
        self.answerings.stop(session)

    def own_files(self) -> set[str]:
        """The files in the folder of uploads that belong to the page itself, such as its examples; to be called early.

        Gradio counts as such what a visitor's history shows, too.
        """
        return {path for component in self.blocks.values() for path in getattr(component, "keep_in_cache", ())}

    def answer_together(self, count: int) -> None:
        """Let up to `count` calls of each queue be answered at the same time."""
        for waiting in self._queue.event_queue_per_concurrency_id.values():
            if waiting.concurrency_limit is not None:
                waiting.concurrency_limit = count

    def answer_all(self, seconds: float) -> None:
        """Let every call that waits begin at once, and wait until all have their answers, at most so long."""
        queue, end = self._queue, time.monotonic() + seconds
        for waiting in queue.event_queue_per_concurrency_id.values():
            waiting.concurrency_limit = None
        while time.monotonic() < end and (len(queue) or any(queue.active_jobs)):
            time.sleep(0.1)
        # Answers are there, but on their way; some callers never fetch theirs.
        end = time.monotonic() + LAST_MESSAGES_SECONDS
        while time.monotonic() < end and any(queue.pending_event_ids_session.values()):
            time.sleep(0.1)

    def limit_queue(self, length: int, share: int) -> None:
        """Let at most `length` calls wait, at most `share` of one client, in an order that is fair to all clients.

        Others end at once, with a sentence: Gradio's own limit answers HTTP 503 instead, for which each of its clients
        has another text. No call of what is queued goes past it. To be called once, inside the page.
        """
        queue = self.queue(POSITION_SECONDS, api_open=False, default_concurrency_limit=1)._queue
        push, clean = queue.push, queue.clean_events
        sessions = queue.pending_messages_per_session
        sessions.max_size = SESSIONS_KEPT * length

        def refuse_all() -> None:
            times = queue.process_time_per_fn.values()
            seconds = length * sum(one.process_time for one in times) / max(1, sum(one.count for one in times))
            minutes = max(1, math.ceil(seconds / 60))
            raise gr.Error(
                f"{length} others are waiting; please come again in about {minutes} minute{'s' * (minutes > 1)}.",
                print_exception=False,
            )

        def refuse_client() -> None:
            raise gr.Error(
                f"{share} questions from your address are waiting already; please ask again when they are answered.",
                print_exception=False,
            )

        refusals = [
            gr.Button(visible=False).click(refuse, api_visibility="private", concurrency_limit=None)["id"]
            for refuse in (refuse_all, refuse_client)
        ]

        async def push_or_refuse(body: PredictBodyInternal, request: fastapi.Request, username: str | None) -> tuple:
            self.answerings.forget_unread(queue)
            if body.session_hash in sessions:  # else it counts as old as when it first asked
                sessions.move_to_end(body.session_hash)
            queues = list(queue.event_queue_per_concurrency_id.values())
            clients = [client_address(event.request) for one in queues for event in one.queue]
            if len(clients) >= length:
                body.fn_index = refusals[0]
                self.refused["queue"] += 1
            elif clients.count(client_address(request)) >= share:
                body.fn_index = refusals[1]
                self.refused["client"] += 1
            pushed = await push(body, request, username)
            for one in queues:
                running = [event for job in queue.active_jobs for event in job or []]
                one.queue[:] = take_turns(one.queue, running)
            return pushed

        async def clean_and_stop(*, session_hash: str | None = None, event_id: str | None = None) -> None:
            await clean(session_hash=session_hash, event_id=event_id)
            self.answerings.stop(session_hash or "")  # Gradio itself waits for the next token

        queue.push, queue.clean_events = push_or_refuse, clean_and_stop


class _PageConfig(BlocksConfig):
    """A page's components, of which sessions do not keep values or properties, for a link to their state: there is none.

    A copy for a session would take 20 ms, and as much memory as all that was ever asked and answered in it.
    """

    def __copy__(self) -> BlocksConfig:
        of_session = super().__copy__()
        of_session.config_for_block = lambda *_: {}
        return of_session


def take_turns(waiting: Sequence[Event], running: Sequence[Event]) -> list[Event]:
    """Calls in the order in which they are to be answered: nobody's second before everybody's first."""
    turns = Counter(client_address(event.request) for event in running)
    numbered = []
    for event in waiting:
        client = client_address(event.request)
        numbered.append((turns[client], event))
        turns[client] += 1
    return [event for _, event in sorted(numbered, key=lambda pair: pair[0])]


def client_address(request: fastapi.Request) -> str:
    """The address of who calls, which a proxy in a private network, such as that of a Space, passes on."""
    address = request.client.host if request.client else ""
    forwarded = request.headers.get("x-forwarded-for", "")
    try:
        is_proxy = bool(forwarded) and ip_address(address).is_private
    except ValueError:
        is_proxy = False
    return forwarded.partition(",")[0].strip() if is_proxy else address


class BodyLimit:
    """ASGI middleware that refuses requests with a longer body than a call needs; uploads have a limit of their own.

    Args:
        length: of a call in bytes.
        agents_length: of one over MCP, which may hold images.
    """

    def __init__(self, app: ASGIApp, length: int, agents_length: int):
        self._app, self._length, self._agents_length = app, length, agents_length

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        received, length = 0, self._agents_length if "/mcp/" in scope.get("path", "") else self._length

        async def receive_some() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > length:
                raise HTTPException(
                    413, f"This request is longer than {length // 1000} kB; please upload files, shorten texts."
                )
            return message

        is_upload = scope["type"] != "http" or scope["path"].endswith("/upload")
        await self._app(scope, receive if is_upload else receive_some, send)


class LastResort:
    """ASGI middleware for requests whose handling fails, such as those for an event that there is none of: an answer in a
    sentence, and a line in the log without what was sent."""

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        has_begun = False

        async def send_on(message: Message) -> None:
            nonlocal has_begun
            has_begun = True
            await send(message)

        try:
            await self._app(scope, receive, send_on)
        except Exception as error:
            _log("a request", error)
            if scope["type"] == "http" and not has_begun:
                await JSONResponse({"detail": _sentence(error)}, status_code=500)(scope, receive, send)


def _log(what: str, error: Exception) -> None:
    """Say what kind of error ended a call or request, and where, without its text, which may hold what was asked."""
    frames = [f"{Path(one.filename).name}:{one.lineno}" for one in traceback.extract_tb(error.__traceback__)[-4:]]
    log.error("%s failed: %s in %s", what, type(error).__name__, " > ".join(frames))


def _sentence(error: Exception) -> str:
    """What a caller is told of an error that no handler explains."""
    if isinstance(error, MemoryError):
        return "The memory of the server is full; please try again later, or with a smaller picture."
    if isinstance(error, OSError) and error.errno is not None:
        return f"The server cannot store or read a file ({os.strerror(error.errno)}); please try again later."
    return "This call failed; please call as “Use via API” at the foot of the page shows, or try again."
