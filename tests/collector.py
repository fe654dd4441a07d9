"""An OTLP/HTTP collector on a real socket: what it was sent, decoded; it may be told to fail or to hang."""

from __future__ import annotations

import gzip
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

FORMS: dict[str, Any] = {"/v1/traces": ExportTraceServiceRequest, "/v1/logs": ExportLogsServiceRequest}


@dataclass
class Collector:
    """What came, by path, and how the next request is answered: with ``status``, once ``hang`` is set."""

    url: str = ""
    status: int = 200
    hang: threading.Event = field(default_factory=threading.Event)
    arrived: threading.Event = field(default_factory=threading.Event)
    received: list[tuple[str, Any]] = field(default_factory=list)

    def spans(self) -> dict[str, Any]:
        """Return the spans by kind: 2 of a server, 3 of a client."""
        requests = [one for path, one in self.received if path == "/v1/traces"]
        scopes = [scope for one in requests for resource in one.resource_spans for scope in resource.scope_spans]
        return {f"{span.kind}": span for scope in scopes for span in scope.spans}

    def records(self) -> list[Any]:
        """Return the log records in the order in which they came."""
        requests = [one for path, one in self.received if path == "/v1/logs"]
        scopes = [scope for one in requests for resource in one.resource_logs for scope in resource.scope_logs]
        return [record for scope in scopes for record in scope.log_records]


@contextmanager
def collecting() -> Iterator[Collector]:
    """Run a collector that answers."""
    found = Collector()
    found.hang.set()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            found.arrived.set()
            found.hang.wait(30)
            found.received.append((self.path, FORMS[self.path].FromString(body)))
            self.send_response(found.status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    found.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield found
    finally:
        found.hang.set()
        server.shutdown()
        thread.join()
        server.server_close()


def attributes(one: Any) -> dict[str, Any]:
    """Return the attributes of a span, record or resource as plain values; those of several parts as messages."""
    kinds = {pair.key: (pair.value, pair.value.WhichOneof("value")) for pair in one.attributes}
    return {key: None if kind is None else getattr(value, kind) for key, (value, kind) in kinds.items()}
