"""A Hugging Face Hub on this machine that takes uploads of models, as huggingface_hub's client sends them."""

import base64
import hashlib
import http.server
import json
import re
import threading
from types import TracebackType
from typing import Any

TOKEN = "hf_let-me-in"
LARGE = 4096  # bytes: from here on a file goes by the protocol of Git LFS


class ModelHub:
    """repositories: the files of each, by name. Who sends TOKEN may create repositories and write to them."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.large: dict[str, bytes] = {}  # by sha256
        self.commits = 0

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
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                assert value["encoding"] == "base64"
                self.repositories[repo][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.repositories[repo][value["path"]] = self.large[value["oid"]]
        self.commits += 1


class _Handler(http.server.BaseHTTPRequestHandler):
    hub: ModelHub

    def do_GET(self) -> None:
        repo = self.path.removeprefix("/api/models/").partition("?")[0].partition("/revision/")[0]
        if repo in self.server.hub.repositories:  # type: ignore[attr-defined]
            files = self.server.hub.repositories[repo].items()  # type: ignore[attr-defined]
            self.answer(
                {"id": repo, "sha": "a" * 40, "siblings": [described(name, content) for name, content in files]}
            )
        else:
            self.answer({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET

    def do_POST(self) -> None:
        hub: ModelHub = self.server.hub  # type: ignore[attr-defined]
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers["Authorization"] != f"Bearer {TOKEN}":
            self.answer({"error": "Invalid credentials"}, 401)
        elif self.path == "/api/repos/create":
            asked = json.loads(body)
            repo = "/".join(filter(None, [asked.get("organization"), asked["name"]]))
            exists = repo in hub.repositories
            hub.repositories.setdefault(repo, {})
            hub.private.setdefault(repo, asked.get("private", asked.get("visibility") == "private"))
            self.answer({"url": f"{hub.address}/{repo}", "name": repo}, 409 if exists else 200)
        elif self.path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif re.search(r"/preupload/main", self.path):
            sizes = {file["path"]: file["size"] for file in json.loads(body)["files"]}
            modes = [
                {"path": path, "uploadMode": "lfs" if size >= LARGE else "regular", "shouldIgnore": False}
                for path, size in sizes.items()
            ]
            self.answer({"files": modes})
        elif self.path.endswith(".git/info/lfs/objects/batch"):
            objects = [
                wanted if wanted["oid"] in hub.large else wanted | {"actions": {"upload": {"href": self.place(wanted)}}}
                for wanted in json.loads(body)["objects"]
            ]
            self.answer({"transfer": "basic", "objects": objects})
        elif found := re.fullmatch(r"/api/models/(.+)/commit/main(\?.*)?", self.path):
            hub.commit(found[1], [json.loads(line) for line in body.splitlines()])
            url = f"{hub.address}/{found[1]}/commit/{'b' * 40}"
            self.answer({"success": True, "commitOid": "b" * 40, "commitUrl": url, "hookOutput": ""})
        else:
            self.answer({"error": self.path}, 404)

    def do_PUT(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        digest = self.path.rpartition("/")[2]
        assert hashlib.sha256(content).hexdigest() == digest
        self.server.hub.large[digest] = content  # type: ignore[attr-defined]
        self.answer({})

    def place(self, wanted: dict[str, Any]) -> str:
        return f"{self.server.hub.address}/large/{wanted['oid']}"  # type: ignore[attr-defined]

    def answer(self, value: dict[str, Any], status: int = 200, headers: dict[str, str] | None = None) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        for name, text in {
            "Content-Type": "application/json",
            "Content-Length": str(len(body)),
            **(headers or {}),
        }.items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def described(name: str, content: bytes) -> dict[str, Any]:
    """A file as the hub lists it."""
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    file: dict[str, Any] = {"rfilename": name, "size": len(content), "blobId": blob}
    if len(content) >= LARGE:
        file["lfs"] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
    return file
