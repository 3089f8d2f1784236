"""The Flask app of `forgetfilter review`.

Only a browser that knows the token gets an answer, and only if it addresses 127.0.0.1 or localhost. The second rule keeps
out web pages whose own host name points at 127.0.0.1 (DNS rebinding). Texts of rows leave the server as JSON only.
"""

from __future__ import annotations

import secrets
from importlib.resources import files
from threading import Lock
from typing import Any, get_args

from ...errors import DecisionError, TraceError
from ...review.verdicts import VerdictLabel
from ...utils.optional_packages import requires_extra
from .session import ReviewSession


with requires_extra("review", "`forgetfilter review`"):
    from flask import Flask, Response, abort, request, send_from_directory
    from werkzeug.exceptions import HTTPException


HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    ),
    "Cache-Control": "no-store",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
MAX_REQUEST_BYTES = 10_000
SHARED_FILES = ("look.css", "common.js")  # of this page and the page that `forgetfilter report` writes


def create_app(session: ReviewSession, token: str, next_command: str) -> Flask:
    """Creates the app.

    Args:
        session ([`ReviewSession`]):
            The review.
        token (`str`):
            The first part of the path of every request.
        next_command (`str`):
            The command that filters by the verdicts. The page shows it.

    Returns:
        [`flask.Flask`]
    """
    app = Flask(__name__, static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = MAX_REQUEST_BYTES
    lock = Lock()  # the server handles requests in threads

    @app.before_request
    def check_request() -> None:
        port = request.environ["SERVER_PORT"]
        hosts = [f"{name}:{port}".removesuffix(":80") for name in ("127.0.0.1", "localhost")]
        if request.host not in hosts:
            abort(403, f"This server answers requests to {hosts[0]} only. Use the same port at both ends of a tunnel.")
        origin = request.headers.get("Origin")
        if origin is not None and origin not in [f"http://{host}" for host in hosts]:
            abort(403, "Requests of other sites are refused.")
        given = request.path.split("/")[1]
        if not secrets.compare_digest(given.encode(), token.encode()):
            abort(403, "The address has no valid token. Copy the address that `forgetfilter review` printed.")

    @app.after_request
    def add_headers(response: Response) -> Response:
        response.headers.update(HEADERS)
        return response

    @app.errorhandler(HTTPException)
    def refuse(error: HTTPException) -> tuple[dict[str, Any], int]:
        return {"problem": error.description}, error.code or 500

    @app.errorhandler(DecisionError)
    def conflict(error: DecisionError) -> tuple[dict[str, Any], int]:
        return {"problem": str(error)}, 409

    @app.errorhandler(TraceError)
    def not_read(error: TraceError) -> tuple[dict[str, Any], int]:
        return {"problem": str(error)}, 500

    @app.errorhandler(OSError)
    def not_stored(error: OSError) -> tuple[dict[str, Any], int]:
        return {"problem": f"Not everything was stored: {error}. Solve this, and press the key again."}, 500

    @app.get("/<_token>/", defaults={"name": "index.html"})
    @app.get("/<_token>/<name>")
    def page(_token: str, name: str) -> Response:
        folder = "shared" if name in SHARED_FILES else "review_server/static"
        return send_from_directory(str(files("forgetfilter_callback.reports") / folder), name)

    @app.get("/<_token>/prompts")
    def prompts(_token: str) -> list[dict[str, Any]]:
        with lock:
            return session.some_prompts()

    @app.get("/<_token>/state")
    def state(_token: str) -> dict[str, Any]:
        with lock:
            return answer()

    @app.post("/<_token>/verdict")
    def verdict(_token: str) -> dict[str, Any]:
        label: Any = body().get("verdict")
        if label not in get_args(VerdictLabel):
            abort(400, 'The verdict must be "unsafe" or "safe".')
        with lock:
            session.judge(row_number(), label)
            return answer()

    @app.post("/<_token>/skip")
    def skip(_token: str) -> dict[str, Any]:
        with lock:
            session.skip(row_number())
            return answer()

    @app.post("/<_token>/undo")
    def undo(_token: str) -> dict[str, Any]:
        body()
        with lock:
            session.undo()
            return answer()

    def answer() -> dict[str, Any]:
        return {**session.state(), "next_command": next_command}

    def body() -> dict[str, Any]:
        content = request.get_json()
        if not isinstance(content, dict):
            abort(400, "The request must be a JSON object.")
        return content

    def row_number() -> int:
        row = body().get("row")
        if not isinstance(row, int) or isinstance(row, bool):
            abort(400, "The row must be a whole number.")
        return row

    return app
