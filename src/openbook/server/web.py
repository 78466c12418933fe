"""The page to chat on: built files that ship in the package, under a policy that runs no script but theirs."""

from __future__ import annotations

from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import Response
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

from openbook.server.errors import ApiError

WEB_DIR = Path(__file__).parent / "web"
ASSETS = "assets/"  # files whose names hold a hash of their content
# Formulas are placed with style attributes; a style can fetch nothing from elsewhere under this policy.
POLICY = (
    "default-src 'self'; script-src 'self'; style-src 'self'; style-src-attr 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self'; connect-src 'self'; object-src 'none'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)


class _Page(StaticFiles):
    async def get_response(self, path: str, scope: Scope) -> Response:
        response = await super().get_response(path, scope)
        is_asset = path.startswith(ASSETS) and response.status_code < 400
        response.headers["cache-control"] = "public, max-age=31536000, immutable" if is_asset else "no-cache"
        response.headers["content-security-policy"] = POLICY
        return response


def mount_page(app: FastAPI, folder: Path = WEB_DIR) -> None:
    """Serve the page at /, behind all other routes."""
    if (folder / "index.html").is_file():
        app.mount("/", _Page(directory=folder, html=True), name="page")
        return

    @app.get("/", include_in_schema=False)
    async def no_page() -> Response:
        raise ApiError(404, "this installation has no page: the API is at /v1, described at /docs", code="not_found")
