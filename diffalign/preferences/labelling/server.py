"""The server of the labelling page: Starlette on uvicorn, one page, five routes, no external resources.

By default it listens on this machine alone. On another address it requires a token, which the printed address
contains. Requests with the Origin of another site are refused.
"""

import re
import secrets
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from diffalign.data.reading.examples import digest
from diffalign.errors import UserError
from diffalign.preferences.labelling.store import SKIP, TIE, Answer, AnswerStore, is_choice
from diffalign.preferences.labelling.tasks import Task
from diffalign.utils.text import decode, parse_json

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

PAGE = Path(__file__).with_name("page.html")
LEASE = 300.0
"""Seconds during which a task shown to one person is not shown to another."""
COOKIE = "diffalign-token"
_PATIENCE = 2  # seconds that a request may take to end when the server stops: a dead browser's never does
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


@dataclass
class Session:
    """The state of a labelling page: tasks, answers, and which person is looking at which task.

    Attributes:
        store: tasks and answers.
        title: title of the page.
        votes: number of answers, of different people, that each task needs.
        blind: whether the order of a task's media depends on the person and the task.
        token: token that a browser must send; empty: none is needed.
        ends: whether the server stops when every task has its votes.
        stop: function that stops the running server.
    """

    store: AnswerStore
    title: str = "diffalign"
    votes: int = 1
    blind: bool = True
    token: str = ""
    ends: bool = False
    stop: Callable[[], None] = field(default=lambda: None)
    _looking: dict[str, tuple[str, float]] = field(default_factory=dict)

    def shown(self, task: Task, by: str) -> list[int]:
        """Return the order in which person ``by`` sees a task's media, as indices into ``task.media``."""
        places = list(range(len(task.media)))
        if self.blind:
            places.sort(key=lambda place: digest(by.encode(), task.key.encode(), str(place).encode()))
        return places

    def next_for(self, by: str, count: int = 2) -> list[Task]:
        """Return the next tasks of person ``by``: tasks that need votes, those that nobody looks at first."""
        answered, now = self.store.answered(by), time.monotonic()
        free: list[Task] = []
        leased: list[Task] = []
        for task in self.store.tasks.values():
            if task.key in answered or self.store.votes(task.key) >= self.votes:
                continue
            person, since = self._looking.get(task.key, (by, 0.0))
            (free if person == by or now - since > LEASE else leased).append(task)
            if len(free) == count:
                break
        tasks = (free + leased)[:count]
        if tasks:
            self._looking[tasks[0].key] = (by, now)
        return tasks

    @property
    def done(self) -> int:
        """The number of tasks that have all their votes."""
        return sum(self.store.votes(key) >= self.votes for key in self.store.tasks)

    def state(self, by: str) -> dict[str, Any]:
        """Return the content of the page for person ``by``, for JSON."""
        tasks = self.next_for(by) if by else []
        agreement = self.store.agreement()
        return {
            "title": self.title,
            "total": len(self.store.tasks),
            "done": self.done,
            "mine": len(self.store.answered(by)) if by else 0,
            "people": dict(self.store.counts().most_common()),
            "agreement": agreement and [agreement.value, agreement.low, agreement.high],
            "task": self._described(tasks[0], by) if tasks else None,
            "upcoming": self._described(tasks[1], by)["media"] if len(tasks) > 1 else [],
        }

    def _described(self, task: Task, by: str) -> dict[str, Any]:
        media = [f"media/{task.key}/{place}" for place in self.shown(task, by)]
        return {"key": task.key, "prompt": task.prompt, "media": media, "video": task.video}

    def answer(self, by: str, key: str, choice: Any) -> None:
        """Store the choice of person ``by``: a position on the page, `TIE` or `SKIP`.

        Raises:
            UserError: an unknown task, an invalid name, or an invalid choice.
        """
        task = self.store.tasks.get(key)
        if task is None:
            raise UserError(f"task {key!r}: there is none; allowed: what the page shows")
        if not by.strip() or len(by) > 80 or _CONTROL.search(by):
            raise UserError(
                f"name {by[:80]!r}; allowed: 1 to 80 characters, none of them a control character"
            )
        if not is_choice(choice, len(task.media)):
            raise UserError(f"choice {choice!r}; allowed: 0 to {len(task.media) - 1}, {TIE}, {SKIP}")
        if not isinstance(choice, str):
            choice = self.shown(task, by)[choice]
        self.store.add(Answer(key, by, choice))
        self._looking.pop(key, None)
        if self.ends and self.done == len(self.store.tasks):
            self.stop()


def application(session: Session) -> "Starlette":
    """Return the ASGI application of a session."""
    from starlette.applications import Starlette
    from starlette.requests import ClientDisconnect
    from starlette.responses import FileResponse, HTMLResponse, JSONResponse, Response
    from starlette.routing import Route

    def refused(request: "Request") -> "Response | None":
        origin = request.headers.get("origin")
        if origin and urlsplit(origin).netloc != request.headers.get("host"):
            return JSONResponse({"error": f"a request of {origin}; allowed: this page's"}, 403)
        token = request.query_params.get("token") or request.cookies.get(COOKIE) or ""
        if session.token and not secrets.compare_digest(token.encode(), session.token.encode()):
            return JSONResponse({"error": "no token; open the address that diffalign label has printed"}, 401)
        return None

    async def page(request: "Request") -> "Response":
        if problem := refused(request):
            return problem
        response = HTMLResponse(PAGE.read_text(encoding="utf-8"))
        if session.token:
            response.set_cookie(COOKIE, session.token, httponly=True, samesite="strict")
        return response

    async def state(request: "Request") -> "Response":
        return refused(request) or JSONResponse(session.state(request.query_params.get("by", "")))

    async def change(request: "Request", make: Callable[[str, Any], object], *fields: str) -> "Response":
        """Change the answers of the person whom the body names, and respond with the page's content."""
        if problem := refused(request):
            return problem
        try:
            body = parse_json(decode(await request.body(), "the request"), "the request")
            if not isinstance(body, dict) or not all(isinstance(body.get(f), str) for f in ("by", *fields)):
                raise UserError(f"the request has no texts {', '.join(('by', *fields))}")
            make(body["by"], body)
        except UserError as error:
            return JSONResponse({"error": str(error)}, 400)
        except OSError as error:
            return JSONResponse({"error": f"{session.store.folder} cannot be written: {error.strerror}"}, 507)
        except ClientDisconnect:  # there is nobody to respond to
            return Response(status_code=400)
        return JSONResponse(session.state(body["by"]))

    async def answer(request: "Request") -> "Response":
        def make(by: str, body: Any) -> None:
            session.answer(by, body["task"], body.get("choice"))

        return await change(request, make, "task")

    async def undo(request: "Request") -> "Response":
        return await change(request, lambda by, _: session.store.undo(by))

    async def media(request: "Request") -> "Response":
        if problem := refused(request):
            return problem
        task = session.store.tasks.get(request.path_params["key"])
        place = request.path_params["place"]
        if task is None or not 0 <= place < len(task.media) or not task.media[place].is_file():
            return Response(status_code=404)
        return FileResponse(task.media[place], headers={"Cache-Control": "private, max-age=3600"})

    return Starlette(
        routes=[
            Route("/", page),
            Route("/api/state", state),
            Route("/api/answer", answer, methods=["POST"]),
            Route("/api/undo", undo, methods=["POST"]),
            Route("/media/{key}/{place:int}", media),
        ]
    )


def is_loopback(host: str) -> bool:
    """Return whether a host name or address is reachable from this machine only."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def serve(session: Session, host: str, port: int, announce: Callable[[str], None]) -> None:
    """Serve a session until it is interrupted, or, with ``session.ends``, until every task has its votes.

    Args:
        session: the session; a token is generated if ``host`` is not this machine alone and it has none.
        host: address to listen on.
        port: port to listen on; 0 picks a free one.
        announce: receives the page's address, once the port is open.

    Raises:
        UserError: the address cannot be bound, or starlette or uvicorn is not installed.
    """
    try:
        import uvicorn
        from starlette.applications import Starlette  # noqa: F401
    except ImportError as error:
        raise UserError(
            "the labelling page needs starlette and uvicorn: pip install 'diffalign[label]'"
        ) from error
    if not session.token and not is_loopback(host):
        session.token = secrets.token_urlsafe(16)
    try:
        listener = socket.create_server((host, port))
    except (OSError, OverflowError) as error:
        raise UserError(
            f"cannot listen at {host}:{port} ({error}); allowed: another --host or --port"
        ) from error
    address = f"http://{host}:{listener.getsockname()[1]}/"
    config = uvicorn.Config(application(session), log_level="warning", timeout_graceful_shutdown=_PATIENCE)
    server = uvicorn.Server(config)
    session.stop = lambda: setattr(server, "should_exit", True)
    announce(f"{address}?token={session.token}" if session.token else address)
    with listener, suppress(KeyboardInterrupt):  # uvicorn shuts down cleanly, then raises the interrupt
        server.run(sockets=[listener])
