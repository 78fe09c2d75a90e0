"""Our routes beside the host's API, and the check of what its txt2img and img2img are given for us."""

from __future__ import annotations

import functools
import io
from collections.abc import Mapping
from typing import Any

from lib_dynfuse import __version__
from lib_dynfuse.core.strategies import Parameter, strategies
from lib_dynfuse.errors import quoted, shown
from lib_dynfuse.guidance.pictures import PictureError
from lib_dynfuse.options import FIELDS, PRESETS, OptionsError
from lib_dynfuse.trace import pictures
from lib_dynfuse.webui import references, traces
from lib_dynfuse.webui.arguments import ORDER, read_arguments
from lib_dynfuse.webui.generation import TITLE, TRACE_KEY

PREFIX = "/dynfuse/v1"
CHECKED_ROUTES = ("/sdapi/v1/txt2img", "/sdapi/v1/img2img")
_TYPES = {bool: "boolean", int: "integer", float: "number", str: "string", dict: "object", list: "array"}


def on_app_started(demo: Any, app: Any) -> None:
    """Add our routes and the check to a host that serves its API; the callback of the same name.

    Nothing is added where the host serves none. Our routes ask for the same password as the host's.
    """
    routes = {getattr(route, "path", ""): route for route in app.routes}
    checked = [routes[path] for path in CHECKED_ROUTES if path in routes]
    if not checked or f"{PREFIX}/schema" in routes:
        return
    for route in checked:
        _check_before(route)
    guards = list(checked[0].dependencies)
    app.add_api_route(f"{PREFIX}/schema", schema, methods=["GET"], dependencies=guards)
    app.add_api_route(f"{PREFIX}/trace", _trace_route, methods=["GET"], dependencies=guards, response_model=None)


def schema() -> dict[str, Any]:
    """Every option and every rule with its range, default and help; what a client needs to fill `args`."""
    return {
        "title": TITLE,
        "version": __version__,
        "order": list(ORDER),
        "options": [
            {
                "name": option.name,
                "label": option.label,
                "type": _TYPES[type(option.default)],
                "default": option.default,
                "minimum": option.minimum,
                "maximum": option.maximum,
                "choices": list(option.choices),
                "help": option.help,
                "infotext": option.key,
            }
            for option in FIELDS
        ],
        "presets": PRESETS,
        "rules": [
            {
                "name": info.name,
                "help": info.help,
                "source": info.source,
                "parameters": [_described(parameter) for parameter in info.parameters],
            }
            for info in strategies().values()
        ],
    }


def _described(parameter: Parameter) -> dict[str, Any]:
    return {
        "name": parameter.name,
        "type": _TYPES[type(parameter.default)],
        "default": parameter.default,
        "minimum": parameter.minimum,
        "maximum": parameter.maximum,
        "choices": list(parameter.choices or ()),
        "help": parameter.help,
    }


class TraceError(Exception):
    """A trace that cannot be given; `status` is the HTTP status that says so."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def trace_content(id: str, format: str, image: int | None) -> tuple[bytes, str]:
    """The record that a picture's answer names, as JSON, or a heat map of that picture as PNG; and the media type.

    `image`: another picture of the same batch. Raises TraceError when there is no such record, picture or format.
    """
    if format not in ("json", "png"):
        raise TraceError(422, f"format: {quoted(format)} is not known; allowed: json, png")
    found = traces.kept.find(id)
    if found is None:
        raise TraceError(
            404,
            f"id: there is no such trace; a picture's own is in its answer's info, at extra_generation_params, "
            f"{TRACE_KEY}, and those of the last {traces.MOST_BATCHES} batches are kept",
        )
    record, own = found
    if format == "json":
        return record.dumps().encode(), "application/json"
    try:
        figure = pictures.heat_map(record, own if image is None else image)
    except ValueError as error:
        raise TraceError(404, f"image: {error}") from error
    content = io.BytesIO()
    figure.savefig(content, format="png")
    return content.getvalue(), "image/png"


def _trace_route(id: str = "", format: str = "json", image: int | None = None) -> Any:
    """The record of a picture's batch as JSON, or with format=png a heat map of the picture."""
    from fastapi import HTTPException, Response

    try:
        content, media_type = trace_content(id, format, image)
    except TraceError as error:
        raise HTTPException(error.status, str(error)) from error
    return Response(content, media_type=media_type)


def wrong_arguments(body: Any) -> str:
    """What is wrong with what a txt2img or img2img request says to us, in one line; empty if nothing is.

    body: the request's parsed JSON. The host itself drops what it does not know without a word. Of reference pictures
    only the headers are looked at: decoding is for the one generation whose turn it is.
    """
    scripts = body.get("alwayson_scripts") if isinstance(body, Mapping) else None
    if not isinstance(scripts, Mapping):
        return ""
    said = [_wrong_entry(entry) for title, entry in scripts.items() if title.lower() == TITLE.lower()]
    return "; ".join(f"alwayson_scripts.{TITLE}: {one}" for one in said if one)


def _wrong_entry(entry: Any) -> str:
    shape = 'write {"args": [{"enabled": true}]}'
    if not isinstance(entry, Mapping):
        return f"an object is wanted; {shape}"
    unknown = [key for key in entry if key != "args"]
    if unknown:
        return f"{shown(', '.join(unknown))}: unknown; {shape}"
    args = entry.get("args", [])
    if not isinstance(args, list):
        return f"args: a list is wanted; {shape}"
    if args and isinstance(args[0], Mapping) and len(args) > 1:
        return f"args: nothing may follow the object; {shape}"
    try:
        references.given(read_arguments(args), uploads={})
    except (OptionsError, PictureError) as error:
        return str(error)
    return ""


def _check_before(route: Any) -> None:
    """Let a route answer 422 to arguments that are wrong: once the host has found the request right, before it
    generates."""
    from fastapi import HTTPException

    answer = route.dependant.call

    @functools.wraps(answer)
    def checked(**values: Any) -> Any:
        for request in values.values():
            if said := wrong_arguments({"alwayson_scripts": getattr(request, "alwayson_scripts", None)}):
                raise HTTPException(422, said)
        return answer(**values)

    route.dependant.call = checked
