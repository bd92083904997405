"""Answers between Gradio's event loop and the threads that wait for their tokens."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncGenerator, Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from typing import Any

from gradio.context import LocalContext
from gradio.queueing import Event, Queue
from gradio.server_messages import ProcessCompletedMessage

from .serving import ON_STOP

MAX_UNREAD = 8  # messages to a client, before its answers wait for it
UNREAD_SECONDS = 30  # after so long without reading anything, at most twice as long, a client is gone
READ_AGAIN_SECONDS = 0.05
UNREAD = {"error": "Nobody has read this answer for a while, so it was given up; please ask again."}
_END: Any = object()

_threads = ThreadPoolExecutor(max_workers=256, thread_name_prefix="answers")  # most of them wait, if there are many


class Answering:
    """An answer that a handler makes step by step; `stop` ends it, whatever the thread of the handler waits for."""

    def __init__(self, steps: Generator[Any, None, None]):
        self._steps = steps
        self._on_stop: list[Callable[[], None]] = []
        self._context = copy_context()
        self._context.run(ON_STOP.set, self._on_stop)
        self._step: Future[Any] | None = None
        self.is_over = False

    async def next(self) -> Any:  # noqa: ANN401  # whatever the handler yields
        """The next step, or `_END`."""
        self._step = _threads.submit(self._context.run, lambda: next(self._steps, _END))
        step = await asyncio.wrap_future(self._step)
        self.is_over |= step is _END
        return step

    def stop(self) -> None:
        """Compute no further token; the handler goes on with what there is, if it has come so far that there is any."""
        self.is_over |= not self._on_stop
        for end in self._on_stop:
            end()

    def close(self) -> None:
        """End the handler as well, as soon as it is done with the step under way."""
        self.stop()
        if self._step is None:
            self._steps.close()
        else:
            self._step.add_done_callback(lambda _: self._steps.close())


class Answerings:
    """The answers that a page is making, by session."""

    def __init__(self) -> None:
        self._forgetting: asyncio.Task | None = None
        self._under_way: defaultdict[str, set[Answering]] = defaultdict(set)

    async def stream(self, steps: Generator[Any, None, None]) -> AsyncGenerator[Any, None]:
        """Make a handler's steps in a thread, no faster than the client reads them.

        When Gradio cancels this or the session is stopped, no further token is computed.
        """
        blocks, event_id = LocalContext.blocks.get(), LocalContext.event_id.get()
        assert blocks is not None
        assert event_id is not None
        queue, answering = blocks._queue, Answering(steps)
        event = queue.event_ids_to_events[event_id]
        session = event.session_hash
        self._under_way[session].add(answering)
        try:
            while await _is_read(queue, event):
                step = await answering.next()
                if answering.is_over:
                    return
                yield step
        finally:
            answering.close()
            self._under_way[session].discard(answering)
            if not self._under_way[session]:
                del self._under_way[session]
            if session == event._id:  # a program that gave no session: nobody can come back to it
                blocks.state_holder.session_data.pop(session, None)
                blocks.state_holder.time_last_used.pop(session, None)

    def stop(self, session: str) -> None:
        """Compute no further token for a session."""
        for answering in self._under_way.get(session, ()):
            answering.stop()

    def forget_unread(self, queue: Queue) -> None:
        """From now on, give up answers that nobody reads."""
        if self._forgetting is None:
            self._forgetting = asyncio.create_task(_forget_unread(queue))

    async def wait(self, session: str) -> None:
        """Wait until a session's answers are sent."""
        while session in self._under_way:
            await asyncio.sleep(READ_AGAIN_SECONDS)


async def _is_read(queue: Queue, event: Event) -> bool:
    """Wait until a client has read most of what was sent to it; False if it is gone."""
    while event.alive:
        messages = queue.pending_messages_per_session.get(event.session_hash)
        if messages is None or messages.qsize() < MAX_UNREAD:
            return messages is not None
        await asyncio.sleep(READ_AGAIN_SECONDS)
    return False


async def _forget_unread(queue: Queue) -> None:
    """Again and again, put a sentence in the place of messages of which not one was read since the last time."""
    oldest: dict[str, Any] = {}
    while not queue.stopped:
        await asyncio.sleep(UNREAD_SECONDS)
        sessions = queue.pending_messages_per_session
        before = oldest
        oldest = {session: messages._queue[0] for session, messages in sessions.items() if messages.qsize()}
        for session, message in oldest.items():
            if before.get(session) is message and getattr(message, "output", None) != UNREAD:
                events = set(queue.pending_event_ids_session.get(session, ()))
                await queue.clean_events(session_hash=session)
                queue.pending_event_ids_session[session] = events
                sessions[session] = asyncio.Queue()
                for event in events:
                    sessions[session].put_nowait(ProcessCompletedMessage(event_id=event, output=UNREAD, success=False))
        # Gradio keeps those of all sessions that there ever were.
        for session in [session for session in queue.pending_event_ids_session if session not in sessions]:
            del queue.pending_event_ids_session[session]
