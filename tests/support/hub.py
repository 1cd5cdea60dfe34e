"""A hub on the loopback interface: it serves directories the way huggingface.co serves models."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM

from tests.support.paths import ROOT

COMMIT = "0123456789abcdef0123456789abcdef01234567"
_LARGE = (".safetensors", ".bin", ".gguf")


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self) -> None:
        path = self.path.partition("?")[0]
        self.server.asked.append(f"{self.command} {path}")
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            return self._describe("/".join(parts[2:4]), tree=parts[4:5] == ["tree"])
        if parts[0] == "cdn":
            return self._send_file(self.server.root.joinpath(*parts[1:]))
        file = self.server.root.joinpath(*parts[:2], *parts[4:])
        if parts[2:3] != ["resolve"] or not file.is_file():
            return self._refuse(file.parent)
        if file.suffix in _LARGE:  # kept in another store, which the hub sends the client to
            headers = self._headers(file) | {
                "X-Linked-Size": str(file.stat().st_size),
                "X-Linked-ETag": f'"{hashlib.sha256(file.read_bytes()).hexdigest()}"',
                "Location": f"{self.server.url}/cdn/{file.relative_to(self.server.root)}",
            }
            return self._send(302, b"", headers)
        return self._send_file(file)

    def _describe(self, name: str, *, tree: bool) -> None:
        directory = self.server.root / name
        if not directory.is_dir():
            return self._refuse(directory)
        files = [path for path in directory.rglob("*") if path.is_file()]
        listed = [self._entry(path, str(path.relative_to(directory))) for path in files]
        siblings = [{"rfilename": entry["path"]} for entry in listed]
        model = {"id": name, "sha": COMMIT, "private": False, "siblings": siblings}
        self._send(200, json.dumps(listed if tree else model).encode())

    def _entry(self, file: Path, path: str) -> dict[str, Any]:
        data = file.read_bytes()
        entry = {
            "type": "file",
            "path": path,
            "size": len(data),
            "oid": hashlib.sha1(data).hexdigest(),
        }
        if file.suffix not in _LARGE:
            return entry
        large = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
        return entry | {"lfs": large}

    def _refuse(self, directory: Path) -> None:
        code = "EntryNotFound" if directory.is_dir() else "RepoNotFound"
        self._send(404, b"", {"X-Error-Code": code, "X-Error-Message": "not found"})

    def _headers(self, file: Path) -> dict[str, str]:
        digest = hashlib.sha1(file.read_bytes()).hexdigest()
        return {"X-Repo-Commit": COMMIT, "ETag": f'"{digest}"'}

    def _send_file(self, file: Path) -> None:
        self._send(200, file.read_bytes(), self._headers(file))

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


class Hub(ThreadingHTTPServer):
    """Serves ``root/organisation/name`` as the model ``organisation/name``."""

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root = root
        self.asked: list[str] = []
        """Method and path of each request."""
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def environment(self, home: Path) -> dict[str, str]:
        """Variables of a process that knows this hub and no other, with its cache in ``home``."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_OFFLINE": "0",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }

    def run(self, *words: str, cwd: Path, home: Path) -> subprocess.CompletedProcess[str]:
        """Run a command in a process that knows this hub and no other."""
        environment = {**os.environ, "PYTHONPATH": str(ROOT), **self.environment(home)}
        return subprocess.run(
            [sys.executable, *words],
            cwd=cwd, env=environment, capture_output=True, text=True, timeout=120,
        )  # fmt: skip


def publish(model: Path, target: Path, shard_size: str) -> None:
    """Copy a model into a hub's directory in the layout of a current one: several shards, and the chat
    template in a file."""
    shutil.copytree(model, target)
    (target / "model.safetensors").unlink()
    AutoModelForCausalLM.from_pretrained(model).save_pretrained(target, max_shard_size=shard_size)
    assert len(list(target.glob("model-*-of-*.safetensors"))) > 1
    assert (target / "chat_template.jinja").is_file()


@contextmanager
def serve(root: Path) -> Iterator[Hub]:
    """Serve a directory of models until the context ends."""
    hub = Hub(root)
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()
