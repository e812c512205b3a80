"""A Hugging Face Hub on this machine, which answers what the download of a data set asks."""

import hashlib
import http.server
import json
import re
import threading
from types import TracebackType


class Hub:
    """org/… are data sets with `files`, the same at every commit. The tag v1 and the main branch are at `newest`.

    org/gated requires the token `let-me-in`, as gated repositories do.
    """

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files
        self.newest = "a" * 40

    def __enter__(self) -> "Hub":
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.hub = self  # type: ignore[attr-defined]
        self.port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        hub: Hub = self.server.hub  # type: ignore[attr-defined]
        if "org/gated/" in self.path and self.headers["Authorization"] != "Bearer let-me-in":
            self.answer(403, b"gated", {"X-Error-Code": "GatedRepo"})
        elif found := re.match(r"/api/datasets/org/\w+(?:/revision/(v1|[0-9a-f]{40}))?$", self.path):
            commit = hub.newest if found[1] in (None, "v1") else found[1]
            self.answer(200, json.dumps({"id": "org/name", "sha": commit, "siblings": []}).encode())
        elif re.match(r"/api/datasets/org/\w+/tree/[0-9a-f]{40}", self.path):
            files = hub.files.items()
            tree = [{"type": "file", "path": name, "size": len(f), "oid": etag(f)} for name, f in files]
            self.answer(200, json.dumps(tree).encode())
        elif found := re.match(r"/datasets/org/\w+/resolve/([0-9a-f]{40})/(.+)$", self.path):
            content = hub.files[found[2]]
            self.answer(200, content, {"ETag": f'"{etag(content)}"', "X-Repo-Commit": found[1]})
        else:
            self.answer(404, b"no such revision", {"X-Error-Code": "RevisionNotFound"})

    do_HEAD = do_GET

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def etag(content: bytes) -> str:
    """Of a content, since the hub's client keeps contents by it."""
    return hashlib.sha1(content).hexdigest()
