"""A hub on this machine, that speaks as much of the Hugging Face hub's protocol as a push needs."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

LARGE = (".safetensors",)
COMMIT = "1" * 40


@dataclass
class Hub:
    """The repositories of a hub: which are private, and their files. It knows one ``token``, of one ``owner``.

    One that is ``full`` takes no large file.
    """

    token: str
    owner: str
    address: str = ""
    private: dict[str, bool] = field(default_factory=dict)
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    full: bool = False

    def answer(self, method: str, path: str, body: bytes, token: str) -> tuple[int, Any]:
        """A status, and what is said with it."""
        if method == "PUT":  # an upload's address is its own permission
            self.objects[hashlib.sha256(body).hexdigest()] = body
            return (413 if self.full else 200), {}
        if token != f"Bearer {self.token}":
            return 401, {"error": f"unknown token {token}"}
        if path == "/api/whoami-v2":
            return 200, {"name": self.owner, "type": "user", "auth": {"accessToken": {"role": "write"}}}
        repository = "/".join(path.removeprefix("/api/models/").split("/")[:2])
        if path.endswith("/commit/main"):
            self._commit(repository, body)
            url = f"{self.address}/{repository}/commit/{COMMIT}"
            return 200, {"commitUrl": url, "commitOid": COMMIT, "hookOutput": "", "success": True}
        told = json.loads(body or b"{}")
        if path == "/api/whoami-v2":
            return 200, {"name": self.owner, "type": "user", "auth": {"accessToken": {"role": "write"}}}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path == "/api/repos/create":
            return self._create(told)
        if path.endswith("/info/lfs/objects/batch"):
            return 200, {"transfer": "basic", "objects": [self._upload(each) for each in told["objects"]]}
        if path.endswith("/preupload/main"):
            return 200, {"files": [_mode(each["path"]) for each in told["files"]]}
        if repository in self.private:
            about = {"id": repository, "private": self.private[repository], "sha": COMMIT, "siblings": [], "tags": []}
            return 200, about | {"downloads": 0, "likes": 0}
        return 404, {"error": "Repository not found"}

    def _create(self, told: dict[str, Any]) -> tuple[int, Any]:
        owner = told.get("organization") or self.owner
        repository = f"{owner}/{told['name']}"
        if owner != self.owner:
            return 403, {"error": "You don't have the rights to create a model under this namespace"}
        url = {"url": f"{self.address}/{repository}"}
        if repository in self.private:
            return 409, {"error": "You already created this model repo", **url}
        self.private[repository] = bool(told.get("private") or told.get("visibility") == "private")
        return 200, url

    def _upload(self, wanted: dict[str, Any]) -> dict[str, Any]:
        return {**wanted, "actions": {"upload": {"href": f"{self.address}/objects/{wanted['oid']}"}}}

    def _commit(self, repository: str, body: bytes) -> None:
        files = self.files.setdefault(repository, {})
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.objects[value["oid"]]


def _mode(path: str) -> dict[str, Any]:
    return {"path": path, "uploadMode": "lfs" if path.endswith(LARGE) else "regular", "shouldIgnore": False}


@contextmanager
def serving(token: str, owner: str) -> Iterator[Hub]:
    """A hub that listens on this machine."""
    hub = Hub(token, owner)

    class Handler(BaseHTTPRequestHandler):
        def _answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            path = self.path.partition("?")[0]
            status, said = hub.answer(self.command, path, body, self.headers.get("Authorization", ""))
            sent = json.dumps(said).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(sent)))
            self.send_header("Content-Type", "application/json")
            if status == 404:
                self.send_header("X-Error-Code", "RepoNotFound")
            self.end_headers()
            self.wfile.write(sent)

        do_GET = do_POST = do_PUT = _answer  # noqa: N815  # http.server's names

        def log_message(self, *args: Any) -> None:
            """Nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        hub.address = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()
