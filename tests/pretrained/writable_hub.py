"""A hub on loopback that takes uploads, as huggingface_hub makes them without Xet: a commit, and LFS for weights."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from huggingface_hub import constants

TOKEN = "hf_aSecretThatNobodyMaySee"


@dataclass
class Hub:
    """What it has."""

    url: str = ""
    repositories: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What each was created with."""
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    stored: dict[str, bytes] = field(default_factory=dict)
    """LFS's objects by their sha256."""
    requests: list[str] = field(default_factory=list)
    refuses: str = ""
    """A part of the paths that are answered with 403."""


@contextmanager
def writable_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Serve one, with the hub's client pointed there and logged in."""
    hub = Hub()

    class Handler(_Handler):
        state = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # its native client talks to a storage of its own
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: Hub

    def do_GET(self) -> None:
        self._answer(b"")

    def do_POST(self) -> None:
        self._answer(self._body())

    def do_PUT(self) -> None:
        body = self._body()
        oid = self.path.rpartition("/")[2]
        assert hashlib.sha256(body).hexdigest() == oid
        self.state.stored[oid] = body
        self._send({})

    def log_message(self, *arguments: Any) -> None:
        """Nothing on standard error."""

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _answer(self, body: bytes) -> None:
        hub, path = self.state, self.path.partition("?")[0]
        hub.requests.append(f"{self.command} {path}")
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._send({"error": "Invalid username or password."}, 401)
        elif hub.refuses and hub.refuses in path:
            self._send({"error": "You don't have the rights to create a model under this namespace"}, 403)
        elif path == "/api/whoami-v2":
            self._send({"type": "user", "name": "me", "orgs": []})
        elif path == "/api/validate-yaml":
            self._send({"warnings": [], "errors": []})
        elif path == "/api/repos/create":
            wanted = json.loads(body)
            name = f"{wanted['organization'] or 'me'}/{wanted['name']}"
            known = name in hub.repositories
            hub.repositories.setdefault(name, wanted)
            self._send({"url": f"{hub.url}/{name}", "name": name}, 409 if known else 200)
        elif "/preupload/" in path:
            files = [
                {"path": file["path"], "uploadMode": _mode(file["path"]), "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            self._send({"files": files})
        elif path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**wanted, "actions": {"upload": {"href": f"{hub.url}/storage/{wanted['oid']}"}}}
                for wanted in json.loads(body)["objects"]
            ]
            self._send({"transfer": "basic", "objects": objects})
        elif "/commit/" in path:
            self._commit(path.removeprefix("/api/models/").partition("/commit/")[0], body)
        else:
            self._send({"error": "Entry not found"}, 404)

    def _commit(self, name: str, body: bytes) -> None:
        files = self.state.files.setdefault(name, {})
        for line in body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                assert value["encoding"] == "base64"
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                files[value["path"]] = self.state.stored[value["oid"]]
        commit = "c" * 40
        self._send({"success": True, "commitOid": commit, "commitUrl": f"{self.state.url}/{name}/commit/{commit}"})

    def _send(self, content: Any, status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def _mode(path: str) -> str:
    return "lfs" if path.endswith(".safetensors") else "regular"
