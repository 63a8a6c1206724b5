"""An endpoint of chat completions in this process, for rewards that ask one."""

import base64
import io
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
from PIL import Image


@contextmanager
def serving(answer: Callable[[str, dict[str, Any]], str]) -> Iterator[str]:
    """Serve the answers to (path, body of the request); the value is the address, up to ``/v1``."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            choice = {"message": {"content": answer(self.path, body)}}
            content = json.dumps({"choices": [choice]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()


def light(content: dict[str, Any]) -> float:
    """Return how light the image of a message's part is, 0 to 1."""
    data = base64.b64decode(content["image_url"]["url"].partition("base64,")[2])
    return float(np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).mean()) / 255
