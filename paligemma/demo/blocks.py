"""`gr.Blocks` that answers in sentences where Gradio's own answers to clients hold none."""

from __future__ import annotations

import inspect
import math
from typing import TYPE_CHECKING

import gradio as gr
from pydantic import ValidationError

if TYPE_CHECKING:
    import fastapi
    from gradio.blocks import BlockFunction
    from gradio.data_classes import PredictBodyInternal
    from gradio.state_holder import SessionState


class Page(gr.Blocks):
    """Blocks whose calls with values that no handler gets to see, and those beyond the queue, end with a sentence."""

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
