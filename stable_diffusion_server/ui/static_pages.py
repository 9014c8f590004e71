"""Static pages without scripts: the UI is loading, needs an API key, or could not be loaded."""

from __future__ import annotations

from html import escape

from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

_POLICY = (
    "default-src 'none'; img-src 'self'; style-src 'unsafe-inline'; form-action 'self'; frame-ancestors 'none'; "
    "base-uri 'none'"
)
ICON = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 8 8"><rect width="8" height="8" fill="#2d55d2"/>'
    '<circle cx="4" cy="4" r="2.4" fill="#d72828"/></svg>'
)
_STYLE = (
    ":root{color-scheme:light dark}body{font:1.05rem/1.5 system-ui,sans-serif;max-width:28rem;margin:18vh auto;"
    "padding:0 1.25rem}input,button{font:inherit;padding:.55rem .7rem;width:100%;box-sizing:border-box;"
    "margin-top:.5rem}.fault{color:light-dark(#a11,#f99)}"
)


async def favicon(_: Request) -> Response:
    """Return the icon, a red circle on a blue background."""
    return Response(ICON, media_type="image/svg+xml", headers={"Cache-Control": "max-age=86400"})


def opening() -> HTMLResponse:
    """Return the page shown while Gradio loads; it reloads every second."""
    return _page(
        "Opening …", "<h1>The studio is opening</h1><p>The first time this takes some seconds.</p>", reload=True
    )


def closed(why: str) -> HTMLResponse:
    """Return the page shown if Gradio could not be loaded, with status 503."""
    inside = f"<h1>The studio cannot be opened</h1><p>{escape(why)}</p><p>The API works without it.</p>"
    return _page("Closed", inside, status=503)


def key_wanted(fault: str = "") -> HTMLResponse:
    """Return the page with the form for an API key, with status 401, or 403 after a wrong key."""
    error = f'<p class="fault" role="alert">{escape(fault)}</p>' if fault else ""
    form = (
        '<form method="post" action="/ui/key"><label>Key<input type="password" name="key" required autofocus '
        'autocomplete="current-password"></label><button>Enter</button></form>'
    )
    inside = f"<h1>A key, please</h1><p>Drawing needs one here.</p>{error}{form}"
    return _page("A key, please", inside, status=403 if fault else 401)


def _page(title: str, inside: str, *, status: int = 200, reload: bool = False) -> HTMLResponse:
    refresh = '<meta http-equiv="refresh" content="1">' if reload else ""
    html = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>{refresh}'
        f'<meta name="viewport" content="width=device-width,initial-scale=1"><style>{_STYLE}</style></head>'
        f"<body><main>{inside}</main></body></html>"
    )
    return HTMLResponse(html, status, {"Content-Security-Policy": _POLICY, "Cache-Control": "no-store"})
