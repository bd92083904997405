"""`gr.Blocks` that answers in sentences where Gradio's own answers to clients hold none."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import gradio as gr
from pydantic import ValidationError

from .streaming import Answerings

if TYPE_CHECKING:
    import fastapi
    from gradio.data_classes import PredictBodyInternal


class Page(gr.Blocks):
    """Blocks whose calls with values that no handler gets to see, and those beyond the queue, end with a sentence."""

    def __init__(self, title: str, delete_cache: tuple[int, int]):
        super().__init__(title=title, delete_cache=delete_cache)
        self.answerings = Answerings()

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

    def limit_queue(self, length: int) -> None:
        """Let at most `length` calls wait; others end at once, with a sentence that says when to come again.

        Gradio's own limit answers HTTP 503 instead, for which each of its clients has another text. To be called once,
        inside the page.
        """
        queue = self.queue(default_concurrency_limit=1)._queue
        push, clean = queue.push, queue.clean_events

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

        async def clean_and_stop(*, session_hash: str | None = None, event_id: str | None = None) -> None:
            await clean(session_hash=session_hash, event_id=event_id)
            self.answerings.stop(session_hash or "")  # Gradio itself waits for the next token

        queue.push, queue.clean_events = push_or_refuse, clean_and_stop
