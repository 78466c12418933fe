"""The page to chat on: built files that ship in the package, under a policy that runs no script but theirs."""

from __future__ import annotations

from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, Response
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

from openbook.server.errors import ApiError

WEB_DIR = Path(__file__).parent / "web"
_ASSETS = "assets"  # the folder of files whose names hold a hash of their content
# Not even inline styles: formulas are placed through the DOM.
POLICY = (
    "default-src 'self'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "font-src 'self'; connect-src 'self'; object-src 'none'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)


def mount_page(app: FastAPI, folder: Path = WEB_DIR) -> None:
    """Serve index.html at /, and the other files by their names; no file that is added later."""
    index = folder / "index.html"
    if not index.is_file():
        app.add_route("/", _no_page, include_in_schema=False)
        return
    _add_file(app, "/", index)
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            app.mount(f"/{path.name}", _Files(directory=path), name=path.name)
        elif path != index:
            _add_file(app, f"/{path.name}", path)


def _add_file(app: FastAPI, path: str, file: Path) -> None:
    async def send_file(request: Request) -> Response:
        return FileResponse(file, headers={"cache-control": "no-cache", "content-security-policy": POLICY})

    app.add_route(path, send_file, include_in_schema=False)


async def _no_page(request: Request) -> Response:
    raise ApiError(404, "this installation has no page: the API is at /v1, described at /docs", code="not_found")


class _Files(StaticFiles):
    async def get_response(self, path: str, scope: Scope) -> Response:
        response = await super().get_response(path, scope)
        is_hashed = str(self.directory).endswith(_ASSETS) and response.status_code < 400
        response.headers["cache-control"] = "public, max-age=31536000, immutable" if is_hashed else "no-cache"
        response.headers["content-security-policy"] = POLICY
        return response
