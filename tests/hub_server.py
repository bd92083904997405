"""A small stand-in for the Hugging Face Hub: the routes of downloads and uploads, answered as it does."""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

BAD_TOKEN = "hf_expired"


class HubServer:
    """Serves folders as model repositories from a port of its own.

    revisions: repository id, then revision, to the folder it shows.
    gated: repositories whose files only the tokens in `members` may fetch; anybody may list them, as on the Hub.
    forbidden: repositories whose files no token may fetch, as for one that lacks the permission.
    failing: parts of a path, such as `/api/`, at which the server answers 500.
    cut: parts of a path, to how many more times the server closes the connection there in the middle of the body.
    answer_about_unknown: what it answers to strangers about repositories that it does not have.
    uploads: where repositories are kept that somebody makes, of models under their id, of Spaces under `spaces/` and theirs.
    writers: tokens that may make them.
    variables: those of a Space, by the same names.
    requests: what was asked so far, as (method, path, authorization).
    """

    def __init__(self):
        self.revisions: dict[str, dict[str, Path]] = {}
        self.gated: set[str] = set()
        self.members: set[str] = set()
        self.forbidden: set[str] = set()
        self.failing: tuple[str, ...] = ()
        self.cut: dict[str, int] = {}
        self.uploads = Path()
        self.writers: set[str] = set()
        self.variables: dict[str, dict[str, str]] = {}
        self.answer_about_unknown = "Invalid username or password."
        self.requests: list[tuple[str, str, str | None]] = []
        hub = self

        class Handler(_Handler):
            server_state = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()
        self.is_open = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def add(self, repository: str, folder: Path, revision: str = "main") -> None:
        self.revisions.setdefault(repository, {})[revision] = folder

    def fetched(self) -> set[str]:
        """The names of the files whose content was asked for."""
        return {path.rpartition("/")[2] for method, path, _ in self.requests if method == "GET" and "/resolve/" in path}

    def close(self) -> None:
        """Stop listening: from then on connections are refused."""
        if not self.is_open:
            return
        self.is_open = False
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def commit_of(repository: str, revision: str) -> str:
    return hashlib.sha1(f"{repository}@{revision}".encode()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    """Speaks HTTP 1.0, so that no connection outlives its request."""

    server_state: HubServer

    def do_HEAD(self):
        self._answer()

    def do_GET(self):
        self._answer()

    def do_POST(self):
        hub, path = self.server_state, unquote(urlsplit(self.path).path)
        authorization = self.headers.get("Authorization")
        hub.requests.append((self.command, path, authorization))
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if path == "/api/validate-yaml":
            return self._send_json({"errors": [], "warnings": []})
        if (authorization or "").removeprefix("Bearer ") not in hub.writers:
            return self._refuse(401, message="Invalid username or password.")
        if path == "/api/repos/create":
            return self._create(json.loads(content))
        _, _, kind, owner, name, route, *_ = path.split("/")
        repository = f"{owner}/{name}" if kind == "models" else f"{kind}/{owner}/{name}"
        if route == "preupload":
            files = json.loads(content)["files"]
            modes = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in files]
            return self._send_json({"files": modes})
        assert route == "commit", path
        for line in content.splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                file = hub.revisions[repository]["main"] / entry["value"]["path"]
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(base64.b64decode(entry["value"]["content"]))
        url = f"{hub.url}/{repository}/commit/{commit_of(repository, 'main')}"
        return self._send_json({"success": True, "commitOid": commit_of(repository, "main"), "commitUrl": url})

    def _create(self, wanted):
        hub, repository = self.server_state, f"{wanted['organization']}/{wanted['name']}"
        if wanted.get("type") == "space":
            repository = f"spaces/{repository}"
        if repository in hub.revisions:
            return self._send_json({"url": f"{hub.url}/{repository}"}, status=409)
        (hub.uploads / repository).mkdir(parents=True)
        hub.add(repository, hub.uploads / repository)
        hub.variables[repository] = {one["key"]: one["value"] for one in wanted.get("variables", [])}
        return self._send_json({"url": f"{hub.url}/{repository}"})

    def log_message(self, *arguments):
        pass

    def _answer(self):
        hub = self.server_state
        path = unquote(urlsplit(self.path).path)
        authorization = self.headers.get("Authorization")
        hub.requests.append((self.command, path, authorization))
        if any(part in path for part in hub.failing):
            return self._refuse(500, message="Internal Error")
        if authorization == f"Bearer {BAD_TOKEN}":
            return self._refuse(401, message="Invalid credentials in Authorization header")

        is_api = path.startswith("/api/models/")
        # A slash within a part, as in the revision refs/pr/1, comes quoted.
        parts = [unquote(part) for part in urlsplit(self.path).path.removeprefix("/api/models").split("/")]
        _, owner, name, route, revision, *inner = [*parts, "", "", ""]
        repository = f"{owner}/{name}"
        if repository not in hub.revisions:
            # The Hub tells a stranger neither that a repository is private nor that there is none.
            if authorization is None:
                return self._refuse(401, message=hub.answer_about_unknown)
            return self._refuse(404, "RepoNotFound", "Repository not found")
        found = self._find_revision(repository, revision or "main")
        if found is None:
            return self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        commit, folder = found
        if is_api and route in ("", "revision"):
            return self._send_json({"id": repository, "modelId": repository, "sha": commit, "siblings": []})
        if is_api and route == "tree":
            files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
            return self._send_json([self._describe(folder, file) for file in files])
        return self._send_file(repository, commit, folder.joinpath(*inner), authorization)

    def _find_revision(self, repository, revision):
        for name, folder in self.server_state.revisions[repository].items():
            commit = commit_of(repository, name)
            if revision in (name, commit):
                return commit, folder
        return None

    def _describe(self, folder, file):
        content = file.read_bytes()
        path = file.relative_to(folder).as_posix()
        return {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}

    def _send_file(self, repository, commit, file, authorization):
        hub = self.server_state
        if repository in hub.forbidden:
            return self._refuse(403, message="Please enable access to public gated repositories in your token settings")
        if repository in hub.gated and (authorization or "").removeprefix("Bearer ") not in hub.members:
            return self._refuse(403 if authorization else 401, "GatedRepo", f"Access to {repository} is restricted.")
        if not file.is_file():
            return self._refuse(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": commit})
        content = file.read_bytes()
        headers = {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha1(content).hexdigest()}"', "Accept-Ranges": "bytes"}
        start, status, total = 0, 200, len(content)
        if wanted := self.headers.get("Range"):
            start, status = int(wanted.removeprefix("bytes=").partition("-")[0]), 206
            headers["Content-Range"] = f"bytes {start}-{total - 1}/{total}"
        self._send(status, content[start:], headers, cut=self.command == "GET" and self._is_to_be_cut())
        return None

    def _is_to_be_cut(self):
        for part, times in self.server_state.cut.items():
            if part in self.path and times:
                self.server_state.cut[part] -= 1
                return True
        return False

    def _refuse(self, status, code=None, message="", headers=None):
        headers = {**(headers or {}), "X-Error-Message": message, **({"X-Error-Code": code} if code else {})}
        self._send(status, json.dumps({"error": message}).encode(), {**headers, "Content-Type": "application/json"})

    def _send_json(self, values, status=200):
        self._send(status, json.dumps(values).encode(), {"Content-Type": "application/json"})

    def _send(self, status, content, headers, cut=False):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: len(content) // 2] if cut else content)
