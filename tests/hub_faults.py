"""The wire of tests/hub_server.py, and its faults: a hub that answers wrongly, late, half, or with other bytes."""

import contextlib
import json
import re
import socket
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from typing import NamedTuple
from urllib.parse import parse_qsl, unquote


class Refused(Exception):
    """An answer that is not 2xx, with the Hub's error headers."""

    def __init__(self, status, message, code=None, headers=None):
        super().__init__(message)
        self.status, self.message = status, message
        self.headers = {**(headers or {}), "X-Error-Message": message, **({"X-Error-Code": code} if code else {})}


class Request(NamedTuple):
    """What was asked; the names of the headers are in lower case."""

    method: str
    path: str  # with the query
    headers: dict[str, str]


class Reply(NamedTuple):
    body: bytes = b""
    status: int = 200
    headers: dict = {}  # noqa: RUF012
    is_file: bool = False  # ranges of it can be asked for


@dataclass
class Call:
    """A request while it is answered."""

    head: bool
    query: dict
    user: str | None
    can_write: bool
    body: bytes

    @property
    def json(self):
        return json.loads(self.body or b"{}")


@dataclass
class Fault:
    kind: str
    method: str
    pattern: re.Pattern
    times: int | None
    status: int = 0
    headers: dict | None = None
    message: str = ""
    after: int = 0
    seconds: float = 0.0
    done: bool = False

    @property
    def refusal(self):
        return Refused(self.status, self.message, headers=self.headers)


class Faults:
    """What a test asks the server to do wrong.

    A path is a regular expression, searched in the unquoted path. The bytes of an LFS file come from
    /cdn/{org}/{name}/{commit}/{path}, those of a small file from /{org}/{name}/resolve/{revision}/{path}.
    """

    def __init__(self):
        self.lock = threading.RLock()
        self._faults: list[Fault] = []
        self._replaced: dict[tuple[str, str], tuple[bytes, bool]] = {}
        self._etags: list[tuple[re.Pattern, str | None]] = []

    def fail(self, method="GET", path="", status=500, times=1, headers=None, message="Internal Error", done=False):
        """Answer the next `times` requests (None: all) with this status. The method "*" is every method.

        With done=True what was asked for is done all the same: a commit that happened, and whose answer went wrong.
        """
        self._add(Fault("fail", method, re.compile(path), times, status, headers or {}, message, done=done))

    def drop(self, path, after, times=1, method="GET"):
        """Close the connection after so many bytes of a GET's body; of another method's request, and give no answer."""
        self._add(Fault("drop", method, re.compile(path), times, after=after))

    def delay(self, path, seconds, times=None, method="*"):
        """Wait before the answer."""
        self._add(Fault("delay", method, re.compile(path), times, seconds=seconds))

    def replace(self, repo, file, data, keep_etag=True):
        """Send other bytes for a file, at every revision.

        HEAD goes on with the etag and the size of what was committed, as if the file were swapped or spoilt in the
        storage; with keep_etag=False it has those of the new bytes.
        """
        with self.lock:
            self._replaced[repo, file] = (data, keep_etag)

    def tag(self, path, form):
        """Give the files of a path an etag of another form, in which {} stands for the right one; None: give none."""
        with self.lock:
            self._etags.append((re.compile(path), form))

    def etag_of(self, path, header, etag):
        """The header of a file's etag."""
        form = next((form for pattern, form in self._etags if pattern.search(path)), '"{}"')
        return {} if form is None else {header: form.format(etag)}

    def heal(self):
        """Do everything right again."""
        with self.lock:
            self._faults.clear()
            self._replaced.clear()
            self._etags.clear()

    def _add(self, fault):
        with self.lock:
            self._faults += [fault] if fault.times != 0 else []

    def _take(self, kind, method, path):
        """The first fault of this kind that is meant for this request, once less often from now on."""
        with self.lock:
            for fault in self._faults:
                if fault.kind == kind and fault.method in ("*", method) and fault.pattern.search(path):
                    if fault.times is None:
                        return fault
                    fault.times -= 1
                    if not fault.times:
                        self._faults.remove(fault)
                    return fault
        return None


class Listener(ThreadingHTTPServer):
    request_queue_size = 64

    def __init__(self, hub, is_cdn):
        self.hub, self.is_cdn, self._connections = hub, is_cdn, set()
        super().__init__(("127.0.0.1", 0), Handler)

    def server_bind(self):
        TCPServer.server_bind(self)  # HTTPServer's looks up the name of the address, which can take seconds
        self.server_name, self.server_port = self.server_address[:2]

    def process_request(self, request, client_address):
        self._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request):
        self._connections.discard(request)
        super().shutdown_request(request)

    def hang_up(self):
        for connection in list(self._connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request, client_address):
        if not isinstance(sys.exc_info()[1], OSError):  # clients that hang up are no mistake of the server
            self.hub.errors.append(traceback.format_exc())


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body are two writes
    timeout = 60

    def log_message(self, *_):
        pass

    def _serve(self):
        hub, is_cdn = self.server.hub, self.server.is_cdn
        raw, _, query = self.path.partition("?")
        path = unquote(raw)
        headers = {name.lower(): value for name, value in self.headers.items()}
        hub.requests.append(Request(self.command, self.path, headers))
        if late := hub._take("delay", self.command, path):
            time.sleep(late.seconds)
        body = self._read(hub._take("drop", self.command, path) if self.command != "GET" else None)
        if body is None:
            self.close_connection = True
            return
        try:
            fault = hub._take("fail", self.command, path)
            if fault and not fault.done:
                raise fault.refusal
            if is_cdn and "authorization" in headers:
                raise Refused(400, "Only one auth mechanism allowed: the link is signed, and a token came with it")
            user, can_write = hub.user(headers)
            call = Call(self.command == "HEAD", dict(parse_qsl(query, True)), user, can_write, body)
            reply = hub.answer(call, "GET" if call.head else self.command, raw, is_cdn)
            if fault:
                raise fault.refusal
        except Refused as refused:
            text = json.dumps({"error": refused.message}).encode()
            reply = Reply(text, refused.status, {"Content-Type": "application/json", **refused.headers})
        except Exception as error:
            hub.errors.append(traceback.format_exc())
            reply = Reply(f"The test hub has an error: {error!r}".encode(), 500)
        self._send(self._part(reply), hub, path)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve

    def _read(self, drop):
        """The request's body; None if it did not come to its end."""
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            body = b""
            while size := int(self.rfile.readline().split(b";")[0] or b"-1", 16):
                body += (chunk := self.rfile.read(max(size, 0)))
                if size < 0 or len(chunk) < size or (drop and len(body) >= drop.after):
                    return None
                self.rfile.readline()
            self.rfile.readline()
            return None if drop else body
        length = int(self.headers.get("Content-Length", 0))
        body = self.rfile.read(min(drop.after, length) if drop else length)
        return None if drop or len(body) < length else body

    def _part(self, reply):
        """The range that was asked for."""
        asked = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if not reply.is_file or not asked or reply.status != 200:
            return reply
        size = len(reply.body)
        if asked[1]:
            first, last = int(asked[1]), min(int(asked[2] or size), size - 1)
        else:
            first, last = max(size - int(asked[2] or 0), 0), size - 1
        if first > last:
            return Reply(b"", 416, {"Content-Range": f"bytes */{size}"})
        headers = {**reply.headers, "Content-Range": f"bytes {first}-{last}/{size}"}
        return Reply(reply.body[first : last + 1], 206, headers, True)

    def _send(self, reply, hub, path):
        self.send_response(reply.status)
        for name, value in {"Accept-Ranges": "bytes", **reply.headers}.items():
            self.send_header(name, value.encode("ascii", "backslashreplace").decode().replace("\n", " "))
        self.send_header("Content-Length", str(len(reply.body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        drop = hub._take("drop", "GET", path) if self.command == "GET" and reply.status in (200, 206) else None
        self.wfile.write(reply.body[: drop.after] if drop else reply.body)
        self.close_connection = self.close_connection or drop is not None
