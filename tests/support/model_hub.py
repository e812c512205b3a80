"""A Hugging Face Hub on this machine that takes models from huggingface_hub's client, and gives them back.

Large files come by the Xet protocol (support/xet.py), as they do to the real one, others within the commit.
"""

import base64
import hashlib
import http.server
import json
import re
import threading
from types import TracebackType
from typing import Any

from support import xet

TOKEN = "hf_let-me-in"
READ_TOKEN = "hf_look-at-me"  # may not write
LARGE = 4096  # bytes: from here on a file is a large one
COMMIT = "b" * 40


class ModelHub:
    """repositories: the files of each, by name. All are private: TOKEN and READ_TOKEN see them."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.created: list[dict[str, Any]] = []  # what was asked of each new repository
        self.xorbs: dict[str, list[bytes]] = {}  # chunks, by the hash of their xorb
        self.large: dict[str, bytes] = {}  # files, by sha256
        self.commits: list[list[str]] = []  # the files of each
        self.requests: list[str] = []
        self.broken = False  # refuses xorbs

    def __enter__(self) -> "ModelHub":
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.hub = self  # type: ignore[attr-defined]
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()

    def commit(self, repo: str, lines: list[dict[str, Any]]) -> None:
        added = {}
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                assert value["encoding"] == "base64"
                added[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                added[value["path"]] = self.large[value["oid"]]
        self.repositories[repo] |= added
        self.commits.append(sorted(added))


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def hub(self) -> ModelHub:
        return self.server.hub  # type: ignore[attr-defined]

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.hub.requests.append(f"{self.command} {path}")
        token = (self.headers["Authorization"] or "").removeprefix("Bearer ")
        if path.startswith("/v1/"):
            self.answer({}, 404)  # no chunk is known already
        elif token and token not in (TOKEN, READ_TOKEN):
            self.answer({"error": "no"}, 401, {"X-Error-Message": "Invalid credentials in Authorization header"})
        elif "/xet-write-token/" in path:
            self.answer({"casUrl": self.hub.address, "accessToken": "for-xet", "exp": 4102444800})
        elif found := re.fullmatch(r"/api/models/(\w+/[\w-]+)(/revision/\w+)?(/tree/\w+)?", path):
            files = self.hub.repositories.get(found[1])
            if not token:
                self.answer({"error": "Invalid username or password."}, 401, {"X-Error-Code": "RepoNotFound"})
            elif files is None:
                self.answer({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
            elif found[3]:
                self.answer([{"type": "file", "path": n, "size": len(f), "oid": git_name(f)} for n, f in files.items()])
            else:
                siblings = [described(name, content) for name, content in files.items()]
                self.answer({"id": found[1], "sha": COMMIT, "siblings": siblings})
        elif token and (found := re.fullmatch(rf"/(\w+/[\w-]+)/resolve/{COMMIT}/(.+)", path)):
            content = self.hub.repositories[found[1]][found[2]]
            self.send(content, 200, {"ETag": f'"{git_name(content)}"', "X-Repo-Commit": COMMIT})
        else:
            self.answer({"error": path}, 404)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        hub, path = self.hub, self.path.partition("?")[0]
        hub.requests.append(f"{self.command} {path}")
        body = self.body()
        if self.headers["Authorization"] == "Bearer for-xet":
            self.xet(path, body)
        elif self.headers["Authorization"] == f"Bearer {READ_TOKEN}":
            self.answer({"error": "You don't have the rights to create a model"}, 403)
        elif self.headers["Authorization"] != f"Bearer {TOKEN}":
            self.answer({"error": "Invalid credentials"}, 401)
        elif path == "/api/repos/create":
            asked = json.loads(body)
            repo = "/".join(filter(None, [asked.get("organization"), asked["name"]]))
            exists = repo in hub.repositories
            if not exists:
                hub.repositories[repo] = {}
                hub.created.append(asked)
            self.answer({"url": f"{hub.address}/{repo}", "name": repo}, 409 if exists else 200)
        elif path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif path.endswith("/preupload/main"):
            sizes = {file["path"]: file["size"] for file in json.loads(body)["files"]}
            modes = [
                {"path": path, "uploadMode": "lfs" if size >= LARGE else "regular", "shouldIgnore": False}
                for path, size in sizes.items()
            ]
            self.answer({"files": modes})
        elif found := re.fullmatch(r"/api/models/(.+)/commit/main", path):
            hub.commit(found[1], [json.loads(line) for line in body.splitlines()])
            url = f"{hub.address}/{found[1]}/commit/{COMMIT}"
            self.answer({"success": True, "commitOid": COMMIT, "commitUrl": url, "hookOutput": ""})
        else:
            self.answer({"error": path}, 404)

    def xet(self, path: str, body: bytes) -> None:
        if self.hub.broken:
            self.answer({}, 403)
        elif path.startswith("/v1/xorbs/default/"):
            self.hub.xorbs[path.rpartition("/")[2]] = xet.chunks(body)
            self.answer({"was_inserted": True})
        elif path == "/v1/shards":
            self.hub.large |= xet.files(body, self.hub.xorbs)
            self.answer({"result": 1})
        else:
            self.answer({}, 404)  # newer ways, which the client can do without

    def body(self) -> bytes:
        if self.headers["Transfer-Encoding"] != "chunked":
            return self.rfile.read(int(self.headers["Content-Length"]))
        content = b""
        while size := int(self.rfile.readline(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def answer(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send(json.dumps(value).encode(), status, {"Content-Type": "application/json", **(headers or {})})

    def send(self, content: bytes, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, text in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


def git_name(content: bytes) -> str:
    """By which Git names a content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def described(name: str, content: bytes) -> dict[str, Any]:
    """A file as the hub lists it."""
    file: dict[str, Any] = {"rfilename": name, "size": len(content), "blobId": git_name(content)}
    if len(content) >= LARGE:
        file["lfs"] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
    return file
