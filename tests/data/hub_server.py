"""A small server that answers as the Hugging Face Hub does, for a folder of repositories, on 127.0.0.1.

``root/datasets/owner/name/...`` and ``root/models/owner/name/...`` are the repositories. It knows what
``datasets.load_dataset`` and ``from_pretrained`` ask: a repository's description, its tree, paths-info and its files
(whole or by range). Every revision is the same one commit. Requests are recorded. Use it as::

    with HubServer(root) as hub:
        run_in_a_subprocess(env=hub.environment(home))   # HF_ENDPOINT is read when the libraries are imported
        assert "/owner/name/resolve/main/config.json" in [path for _, path in hub.requests]
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
API = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree|paths-info)/([^/]+)(?:/(.+))?)?")
FILE = re.compile(r"/(?:(datasets|models)/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")


class HubServer:
    """The server in a thread, as a context manager; ``url`` is what ``HF_ENDPOINT`` must be."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.requests: list[tuple[str, str]] = []  # method and path, without the query
        self.sent: dict[str, int] = {}  # path -> bytes of file content that were sent
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> HubServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def environment(self, home: Path) -> dict[str, str]:
        """This process's environment, but with this Hub, online, with an empty cache and no proxy or login."""
        ours = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and "proxy" not in k.lower()}
        ours.pop("TRANSFORMERS_OFFLINE", None)
        return {**ours, "HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1"}


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        """Nothing on stderr."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def _answer(self) -> None:
        url = urlsplit(self.path)
        path = unquote(url.path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.requests.append((self.command, path))
        if found := FILE.fullmatch(path):
            self._file(path, found[1] or "models", found[2], found[4])
        elif found := API.fullmatch(path):
            kind, name, what, _, inside = found.groups()
            folder = self.hub.root / kind / name
            if not folder.is_dir():
                self._refuse(404, "RepoNotFound")
            elif what == "tree":
                recursive = parse_qs(url.query).get("recursive", ["false"])[0].lower() in ("true", "1")
                self._tree(folder, inside or "", recursive=recursive)
            elif what == "paths-info":
                self._paths_info(folder, body)
            else:
                self._json(_description(name, folder))
        else:
            self._refuse(404, "EntryNotFound")

    def _file(self, path: str, kind: str, name: str, file: str) -> None:
        folder = self.hub.root / kind / name
        if not folder.is_dir():
            return self._refuse(404, "RepoNotFound")
        if not (folder / file).is_file():
            return self._refuse(404, "EntryNotFound")
        content = (folder / file).read_bytes()
        whole = len(content)
        status, headers = 200, {"ETag": f'"{_oid(content)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            first, last = int(wanted[1]), min(int(wanted[2] or whole - 1), whole - 1)
            if first >= whole:
                return self._refuse(416, "RangeNotSatisfiable")
            content, status = content[first : last + 1], 206
            headers["Content-Range"] = f"bytes {first}-{last}/{whole}"
        if self.command == "GET":
            self.hub.sent[path] = self.hub.sent.get(path, 0) + len(content)
        return self._send(status, content, headers)

    def _tree(self, folder: Path, inside: str, *, recursive: bool) -> None:
        if not (folder / inside).is_dir():
            return self._refuse(404, "EntryNotFound")
        found = (folder / inside).rglob("*") if recursive else (folder / inside).iterdir()
        return self._json([_entry(folder, path) for path in sorted(found)])

    def _paths_info(self, folder: Path, body: bytes) -> None:
        if "json" in (self.headers.get("Content-Type") or ""):
            wanted = json.loads(body)["paths"]
        else:
            wanted = parse_qs(body.decode()).get("paths", [])
        self._json([_entry(folder, folder / path) for path in wanted if (folder / path).exists()])

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _refuse(self, status: int, code: str) -> None:
        self._send(status, b'{"error": "no"}', {"X-Error-Code": code, "X-Error-Message": code})

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


def _description(name: str, folder: Path) -> dict[str, Any]:
    files = [{"rfilename": path.relative_to(folder).as_posix()} for path in _files(folder)]
    common = {"private": False, "gated": False, "disabled": False, "tags": [], "downloads": 0, "likes": 0}
    return {"_id": "0", "id": name, "sha": COMMIT, "siblings": files, **common}


def _entry(folder: Path, path: Path) -> dict[str, Any]:
    name = path.relative_to(folder).as_posix()
    if path.is_dir():
        return {"type": "directory", "path": name, "oid": _oid(name.encode()), "size": 0}
    return {"type": "file", "path": name, "oid": _oid(path.read_bytes()), "size": path.stat().st_size}


def _oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
