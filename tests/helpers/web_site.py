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
    cut: list[int] = field(default_factory=list)  # bytes after which an answer breaks off, in turn
    announce: bool = True
    chunked: bool = False
    asked: list[str] = field(default_factory=list)
    url: str = ""


def handler(site: Site) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

        def do_GET(self) -> None:
            site.asked.append(self.path)
            if self.path not in site.files:
                self.send_error(404)
                return
            body = site.files[self.path]
            self.send_response(200)
            if site.chunked:
                self.send_header("Transfer-Encoding", "chunked")
            elif site.announce:
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            cut = site.cut.pop(0) if site.cut else len(body)
            if site.chunked:
                self.wfile.write(f"{len(body):x}\r\n".encode() + body[:cut])
                if cut == len(body):
                    self.wfile.write(b"\r\n0\r\n\r\n")
            else:
                self.wfile.write(body[:cut])

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
