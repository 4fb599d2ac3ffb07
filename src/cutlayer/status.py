"""Metrics, health and readiness over HTTP, for the operator's own machine: plain text, no secrets, nothing to be set.

``/metrics`` is for Prometheus, ``/healthz`` says whether the process is well, ``/readyz`` whether clients can come, and
for whom or what its runs wait. Names of runs and clients, losses and counts can be read there; bind it accordingly.
"""

from __future__ import annotations

import contextlib
import json
import socketserver
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from logging import getLogger
from socket import AF_INET6
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import CollectorRegistry, ProcessCollector, make_wsgi_app

from cutlayer.errors import NetworkError
from cutlayer.links.net.tls import is_loopback, split_address
from cutlayer.measures import Measures
from cutlayer.watching import House

LOG = getLogger("cutlayer.net")
SLOW = 10.0  # seconds after which a request that does not come in is dropped


class _Server(socketserver.ThreadingMixIn, WSGIServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Who asks and goes away, or never ends to ask, is nobody's concern."""
        LOG.debug("A request to --status from %s failed.", client_address, exc_info=True)

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)  # HTTPServer's own also asks for the host's full name: slow
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])
        self.setup_environ()


class _Server6(_Server):
    address_family = AF_INET6


class _Handler(WSGIRequestHandler):
    timeout = SLOW

    def log_message(self, format: str, *args: Any) -> None:
        """A line for each scrape is nothing that anybody reads."""


def _application(house: House) -> Callable[..., Iterable[bytes]]:
    registry = CollectorRegistry(auto_describe=False)
    registry.register(Measures(house))
    ProcessCollector(registry=registry)
    metrics = make_wsgi_app(registry)

    def answer(environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        path = environ["PATH_INFO"]
        if environ["REQUEST_METHOD"] not in ("GET", "HEAD"):
            return _said(start, "405 Method Not Allowed", {"error": "Nothing can be set here."})
        if path == "/metrics":
            found: Iterable[bytes] = metrics(environ, start)
            return found
        if path == "/healthz":
            problem = house.well()
            return _said(
                start, "503 Service Unavailable" if problem else "200 OK", {"healthy": not problem, "why": problem}
            )
        if path == "/readyz":
            problem = house.unready()
            told = {"ready": not problem, "why": problem, "runs": {run.name: run.told() for run in list(house.runs)}}
            return _said(start, "503 Service Unavailable" if problem else "200 OK", told)
        return _said(start, "404 Not Found", {"error": "There are /metrics, /healthz and /readyz."})

    return answer


def _said(start: Callable[..., Any], status: str, told: Mapping[str, Any]) -> Iterable[bytes]:
    body = json.dumps(told).encode() + b"\n"
    start(status, [("Content-Type", "application/json"), ("Content-Length", str(len(body)))])
    return [body]


@contextlib.contextmanager
def status_server(address: str | None, house: House, note: Callable[[str], None]) -> Iterator[None]:
    """Answer at ``HOST:PORT`` while the block runs, and note where that is; None: at no address.

    Raises:
        NetworkError: the address cannot be had.
    """
    if address is None:
        yield
        return
    host, port = split_address(address)
    try:
        server = (_Server6 if ":" in host else _Server)((host, port), _Handler)
    except OSError as error:
        raise NetworkError(
            f"--status cannot listen at {address} ({error.strerror or error}). Is another server using port {port}, "
            "and is the address this machine's?"
        ) from error
    server.set_app(_application(house))
    thread = threading.Thread(target=server.serve_forever, name="cutlayer-status", daemon=True)
    thread.start()
    others = "" if is_loopback(host) else ", for whoever reaches this address: keep it from others by a firewall"
    note(f"status at http://{address.rpartition(':')[0]}:{server.server_port}/readyz, in plain text{others}")
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
