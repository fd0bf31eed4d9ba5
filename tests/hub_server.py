"""A Hugging Face hub on this machine that has one data set: as much of its API as the libraries ask for."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlparse


@contextmanager
def hub(folder: Path, name: str) -> Iterator[tuple[str, list[str]]]:
    """Serve a folder as the repository ``name``; gives the address, and what was downloaded so far."""
    downloads: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def answer(self, code: int, body: bytes = b"", **headers: str) -> None:
            self.send_response(code)
            for key, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(key.replace("_", "-"), value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = unquote(urlparse(self.path).path)
            files, api = f"/datasets/{name}/resolve/", f"/api/datasets/{name}/"
            if path == "/":
                self.answer(200)
            elif path.startswith(files):
                self.file(path.removeprefix(files).partition("/")[2])
            elif path.startswith(f"{api}tree/"):
                self.listing(path.removeprefix(f"{api}tree/").partition("/")[2])
            elif path.startswith(api):
                self.answer(200, json.dumps({"id": name, "sha": revision(folder), "siblings": []}).encode())
            else:
                self.answer(404, X_Error_Code="RepoNotFound")

        def file(self, path: str) -> None:
            if not (folder / path).is_file():
                self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=revision(folder))
                return
            if self.command == "GET":
                downloads.append(path)
            content = (folder / path).read_bytes()
            tag = hashlib.sha1(content).hexdigest()
            self.answer(200, content, ETag=f'"{tag}"', X_Repo_Commit=revision(folder))

        def listing(self, path: str) -> None:
            entries: list[dict[str, Any]] = []
            for found in sorted((folder / path).iterdir()) if (folder / path).is_dir() else ():
                tag = hashlib.sha1(found.read_bytes() if found.is_file() else b"").hexdigest()
                entry = {"type": "directory", "path": found.relative_to(folder).as_posix(), "oid": tag}
                entries.append({**entry, "type": "file", "size": found.stat().st_size} if found.is_file() else entry)
            self.answer(200, json.dumps(entries).encode(), Content_Type="application/json")

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", downloads
        finally:
            server.shutdown()
            thread.join()


def revision(folder: Path) -> str:
    """That of the content, as a commit is named."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return hashlib.sha1(b"".join(hashlib.sha1(file.read_bytes()).digest() for file in files)).hexdigest()
