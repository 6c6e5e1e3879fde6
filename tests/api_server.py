"""A local OpenAI-compatible API that answers, counts, and misbehaves on purpose."""

from __future__ import annotations

import json
import socket
import struct
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass(frozen=True)
class Reply:
    """What the server does with a question; by default it sends `content` as a completion."""

    content: str | None = ""
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes | None = None  # in place of the completion
    silent: bool = False  # holds the connection open until `release`
    reset: bool = False  # breaks the connection

    def bytes(self) -> bytes:
        if self.body is not None:
            return self.body
        if self.status != 200:
            return json.dumps({"error": {"message": "on purpose"}}).encode()
        message = {"role": "assistant", "content": self.content}
        choice = {"index": 0, "finish_reason": "stop", "message": message}
        return json.dumps(
            {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
        ).encode()


class ApiServer(ThreadingHTTPServer):
    """Starts on entering the context.

    Args:
        reply: (question, request number from 1) -> Reply; the question is the content of the last message.

    Attributes:
        requests: bodies of all requests, in order.
        answered: questions that were answered in full, in order.
    """

    daemon_threads = True

    def __init__(self, reply: Callable[[str, int], Reply]):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.reply, self.requests, self.answered = reply, [], []
        self.lock, self.released = threading.Lock(), threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def release(self) -> None:
        """Let go of every connection that is held open."""
        self.released.set()

    def __enter__(self) -> ApiServer:
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.release()
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body are two writes
    server: ApiServer

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        question = body["messages"][-1]["content"]
        with self.server.lock:
            self.server.requests.append(body)
            reply = self.server.reply(question, len(self.server.requests))
            if reply.status == 200 and not reply.silent and not reply.reset:
                self.server.answered.append(question)
        if reply.silent:
            self.server.released.wait()
            self.close_connection = True
            return
        if reply.reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            self.rfile.close()
            self.wfile.close()
            self.connection.close()  # a reset, not an orderly end
            return
        data = reply.bytes()
        self.send_response(reply.status)
        for name, value in {"Content-Type": "application/json", **reply.headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: object) -> None:
        pass
