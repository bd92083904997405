"""`gr.Blocks` that answers in sentences where Gradio's own answers to clients hold none."""

from __future__ import annotations

import logging
import math
import os
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr
from pydantic import ValidationError

if TYPE_CHECKING:
    import fastapi
    from gradio.data_classes import PredictBodyInternal

log = logging.getLogger(__name__)

LAST_MESSAGES_SECONDS = 5  # for answers to reach those who wait for them


class Page(gr.Blocks):
    """Blocks whose calls with values that no handler gets to see, and those beyond the queue, end with a sentence."""

    async def process_api(self, *arguments: Any, **keywords: Any) -> dict[str, Any]:  # noqa: ANN401
        """Answer a call; every error is a sentence, and what is logged of it holds none of the call's values."""
        try:
            return await super().process_api(*arguments, **keywords)
        except gr.Error as error:
            error.print_exception = False
            raise
        except Exception as error:
            frames = [
                f"{Path(one.filename).name}:{one.lineno}" for one in traceback.extract_tb(error.__traceback__)[-4:]
            ]
            log.error("a call failed: %s in %s", type(error).__name__, " > ".join(frames))
            raise gr.Error(_sentence(error), print_exception=False) from None

    async def preprocess_data(self, *arguments: object, **keywords: object) -> list[object]:
        """Check and convert the values of a call; an error other than `gr.Error` would reach clients as null."""
        try:
            return await super().preprocess_data(*arguments, **keywords)  # type: ignore[arg-type]
        except gr.Error:
            raise
        except Exception as error:
            reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error).partition("\n")[0]
            raise gr.Error(
                f"A value of this call cannot be used ({reason.rstrip('.')}); please send uploaded files and all values, "
                "as “Use via API” at the foot of the page shows.",
                print_exception=False,
            ) from error

    def own_files(self) -> set[str]:
        """The files in the folder of uploads that belong to the page itself, such as its examples; to be called early.

        Gradio counts as such what a visitor's history shows, too.
        """
        return {path for component in self.blocks.values() for path in getattr(component, "keep_in_cache", ())}

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

    def limit_queue(self, length: int) -> None:
        """Let at most `length` calls wait; others end at once, with a sentence that says when to come again.

        Gradio's own limit answers HTTP 503 instead, for which each of its clients has another text. To be called once,
        inside the page.
        """
        queue = self.queue(default_concurrency_limit=1)._queue
        push = queue.push

        def refuse() -> None:
            times = queue.process_time_per_fn.values()
            seconds = length * sum(one.process_time for one in times) / max(1, sum(one.count for one in times))
            minutes = max(1, math.ceil(seconds / 60))
            raise gr.Error(
                f"{length} others are waiting; please come again in about {minutes} minute{'s' * (minutes > 1)}.",
                print_exception=False,
            )

        refusal = gr.Button(visible=False).click(refuse, api_visibility="private", concurrency_limit=None)

        async def push_or_refuse(body: PredictBodyInternal, request: fastapi.Request, username: str | None) -> tuple:
            if len(queue) >= length:
                body.fn_index = refusal["id"]
            return await push(body, request, username)

        queue.push = push_or_refuse


def _sentence(error: Exception) -> str:
    """What a caller is told of an error that no handler explains."""
    if isinstance(error, MemoryError):
        return "The memory of the server is full; please try again later, or with a smaller picture."
    if isinstance(error, OSError) and error.errno is not None:
        return f"The server cannot store or read a file ({os.strerror(error.errno)}); please try again later."
    return "This call failed; please call as “Use via API” at the foot of the page shows, or try again."
