"""A local HTTP server of a few bytes, with byte ranges, ETags, and failures on demand."""

import hashlib
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Served:
    """`files`: path -> content; `sent`: bytes of content per path; `fail_after`: bytes until the connection is cut."""

    def __init__(self):
        self.files, self.sent, self.fail_after, self.ranges, self.tags = {}, {}, None, True, True
        self.lock = threading.Lock()
        self.requested = []

    @property
    def total(self) -> int:
        return sum(self.sent.values())


@contextmanager
def serve():
    """(what is served, address)."""
    served = Served()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def do_HEAD(self):
            self.answer(False)

        def do_GET(self):
            self.answer(True)

        def answer(self, body):
            content = served.files.get(self.path)
            if content is None:
                self.send_response(404)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            first, last, status = 0, len(content) - 1, 200
            asked = self.headers.get("Range")
            if asked and served.ranges:
                low, _, high = asked.removeprefix("bytes=").partition("-")
                first, last, status = int(low), min(int(high or last), last), 206
            part = content[first : last + 1]
            self.send_response(status)
            self.send_header("Content-Length", str(len(part)))
            self.send_header("Content-Type", "application/octet-stream")
            if served.ranges:
                self.send_header("Accept-Ranges", "bytes")
            if served.tags:
                self.send_header("ETag", hashlib.sha256(content).hexdigest())
            if status == 206:
                self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
            self.end_headers()
            if not body:
                return
            with served.lock:
                served.requested.append((self.path, first))
                cut = served.fail_after is not None and len(part) > served.fail_after
                part = part[: served.fail_after] if cut else part
                if served.fail_after is not None:
                    served.fail_after -= len(part)
                served.sent[self.path] = served.sent.get(self.path, 0) + len(part)
            try:
                self.wfile.write(part)
            except OSError:  # the reader has had enough
                cut = True
            self.close_connection = cut

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield served, f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
