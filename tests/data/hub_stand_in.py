"""A server that speaks as much of the Hugging Face hub as fetching data sets needs, and keeps what was asked."""

import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit


def commit_of(files: dict[str, bytes]) -> str:
    return hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()


@dataclass
class Repository:
    """The files of a data set, by branch."""

    main: dict[str, bytes] = field(default_factory=dict)
    converted: dict[str, bytes] | None = None
    """Of the hub's own branch of parquet files; None where there is none."""
    gated: bool = False
    """Whether its files, and who may see that it is there, need a token."""

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        for branch, files in (("main", self.main), ("refs/convert/parquet", self.converted)):
            if files is not None and revision in (branch, commit_of(files)):
                return commit_of(files), files
        return None


class StandIn:
    """The server; a context."""

    def __init__(self, repositories: dict[str, Repository]) -> None:
        self.repositories, self.asked, self.tokens = repositories, list[str](), list[str | None]()
        self.swapped = dict[str, bytes]()
        """Files by their paths, of which other content than is listed comes."""
        stand_in = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                stand_in.answer(self, body=True)

            def do_HEAD(self) -> None:
                stand_in.answer(self, body=False)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> "StandIn":
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def answer(self, request: BaseHTTPRequestHandler, body: bool) -> None:
        path, token = unquote(urlsplit(request.path).path), request.headers.get("Authorization")
        self.asked.append(path)
        self.tokens.append(token)
        listed = path.startswith("/api/datasets/")
        name, _, rest = (
            path.removeprefix("/api").removeprefix("/datasets/").partition("/revision/" if listed else "/resolve/")
        )
        repository = self.repositories.get(name)
        if repository is None:
            return self._refuse(request, 401, "RepoNotFound")
        if repository.gated and token is None:
            return self._refuse(request, 401, "GatedRepo")
        revision, _, file = (rest or "main", "", "") if listed else rest.partition("/")
        found = repository.at(revision)
        if found is None:
            return self._refuse(request, 404, "RevisionNotFound")
        commit, files = found
        if listed:
            return self._send(request, json.dumps(_info(name, commit, files)).encode(), {}, body)
        content = self.swapped.get(file, files[file])
        return self._send(request, content, {"ETag": f'"{_sha256(files[file])}"', "X-Repo-Commit": commit}, body)

    def _refuse(self, request: BaseHTTPRequestHandler, status: int, code: str) -> None:
        request.send_response(status)
        request.send_header("X-Error-Code", code)
        request.send_header("Content-Length", "0")
        request.end_headers()

    def _send(self, request: BaseHTTPRequestHandler, content: bytes, headers: dict[str, str], body: bool) -> None:
        request.send_response(200)
        for name, value in ({"Content-Length": str(len(content))} | headers).items():
            request.send_header(name, value)
        request.end_headers()
        if body:
            request.wfile.write(content)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _info(name: str, commit: str, files: dict[str, bytes]) -> dict[str, Any]:
    """Return what the hub says of a data set: the shape that huggingface_hub reads."""
    siblings = [
        {
            "rfilename": path,
            "size": len(content),
            "blobId": hashlib.sha1(content).hexdigest(),
            "lfs": {"sha256": _sha256(content), "size": len(content), "pointerSize": 130},
        }
        for path, content in files.items()
    ]
    return {"id": name, "sha": commit, "siblings": siblings, "tags": [], "private": False}
