"""Serve the page of `forgetfilter review` on this machine."""

from __future__ import annotations

import secrets
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from ...data.decode import Decoder
from ...errors import DecisionError, TraceError
from ...review.review_queue import ReviewQueue
from ...review.verdicts import review_folder
from ...trace.trace import Trace
from ...utils.optional_packages import requires_extra
from .app import create_app
from .session import ReviewSession


with requires_extra("review", "`forgetfilter review`"):
    from werkzeug.serving import BaseWSGIServer, WSGIRequestHandler, make_server


HOST = "127.0.0.1"


class ReviewServer(NamedTuple):
    """A server that is ready to run.

    Attributes:
        server (`werkzeug.serving.BaseWSGIServer`):
            `serve_forever()` answers requests until Ctrl-C.
        address (`str`):
            The address of the page, with its token.
        port (`int`):
            The port on 127.0.0.1.
        queue ([`ReviewQueue`]):
            The review.
    """

    server: BaseWSGIServer
    address: str
    port: int
    queue: ReviewQueue


class _QuietHandler(WSGIRequestHandler):
    """Does not print requests, which contain the token."""

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        pass


@contextmanager
def review_server(
    trace: Trace,
    decoder: Decoder,
    next_command: str,
    port: int = 0,
    reviewer: str | None = None,
    round_size: int = 10,
    random_fraction: float = 0.1,
    sources: Sequence[Any] | None = None,
) -> Iterator[ReviewServer]:
    """Prepares the review of a trace, and locks its review folder until the block ends.

    Args:
        trace ([`Trace`]):
            A trace with records of the safety session.
        decoder ([`tokenizers.Tokenizer`] or [`~transformers.PreTrainedTokenizerBase`]):
            Decodes the token ids of the trace.
        next_command (`str`):
            The command that filters by the verdicts. The page shows it.
        port (`int`, defaults to 0):
            The port on 127.0.0.1. 0 chooses a free one.
        reviewer (`str`, *optional*):
            A name that is stored with each verdict.
        round_size (`int`, defaults to 10):
            Rows per round.
        random_fraction (`float`, defaults to 0.1):
            Fraction of the rows that are drawn at random (see [`ReviewQueue`]).
        sources (`Sequence` of length `samples`, *optional*):
            Where each row came from.

    Raises:
        DecisionError: if the folder is being reviewed already, or if the port cannot be used.
        TraceError: if the trace does not hold the records that a review needs.
    """
    folder = review_folder(trace)
    trace.first_and_last()  # raises before anything is written
    folder.mkdir(exist_ok=True)
    try:
        lock = Trace.lock(folder)
    except TraceError:
        raise DecisionError(
            f"Another review of {folder} is running. End it first, or use its page: reviewers can take turns."
        ) from None
    try:
        queue = ReviewQueue(trace, folder, reviewer, random_fraction=random_fraction)
        token = secrets.token_urlsafe()
        app = create_app(ReviewSession(queue, decoder, round_size, sources), token, next_command)
        with _listen(port) as listening:
            port = listening.getsockname()[1]
            server = make_server(HOST, port, app, threaded=True, request_handler=_QuietHandler, fd=listening.fileno())
        try:
            yield ReviewServer(server, f"http://{HOST}:{port}/{token}/", port, queue)
        finally:
            server.server_close()
    finally:
        if lock is not None:
            lock.release()


def _listen(port: int) -> socket.socket:
    """A socket that listens on 127.0.0.1. Werkzeug would end the process if the port is in use."""
    try:
        return socket.create_server((HOST, port))
    except OSError as error:
        raise DecisionError(
            f"Port {port} of {HOST} cannot be used ({error.strerror}). Choose another `--port`, or leave it out."
        ) from error
