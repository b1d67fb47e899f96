"""A model hub of our own for tests: answers, over HTTP on this machine, what the hub's library asks of the real one."""

from __future__ import annotations

import contextlib
import hashlib
import json
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class FakeHub:
    """`files` by name are those of `tiny/model` at the commit to which `main` points; `asked` are the requests."""

    files: dict[str, bytes]
    gated: bool = False
    url: str = ""
    asked: list[str] = field(default_factory=list)

    @property
    def commit(self) -> str:
        """Changes whenever the files do."""
        return hashlib.sha1(repr(sorted(self.files.items())).encode()).hexdigest()

    @property
    def downloaded(self) -> set[str]:
        """The files that were sent."""
        return {path.partition(f"/resolve/{self.commit}/")[2] for path in self.asked if path.startswith("GET /tiny/")}


@contextlib.contextmanager
def fake_hub(files: dict[str, bytes], gated: bool = False) -> Iterator[FakeHub]:
    """Serve the repository `tiny/model` while the block runs."""
    hub = FakeHub(files, gated)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            hub.asked.append(f"{self.command} {self.path}")
            path = self.path.partition("?")[0]
            if path in ("/api/models/tiny/model/revision/main", f"/api/models/tiny/model/revision/{hub.commit}"):
                names = [{"rfilename": n, "size": len(d)} for n, d in hub.files.items()]
                self.answer(json.dumps({"id": "tiny/model", "sha": hub.commit, "siblings": names}).encode())
            elif path == f"/api/models/tiny/model/tree/{hub.commit}":
                entries = [
                    {"type": "file", "path": n, "size": len(d), "oid": hashlib.sha1(d).hexdigest()}
                    for n, d in hub.files.items()
                ]
                self.answer(json.dumps(entries).encode())
            elif path.startswith(at := f"/tiny/model/resolve/{hub.commit}/") and path[len(at) :] in hub.files:
                if hub.gated:
                    self.answer(b"", 403, "GatedRepo")
                else:
                    self.answer(hub.files[path[len(at) :]])
            else:
                self.answer(b"{}", 404, "RepoNotFound" if "/api/models/" in path else "EntryNotFound")

        do_HEAD = do_GET

        def answer(self, body: bytes, status: int = 200, error: str | None = None) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
            self.send_header("X-Repo-Commit", hub.commit)
            if error:
                self.send_header("X-Error-Code", error)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            """Nothing: the test's output is the test's."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


@contextlib.contextmanager
def silent_hub() -> Iterator[str]:
    """The address of something that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"
