"""The few calls of the hub's API that an upload makes, on localhost: what huggingface_hub 2 sends."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Hub:
    """What has arrived.

    Attributes:
        repos: created repositories: the request's body by name.
        branches: made, as ORG/NAME@branch.
        objects: large files by sha256.
        files: committed files by path, with their content or sha256.
        puts: how many large files were sent.
        refuse_commits: how many commits to refuse from now on.
        requests: method and path of every request, headers included.
    """

    url: str = ""
    repos: dict[str, Any] = field(default_factory=dict)
    branches: list[str] = field(default_factory=list)
    objects: dict[str, bytes] = field(default_factory=dict)
    files: dict[str, Any] = field(default_factory=dict)
    puts: int = 0
    refuse_commits: int = 0
    licenses: dict[str, str] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)


@contextmanager
def running() -> Iterator[Hub]:
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def answer(self, body: Any, status: int = 200) -> None:
            content = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") == "chunked":
                parts = []
                while size := int(self.rfile.readline(), 16):
                    parts.append(self.rfile.read(size))
                    self.rfile.readline()
                self.rfile.readline()
                return b"".join(parts)
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))

        def do_GET(self) -> None:
            hub.requests.append(f"GET {self.path}")
            name = self.path.removeprefix("/api/models/").partition("?")[0].partition("/revision/")[0]
            if name in hub.licenses:
                card = {"license": hub.licenses[name]}
                return self.answer({"id": name, "cardData": card, "siblings": [], "sha": "0" * 40})
            return self.answer({"error": "not found"}, 404)

        def do_PUT(self) -> None:
            hub.objects[self.path.rsplit("/", 1)[1]] = self.body()
            hub.puts += 1
            self.answer({})

        def do_POST(self) -> None:
            body, path = self.body(), self.path
            hub.requests.append(f"POST {path}")
            if path == "/api/repos/create":
                values = json.loads(body)
                if values["name"] == "forbidden":
                    return self.answer({"error": "no"}, 401)
                name = f"{values.get('organization') or 'me'}/{values['name']}"
                hub.repos.setdefault(name, values)
                return self.answer({"url": f"{hub.url}/{name}", "name": name, "id": name})
            if "/branch/" in path:
                repo, _, branch = path.removeprefix("/api/models/").partition("/branch/")
                hub.branches.append(f"{repo}@{branch}")
                return self.answer({})
            if path == "/api/validate-yaml":
                return self.answer({"errors": [], "warnings": []})
            if "/preupload/" in path:
                files = json.loads(body)["files"]
                modes = [
                    {
                        "path": f["path"],
                        "uploadMode": "lfs" if f["path"].endswith((".safetensors", ".png")) else "regular",
                        "shouldIgnore": False,
                    }
                    for f in files
                ]
                return self.answer({"files": modes})
            if path.endswith("/info/lfs/objects/batch"):
                objects = []
                for wanted in json.loads(body)["objects"]:
                    there = wanted["oid"] in hub.objects
                    href = {"href": f"{hub.url}/lfs/{wanted['oid']}"}
                    objects.append({**wanted, **({} if there else {"actions": {"upload": href}})})
                return self.answer({"transfer": "basic", "objects": objects})
            if "/commit/" in path:
                if hub.refuse_commits:
                    hub.refuse_commits -= 1
                    return self.answer({"error": "cut short"}, 400)
                import base64

                for line in body.splitlines():
                    entry = json.loads(line)
                    value = entry["value"]
                    if entry["key"] == "file":
                        hub.files[value["path"]] = base64.b64decode(value["content"]).decode()
                    elif entry["key"] == "lfsFile":
                        assert value["oid"] in hub.objects
                        hub.files[value["path"]] = value["oid"]
                repo = path.removeprefix("/api/models/").partition("/commit/")[0]
                url = f"{hub.url}/{repo}/commit/{'1' * 40}"
                return self.answer({"commitUrl": url, "commitOid": "1" * 40, "success": True})
            return self.answer({"error": path}, 404)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
