"""Routes that upload an image (decoded in the sandbox), and serve it to its owner."""

from __future__ import annotations

import re

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from stable_diffusion_server.errors import NotFound, ServerError
from stable_diffusion_server.imaging import media_type_of
from stable_diffusion_server.ui.asgi_http import problem_response, read_body
from stable_diffusion_server.ui.image_intake import ImageIntake

PATH = "/ui/pictures"
_TOKEN = re.compile(r"[A-Za-z0-9_-]{43}")


class UploadRoutes:
    """Answers `POST /ui/pictures`, whose body is an image file, and `GET /ui/pictures/{token}`.

    With `?instead=TOKEN` the image replaces another one of the same visitor.
    """

    def __init__(self, intake: ImageIntake) -> None:
        self._intake = intake

    def answers(self, path: str) -> bool:
        """Return whether a path belongs to these routes."""
        return path == PATH or path.startswith(f"{PATH}/")

    async def answer(self, request: Request, owner: str) -> Response:
        """Handle a request of a visitor."""
        try:
            if request.url.path == PATH and request.method == "POST":
                return await self._take(request, owner)
            if request.method in ("GET", "HEAD"):
                return self._show(request.url.path.removeprefix(f"{PATH}/"), owner)
            raise NotFound("There is nothing here.")
        except ServerError as error:
            return problem_response(error)

    async def _take(self, request: Request, owner: str) -> Response:
        with self._intake.place(owner):
            taken = await self._intake.take(owner, await read_body(request.receive, self._intake.max_bytes))
        if _TOKEN.fullmatch(instead := request.query_params.get("instead", "")):
            self._intake.forget(owner, instead)
        body = {"token": taken.token, "width": taken.width, "height": taken.height}
        return JSONResponse(body, 201, {"Cache-Control": "no-store"})

    def _show(self, token: str, owner: str) -> Response:
        if not _TOKEN.fullmatch(token):
            raise NotFound("There is nothing here.")
        file = self._intake.file(owner, token)
        headers = {"Cache-Control": "private, no-store", "Content-Security-Policy": "default-src 'none'"}
        return Response(file, media_type=media_type_of(file), headers=headers)
