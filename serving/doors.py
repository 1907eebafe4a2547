"""What stands before the server's routes: which requests get in, and who notices that a client has gone away."""

import asyncio
import ipaddress
import socket
import threading
from collections.abc import Callable, Collection
from contextvars import ContextVar

from fastapi import Request
from fastapi.exceptions import HTTPException, RequestValidationError
from fastapi.responses import JSONResponse

# Set when the client of the request at hand has gone away.
GONE: ContextVar[threading.Event] = ContextVar("gone")
TOO_LONG = (
    "the request is longer than {} bytes; read long texts beforehand (ttt-e2e read) and name their learned context"
)


def bound_socket(host: str, port: int) -> socket.socket:
    """A socket that listens; port 0 takes a free one.

    Raises:
        OSError: the port is in use, or the host is none of this machine's.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise OSError(f"--host {host} --port {port}: cannot listen there ({error}); choose another port") from error


class Doorkeeper:
    """Refuses requests whose body is too long, throwing it away as it comes in; notices clients that go away.

    Args:
        limit: bytes.
    """

    def __init__(self, app: Callable, limit: int):
        self.app, self.limit = app, limit

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        messages, total, more = [], 0, True
        while more:
            message = await receive()
            total += len(message.get("body", b""))
            more = message.get("more_body", False)
            if total > self.limit:
                messages.clear()
            else:
                messages.append(message)
        messages.reverse()

        async def again() -> dict:
            return messages.pop() if messages else await receive()

        gone = threading.Event()
        GONE.set(gone)
        watch = asyncio.create_task(self._watch(receive, gone))
        app = self.app if total <= self.limit else error_answer(413, TOO_LONG.format(self.limit))
        try:
            await app(scope, again, send)
        finally:
            watch.cancel()

    async def _watch(self, receive: Callable, gone: threading.Event) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        gone.set()


class HostCheck:
    """Refuses requests that call the server by a name that is not its own.

    A web page can let a name of its own point to this machine, and so talk to the server with its visitor's browser
    (DNS rebinding). The request says by which name it was sent.

    Args:
        names: accepted besides those of the machine itself (`localhost` and its addresses), without port.
        any_address: accept any IP address: no page can let one point elsewhere.
    """

    def __init__(self, app: Callable, names: Collection[str] = (), any_address: bool = False):
        self.app, self.names, self.any_address = app, {_plain(name) for name in names} - {""}, any_address

    async def __call__(self, scope, receive, send) -> None:
        app = self.app
        if scope["type"] in ("http", "websocket"):
            hosts = [value.decode("latin-1") for key, value in scope["headers"] if key == b"host"]
            wrong = [host for host in hosts or [""] if not self.accepts(host)]
            if wrong:
                known = ", ".join(sorted(self.names | {"localhost"}))
                message = f"Host: {wrong[0][:80]!r} is not a name of this server, which answers to {known}; "
                app = error_answer(403, message + "start it with --allow-host NAME to add one")
        await app(scope, receive, send)

    def accepts(self, host: str) -> bool:
        """Whether a request with this `Host` header gets in."""
        name = _plain(_without_port(host))
        if name == "localhost" or name in self.names:
            return True
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return False
        return address.is_loopback or self.any_address


def _without_port(host: str) -> str:
    name, colon, port = host.rpartition(":")
    return name if colon and (port.isdecimal() or not port) and ("]" in name or ":" not in name) else host


def _plain(name: str) -> str:
    return name.strip().lower().removesuffix(".").removeprefix("[").removesuffix("]")


def error_answer(status: int, message: str) -> JSONResponse:
    """An error in the form that OpenAI's clients show."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return JSONResponse({"error": {"message": message, "type": kind, "param": None, "code": status}}, status)


async def explain(request: Request, error: HTTPException | RequestValidationError) -> JSONResponse:
    """The answer to a request that was refused."""
    if isinstance(error, RequestValidationError):
        return error_answer(422, "; ".join(f"{one['loc'][0]}: {one['msg']}" for one in error.errors()))
    message = str(error.detail)
    if error.status_code in (404, 405) and message in ("Not Found", "Method Not Allowed"):
        routes = [f"{method} {route.path}" for route in request.app.routes for method in sorted(route.methods)]
        asked = f"{request.method} {request.url.path[:200]!r}"
        message = f"{asked}: there is no such route; there are {', '.join(sorted(routes))}"
    return error_answer(error.status_code, message)


async def excuse(request: Request, error: Exception) -> JSONResponse:
    """The answer where the server itself fails."""
    return error_answer(500, f"the server failed ({type(error).__name__}); its log says more")
