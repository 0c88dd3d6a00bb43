"""All doors of a server as one ASGI application."""

from __future__ import annotations

import logging
import os

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from fastapi_offline import FastAPIOffline
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send

from flagai_altdiff import __version__
from flagai_altdiff.web.answers import EXPECTED, answer_to, error_answer
from flagai_altdiff.web.guard import Guard, TooLargeError, names_of
from flagai_altdiff.web.history import History
from flagai_altdiff.web.jobs_api import jobs_api
from flagai_altdiff.web.messages import Problem
from flagai_altdiff.web.openai_api import openai_api
from flagai_altdiff.web.sdapi import sdapi
from flagai_altdiff.web.service import Service
from flagai_altdiff.web.settings import Settings

logger = logging.getLogger(__name__)


def make_app(service: Service) -> ASGIApp:
    """The application of a server.

    Args:
        service: Its engine room; not started by the application.
    """
    settings = service.settings
    history = History(settings.drawing.folder)
    app: FastAPI = FastAPIOffline(
        title="flagai_altdiff",
        version=__version__,
        description="Images from prompts in 18 languages.",
        docs_url="/docs",
        redoc_url=None,
    )
    _add_errors(app)
    app.include_router(jobs_api(service, history))
    app.include_router(openai_api(service))
    app.include_router(sdapi(service))
    _add_health(app, service)
    if settings.page:
        app = _with_page(app, service, history)
    whole: ASGIApp = app
    if settings.access.origins:
        whole = CORSMiddleware(
            whole,
            allow_origins=settings.access.origins,
            allow_methods=["*"],
            allow_headers=["*"],
            allow_credentials=True,
        )
    return Guard(whole, settings.access, settings.limits, names_of(settings.host))


def managed_app(settings: Settings) -> ASGIApp:
    """An application that starts and stops its own processes, for servers of other kinds than ours.

    Args:
        settings: Of the server; host, port and grace are the other server's to keep.
    """
    service = Service(settings)
    app = make_app(service)

    async def managed(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan":
            await app(scope, receive, send)
            return
        while True:
            message = await receive()
            if message["type"] == "lifespan.startup":
                service.start()
                await service.ready()
                await send({"type": "lifespan.startup.complete"})
            else:
                await service.stop()
                await send({"type": "lifespan.shutdown.complete"})
                return

    return managed


def _with_page(app: FastAPI, service: Service, history: History) -> FastAPI:
    """Mount the page behind all other routes. Its files are the images; nothing of it comes from other hosts."""
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    import gradio as gr

    from flagai_altdiff.web.page import make_page
    from flagai_altdiff.web.page.page import SCRIPT, STYLE

    folder = service.settings.drawing.folder
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    readable = theme.set(  # enough contrast for tired eyes
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_dark="*primary_700",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_300",
    )
    return gr.mount_gradio_app(
        app,
        make_page(service, history),
        path="/",
        allowed_paths=[str(folder.absolute() / "samples")] if folder else [],
        show_error=False,
        max_file_size=service.settings.limits.body_bytes,
        footer_links=[],
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        theme=readable,
        css=STYLE.read_text(encoding="utf-8"),
        js=SCRIPT.read_text(encoding="utf-8"),
    )


def _add_errors(app: FastAPI) -> None:
    async def expected(request: Request, error: Exception) -> Response:
        return answer_to(request.url.path, error)

    async def too_large(request: Request, error: Exception) -> Response:
        problem = Problem(code="too_large", text="the body is larger than a request may be, or took too long")
        return error_answer(request.url.path, 413, problem, {"Connection": "close"})

    async def gone(request: Request, error: Exception) -> Response:
        return Response(status_code=400)  # nobody reads it

    async def http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        code = {404: "not_found", 405: "wrong_method"}.get(error.status_code, "invalid_request")
        problem = Problem(code=code, text=f"{error.detail}: {request.method} {request.url.path[:200]}; see /docs")
        return error_answer(request.url.path, error.status_code, problem, error.headers)

    async def bug(request: Request, error: Exception) -> Response:
        logger.error("%s %s failed", request.method, request.url.path, exc_info=error)
        problem = Problem(code="internal_error", text="something went wrong here; the server's log says what")
        return error_answer(request.url.path, 500, problem)

    for kind in EXPECTED:
        app.add_exception_handler(kind, expected)
    app.add_exception_handler(TooLargeError, too_large)
    app.add_exception_handler(ClientDisconnect, gone)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(Exception, bug)


def _add_health(app: FastAPI, service: Service) -> None:
    @app.get("/healthz", tags=["health"], summary="Whether the server lives")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/readyz", tags=["health"], summary="Whether it takes jobs")
    async def readyz() -> JSONResponse:
        state = {
            "ready": service.is_ready,
            "stopping": service.is_stopping,
            "waiting": service.waiting,
            "workers": [{"device": worker.device, "restarts": worker.restarts} for worker in service.workers],
        }
        return JSONResponse(state, 200 if service.is_ready else 503)

    @app.get("/metrics", tags=["health"], summary="Counters for Prometheus")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)
