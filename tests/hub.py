"""A model hub on this machine: repositories from folders, by the endpoints that huggingface_hub asks.

Usage::

    with Hub() as hub:
        hub.add("owner/name", folder)
        hub.add("owner/name", other, revision="v2")
        subprocess.run(command, env=os.environ | hub.environment(tmp_path / "cache"))

Of a repository that was not added it says that there is none, as the real one does; `hub.is_silent` lets it accept
connections and answer nothing.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import unquote, urlsplit

MAIN = "main"


class Hub:
    """A server of repositories.

    Attributes:
        asked: the files that were downloaded, as `owner/name/path`, in order.
        is_silent: whether it accepts connections and answers nothing.
        gated: repositories that are not open to all.
    """

    def __init__(self) -> None:
        self._folders: dict[tuple[str, str], Path] = {}
        self.asked: list[str] = []
        self.is_silent = False
        self.gated: set[str] = set()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True

    @property
    def address(self) -> str:
        """For HF_ENDPOINT."""
        return f"http://127.0.0.1:{self._server.server_port}"

    def environment(self, cache: Path) -> dict[str, str]:
        """Variables by which huggingface_hub asks this hub and keeps its own cache."""
        return {
            "HF_ENDPOINT": self.address,
            "HF_HUB_CACHE": str(cache),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
        }

    def add(self, repository: str, folder: Path, revision: str = MAIN) -> None:
        """Serves a folder as a revision of a repository."""
        self._folders[repository, revision] = folder
        self._folders[repository, _commit(folder)] = folder

    def folder(self, repository: str, revision: str) -> Path | None:
        """Return what a revision, a branch or a commit, holds."""
        return self._folders.get((repository, revision))

    def has(self, repository: str) -> bool:
        """Return whether there is a repository."""
        return any(name == repository for name, _ in self._folders)

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()


def _commit(folder: Path) -> str:
    """Return a commit's hash, which stays the same for a folder."""
    return hashlib.sha1(str(folder).encode()).hexdigest()


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        """Answers one request."""

        def do_GET(self) -> None:
            """A listing, or a file's content."""
            self._answer(with_body=True)

        def do_HEAD(self) -> None:
            """The headers of a file."""
            self._answer(with_body=False)

        def log_message(self, *args: object) -> None:
            """Says nothing."""

        def _answer(self, *, with_body: bool) -> None:
            while hub.is_silent:
                time.sleep(0.05)
            parts = unquote(urlsplit(self.path).path).strip("/").split("/")
            if parts[:2] == ["api", "models"] and len(parts) >= 4:
                self._list("/".join(parts[2:4]), parts[4:])
            elif len(parts) > 4 and parts[2] == "resolve":
                self._give("/".join(parts[:2]), parts[3], "/".join(parts[4:]), with_body)
            else:
                self._refuse(404, "EntryNotFound")

        def _found(self, repository: str, revision: str) -> Path | None:
            """Return a revision's folder, or refuses."""
            if repository in hub.gated:
                self._refuse(403, "GatedRepo")
            elif not hub.has(repository):
                self._refuse(401, "RepoNotFound")
            elif (folder := hub.folder(repository, revision)) is None:
                self._refuse(404, "RevisionNotFound")
            else:
                return folder
            return None

        def _list(self, repository: str, rest: list[str]) -> None:
            folder = self._found(repository, rest[1] if len(rest) > 1 else MAIN)
            if folder is None:
                return
            names = [path.relative_to(folder).as_posix() for path in _files(folder)]
            if rest[:1] == ["tree"]:
                self._send([{"type": "file", "path": n, "oid": n, "size": (folder / n).stat().st_size} for n in names])
            else:
                self._send({"id": repository, "sha": _commit(folder), "siblings": [{"rfilename": n} for n in names]})

        def _give(self, repository: str, revision: str, name: str, with_body: bool) -> None:
            folder = self._found(repository, revision)
            if folder is None:
                return
            if not (folder / name).is_file():
                return self._refuse(404, "EntryNotFound")
            content = (folder / name).read_bytes()
            if with_body:
                hub.asked.append(f"{repository}/{name}")
            self.send_response(200)
            self.send_header("X-Repo-Commit", _commit(folder))
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self._end(content if with_body else b"", len(content))

        def _send(self, value: Any) -> None:
            content = json.dumps(value).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self._end(content, len(content))

        def _refuse(self, status: int, code: str) -> None:
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self._end(b"", 0)

        def _end(self, content: bytes, length: int) -> None:
            self.send_header("Content-Length", str(length))
            self.end_headers()
            self.wfile.write(content)

    return Handler
