"""What it takes to serve a page to others: an address, a password, and a folder of uploads that is emptied."""

from __future__ import annotations

import asyncio
import hmac
import logging
import os
import shutil
import signal
import socket
import tempfile
import time
from collections import deque
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event, Thread
from typing import TYPE_CHECKING

from gradio.utils import get_upload_folder
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import PlainTextResponse

from ..config import PaliGemmaError
from .blocks import client_address
from .handlers import prepare_scenes
from .serving import EMBEDDED, STATUS_SECONDS, Models

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from .blocks import Page

LAST_ANSWERS_SECONDS = 60  # for what streams when the server is asked to end
LOCALHOST = "127.0.0.1"
WRONG_PASSWORD_SECONDS = 1.0  # until the next try of a password is looked at
UPLOAD_FOLDER = "GRADIO_TEMP_DIR"  # the environment variable by which Gradio finds it
CLEAN_UP_SECONDS = 60  # between two looks for old files

log = logging.getLogger(__name__)


def check_address(host: str | None, port: int | None) -> None:
    """Raise PaliGemmaError unless a server can listen there; without a port, on any of the host."""
    if port is not None and not 1 <= port <= 65535:
        raise PaliGemmaError(f"The port {port} is none; please choose one from 1024 to 65535.")
    host = (host or LOCALHOST).strip("[]")
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port or 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as server:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            server.bind(address)
    except (socket.gaierror, UnicodeError) as error:
        raise PaliGemmaError(f"The host {host} is not known here; please choose 127.0.0.1 or 0.0.0.0.") from error
    except OSError as error:
        raise PaliGemmaError(
            f"A page cannot listen on {host}, port {port or 'any'} ({error.strerror}); please choose another."
        ) from error


@contextmanager
def own_upload_folder() -> Iterator[Path]:
    """Inside, Gradio keeps uploads in a new folder, which goes with all that is in it at the end."""
    parent = Path(get_upload_folder())
    parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="paligemma-", dir=parent))
    before = os.environ.get(UPLOAD_FOLDER)
    os.environ[UPLOAD_FOLDER] = str(folder)
    try:
        yield folder
    finally:
        if before is None:
            del os.environ[UPLOAD_FOLDER]
        else:
            os.environ[UPLOAD_FOLDER] = before
        shutil.rmtree(folder, ignore_errors=True)


def delete_old_files(folder: Path, seconds: float, kept: Collection[str] = ()) -> None:
    """Delete what has been in `folder` for so long, whole or cut off, and folders that are empty since then.

    Gradio's own clean-up knows whole uploads only, and ends for good where somebody names a folder as a file.
    """
    latest = time.time() - seconds
    for parent, folders, files in os.walk(folder, topdown=False):
        for path in (Path(parent, name) for name in files):
            with suppress(OSError):  # somebody else was faster
                if str(path) not in kept and path.lstat().st_ctime < latest:
                    path.unlink()
        for path in (Path(parent, name) for name in folders):
            with suppress(OSError):  # it is not empty
                if path.lstat().st_ctime < latest:
                    path.rmdir()


@contextmanager
def cleaned_up(folder: Path, seconds: float, kept: Collection[str] = ()) -> Iterator[None]:
    """Inside, old files are deleted again and again, see `delete_old_files`."""
    is_over = Event()

    def clean() -> None:
        while not is_over.wait(CLEAN_UP_SECONDS):
            try:
                delete_old_files(folder, seconds, kept)
            except Exception:  # the next time must come
                log.exception("uploads could not be cleaned up")

    thread = Thread(target=clean, name="cleaner", daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()


async def explain_full_disk(request: Request, error: Exception) -> PlainTextResponse:
    """What an upload that cannot be stored is answered with."""
    reason = isinstance(error, OSError) and error.strerror or type(error).__name__
    log.warning("an upload cannot be stored: %s", reason)
    return PlainTextResponse(f"The server cannot store the file ({reason}); please try again later.", status_code=507)


class UploadLimit:
    """ASGI middleware that refuses uploads of who has sent too much within an hour.

    Args:
        length: how many bytes one address may send within an hour.
    """

    def __init__(self, app: ASGIApp, length: int):
        self._app, self._length = app, length
        self._uploads: deque[tuple[float, str, int]] = deque()  # time, address, bytes; the latest last

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].endswith("/upload"):
            return await self._app(scope, receive, send)
        client, received = client_address(Request(scope)), 0
        while self._uploads and self._uploads[0][0] < time.monotonic() - 3600:
            self._uploads.popleft()
        if sum(length for _, address, length in self._uploads if address == client) >= self._length:
            sentence = (
                f"More than {self._length // 10**6} MB were uploaded from your address within an hour; please try again "
                "later, or ask about a picture that is here already."
            )
            return await PlainTextResponse(sentence, status_code=429)(scope, receive, send)

        async def receive_and_count() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            return message

        try:
            await self._app(scope, receive_and_count, send)
        finally:
            self._uploads.append((time.monotonic(), client, received))


class Password:
    """The one name and password that are let in; a wrong one is answered after a while, and the next tries wait for it."""

    def __init__(self, user: str, password: str):
        self._user, self._password = user.encode(), password.encode()
        self._turn = asyncio.Lock()

    async def check(self, user: str, password: str) -> bool:
        """Whether they are the right ones."""
        if not hmac.compare_digest(user.encode(), self._user):
            await asyncio.sleep(WRONG_PASSWORD_SECONDS)
            return False
        async with self._turn:  # many tries at once take as long as one after another
            is_right = hmac.compare_digest(password.encode(), self._password)
            if not is_right:
                await asyncio.sleep(WRONG_PASSWORD_SECONDS)
            return is_right


class OwnPagesOnly:
    """Refuses what pages of other sites ask in a visitor's name; their browsers say so, and links work nevertheless."""

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope) if scope["type"] == "http" else Headers()
        is_foreign = headers.get("sec-fetch-site") in ("cross-site", "same-site")
        is_link = scope.get("method") == "GET" and headers.get("sec-fetch-mode") == "navigate"
        app = self._app
        if is_foreign and not is_link:
            app = PlainTextResponse("Other sites may not use this page in a visitor's name.", status_code=403)
        await app(scope, receive, send)


def ending_by_signals(uploads: Path) -> Event:
    """Event that the first SIGTERM or SIGINT sets; the second ends the process at once, without its `uploads`."""
    ending = Event()

    def end(*_: object) -> None:
        if ending.is_set():  # who asks again does not want to wait
            shutil.rmtree(uploads, ignore_errors=True)
            os._exit(1)
        ending.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    return ending


def run_until(ending: Event, page: Page, models: Models) -> str | None:
    """Load the first checkpoint and let the page be used until `ending` is set, then finish what is being answered.

    Returns:
        the sentence of an error that ends it before: the checkpoint cannot be loaded.
    """
    first = models.start(models.names[0])
    while not (first.done() or ending.wait(STATUS_SECONDS)):
        pass
    try:
        if first.done():
            first.result()
    except PaliGemmaError as error:
        return str(error)
    if EMBEDDED in models.names:
        Thread(target=prepare_scenes, daemon=True).start()
    ending.wait()
    models.close()
    page.answer_all(LAST_ANSWERS_SECONDS)
    page.close(verbose=False)
    return None
