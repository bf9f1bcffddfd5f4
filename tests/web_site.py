"""A web server on this machine that has files, and its faults."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

# Long enough to be sent in several pieces.
ENTRIES = [{"input": f"word{i}", "output": f"Word{i}"} for i in range(4000)]
CONTENT = json.dumps(ENTRIES, indent=1).encode()
SHA256 = hashlib.sha256(CONTENT).hexdigest()
HALF = len(CONTENT) // 2


@dataclass
class Site:
    """What a web server has, how it behaves, and what it was asked."""

    files: dict[str, bytes]
    ranges: bool = True
    skewed: bool = False  # answers a range with another one
    cut: list[int] = field(default_factory=list)  # bytes after which an answer breaks off, in turn
    announce: bool = True
    chunked: bool = False
    asked: list[tuple[str, str | None]] = field(default_factory=list)
    url: str = ""


def handler(site: Site) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

        def do_GET(self) -> None:
            span = self.headers["Range"]
            site.asked.append((self.path, span))
            if self.path not in site.files:
                self.send_error(404)
                return
            body, start = site.files[self.path], 0
            if span and site.ranges:
                start = int(span.removeprefix("bytes=").removesuffix("-"))
                if start >= len(body):
                    self.send_error(416)
                    return
                start = max(0, start - 5) if site.skewed else start
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
            else:
                self.send_response(200)
            rest = body[start:]
            if site.chunked:
                self.send_header("Transfer-Encoding", "chunked")
            elif site.announce:
                self.send_header("Content-Length", str(len(rest)))
            self.end_headers()
            cut = site.cut.pop(0) if site.cut else len(rest)
            if site.chunked:
                self.wfile.write(f"{len(rest):x}\r\n".encode() + rest[:cut])
                if cut == len(rest):
                    self.wfile.write(b"\r\n0\r\n\r\n")
            else:
                self.wfile.write(rest[:cut])

        protocol_version = "HTTP/1.1"

        def handle(self) -> None:
            self.close_connection = True  # one answer per connection, whole or not
            self.handle_one_request()

    return Handler


@contextmanager
def serving(site: Site) -> Iterator[Site]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(site))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    site.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield site
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
