"""A study's page on this machine while the study runs: made anew when it is asked for, for nobody else."""

from __future__ import annotations

from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

from peft_graft.errors import GraftError
from peft_graft.study.report import StudyResults, study_page

_HERE = "127.0.0.1"
#: Seconds that a browser may take to ask.
_PATIENCE = 10


def serving(place: Path, port: int = 0) -> HTTPServer:
    """A server of the page at ``/``, bound to this machine alone; ``serve_forever`` runs it.

    Args:
        port: 0 takes one that is free.

    Raises:
        OSError: the port is taken.
    """

    class Handler(_Page):
        page = staticmethod(lambda: study_page(StudyResults.read(place), live=True))

    return HTTPServer((_HERE, port), Handler)


class _Page(BaseHTTPRequestHandler):
    page: Callable[[], str]
    timeout = _PATIENCE

    def do_GET(self) -> None:
        """The page, for whoever asks this machine by its own name: pages of others may not read it."""
        host = self.headers.get("Host", "").partition(":")[0]
        if host not in (_HERE, "localhost") or self.path != "/":
            self.send_error(404 if self.path != "/" else 403)
            return
        try:
            body, code = self.page().encode(), 200
        except (GraftError, OSError) as error:  # such as a file that is being replaced
            body, code = f"{error}\n".encode(), 503
        self.send_response(code)
        self.send_header("Content-Type", f"text/{'html' if code == 200 else 'plain'}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nothing on the terminal for every request."""
