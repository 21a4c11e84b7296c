"""A server on loopback that answers as a judge does, well or badly."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Body = dict[str, Any]
Reply = tuple[int, dict[str, str], bytes]


class JudgeServer:
    """Answers with what `reply` makes of a request's body and its number, and remembers the requests.

    A header `Pause` has seconds between the bytes of an answer.
    """

    def __init__(self, reply: Callable[[Body, int], Reply]) -> None:
        self.requests: list[tuple[dict[str, str], Body]] = []
        self.reply = reply
        self.url = ""


def verdict(text: Any, usage: Any = None, reason: str = "stop") -> Reply:
    """A proper answer that says `text` and ends for a `reason`."""
    message = {"role": "assistant", "content": text}
    content: Body = {"choices": [{"index": 0, "message": message, "finish_reason": reason}]}
    if usage is not None:
        content["usage"] = usage
    return 200, {}, json.dumps(content).encode()


@contextmanager
def judging(reply: Callable[[Body, int], Reply]) -> Iterator[JudgeServer]:
    """Serve on a free port."""
    judge = JudgeServer(reply)
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                judge.requests.append(({**dict(self.headers), "path": self.path}, body))
                number = len(judge.requests)
            status, headers, content = judge.reply(body, number)
            if status == 0:  # hang up
                return
            self.send_response(status)
            for name, value in {"Content-Length": str(len(content)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            pause = float(headers.get("Pause", 0))
            if not pause:
                self.wfile.write(content)
                return
            with contextlib.suppress(OSError):  # the one who asked has gone
                for start in range(len(content)):
                    self.wfile.write(content[start : start + 1])
                    time.sleep(pause)

        def log_message(self, *arguments: Any) -> None:
            """Nothing on standard error."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.block_on_close = False
    threading.Thread(target=server.serve_forever, daemon=True).start()
    judge.url = f"http://127.0.0.1:{server.server_port}/v1"
    try:
        yield judge
    finally:
        server.shutdown()
        server.server_close()
