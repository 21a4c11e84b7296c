"""A hub of datasets on loopback, so that the real loading code of `datasets` runs, and a test needs no network."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import datasets
import pytest
from huggingface_hub import constants

COMMIT = "a" * 40


@contextmanager
def serving(
    folder: Path,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    cache: Path,
    kind: str = "datasets",
    refuses: tuple[int, dict[str, str]] | None = None,
) -> Iterator[None]:
    """Serve the files of `folder` as the dataset `name`, or the repository of `"models"`, to the hub's client; or
    answer all with a status and headers."""

    class Hub(_Hub):
        root = folder
        dataset, api_of, always = name, kind, refuses

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", url)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()


class _Hub(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    root: Path
    dataset: str
    api_of: str
    always: tuple[int, dict[str, str]] | None

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def log_message(self, *arguments: Any) -> None:
        """Nothing on standard error."""

    def _answer(self, with_body: bool) -> None:
        path = self.path.partition("?")[0]
        place = f"{self.api_of}/{self.dataset}"
        api, files = f"/api/{place}", f"/{place.removeprefix('models/')}/resolve/"
        if self.always is not None:
            status, headers = self.always
            self._send(b"{}", with_body, status=status, **headers)
        elif path.startswith(f"{api}/tree/"):
            folder = self.root / path.removeprefix(f"{api}/tree/").partition("/")[2]
            if not folder.is_dir():
                self._send(b"", with_body, status=404, **{"X-Error-Code": "EntryNotFound"})
                return
            entries = sorted(folder.rglob("*") if "recursive=true" in self.path.lower() else folder.iterdir())
            self._send(json.dumps([self._entry(entry) for entry in entries]).encode(), with_body)
        elif path.startswith(api):
            names = [str(file.relative_to(self.root)) for file in self.root.rglob("*") if file.is_file()]
            info = {"id": self.dataset, "sha": COMMIT, "siblings": [{"rfilename": name} for name in names]}
            self._send(json.dumps({**info, "private": False, "gated": False, "tags": []}).encode(), with_body)
        elif path.startswith(files) and (file := self.root / path.removeprefix(files).partition("/")[2]).is_file():
            content = file.read_bytes()
            tag = f'"{hashlib.md5(content).hexdigest()}"'
            self._send(content, with_body, **{"ETag": tag, "X-Repo-Commit": COMMIT})
        else:
            self._send(b"", with_body, status=404, **{"X-Error-Code": "EntryNotFound"})

    def _entry(self, path: Path) -> dict[str, Any]:
        kind = "directory" if path.is_dir() else "file"
        size = 0 if path.is_dir() else path.stat().st_size
        return {"type": kind, "path": str(path.relative_to(self.root)), "size": size, "oid": "b" * 40}

    def _send(self, body: bytes, with_body: bool, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)
