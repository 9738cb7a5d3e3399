"""The web application of one study."""

import json
import logging
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import PlainTextResponse, Response
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

from unstilted.vote.admin import admin_routes
from unstilted.vote.database import is_alive
from unstilted.vote.freezing import load_frozen, load_secrets
from unstilted.vote.pages import rater_routes
from unstilted.vote.settings import Limits, Settings
from unstilted.vote.shield import Shield
from unstilted.vote.site import Refusal, Site

logger = logging.getLogger("unstilted.vote")
ENVIRONMENT = "UNSTILTED_VOTE"
"""How the parent tells its workers what to serve."""


class LastingFiles(StaticFiles):
    """Static files are asked for by their hash, so browsers may keep them."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        response = await super().get_response(path, scope)
        response.headers["cache-control"] = "public, max-age=31536000, immutable"
        return response


def create_app(site: Site) -> Shield:
    """The application: pages, static files, plain pages for everything that goes wrong, and the shield around all of it."""
    return Shield(create_pages(site), site.settings, site.refusal)


def create_pages(site: Site) -> FastAPI:
    """The application without its shield."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        site.close()

    app = FastAPI(title="unstilted vote", docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    app.include_router(rater_routes(site))
    app.include_router(admin_routes(site))
    app.mount("/static", LastingFiles(directory=Path(__file__).parent / "static"), name="static")

    @app.get("/healthz", response_class=PlainTextResponse)
    async def healthz() -> Response:
        from starlette.concurrency import run_in_threadpool

        is_well = await run_in_threadpool(is_alive, site.reader)
        return PlainTextResponse("ok" if is_well else "the database can't be reached", status_code=200 if is_well else 503)

    @app.exception_handler(Refusal)
    async def refused(request: Request, error: Refusal) -> Response:
        return site.refusal(request.scope, error.status, error.key, error.link)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        return site.refusal(request.scope, error.status_code, "missing" if error.status_code == 404 else "invalid")

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, _: RequestValidationError) -> Response:
        return site.refusal(request.scope, 422, "invalid")

    @app.exception_handler(Exception)
    async def broken(request: Request, error: Exception) -> Response:
        logger.error("%s %s: %s", request.method, request.url.path, type(error).__name__)
        return site.refusal(request.scope, 500, "broken", "/vote")

    return app


def from_environment() -> Shield:
    """What each worker of uvicorn calls."""
    told = json.loads(os.environ[ENVIRONMENT])
    run, limits = Path(told["run"]), Limits(**told["settings"].pop("limits"))
    return create_app(Site(run, load_frozen(run), load_secrets(run), Settings(**told["settings"], limits=limits)))
