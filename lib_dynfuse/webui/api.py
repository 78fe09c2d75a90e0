"""Our routes beside the host's API, and the check of what its txt2img and img2img are given for us."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

from lib_dynfuse import __version__
from lib_dynfuse.core.strategies import Parameter, strategies
from lib_dynfuse.errors import quoted, shown
from lib_dynfuse.options import FIELDS, PRESETS, Options, OptionsError
from lib_dynfuse.trace import Record, pictures
from lib_dynfuse.webui.arguments import ORDER, PICTURES, read_arguments
from lib_dynfuse.webui.generation import TITLE

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


def trace_content(record: Record | None, format: str, image: int) -> tuple[bytes, str]:
    """The last generation's record as JSON, or one picture's heat map as PNG; and the media type.

    Raises TraceError when there is no record, no such picture in it, or no such format.
    """
    if format not in ("json", "png"):
        raise TraceError(422, f"format: {quoted(format)} is not known; allowed: json, png")
    if record is None:
        raise TraceError(404, "nothing was recorded yet; generate with enabled and trace switched on")
    if format == "json":
        return record.dumps().encode(), "application/json"
    try:
        figure = pictures.heat_map(record, image)
    except ValueError as error:
        raise TraceError(404, f"image: {error}") from error
    content = io.BytesIO()
    figure.savefig(content, format="png")
    return content.getvalue(), "image/png"


def _trace_route(format: str = "json", image: int = 0) -> Any:
    """The last generation's record as JSON, or with format=png the heat map of one of its pictures."""
    from fastapi import HTTPException, Response

    from lib_dynfuse.session import last_record

    try:
        content, media_type = trace_content(last_record(), format, image)
    except TraceError as error:
        raise HTTPException(error.status, str(error)) from error
    return Response(content, media_type=media_type)


def wrong_arguments(body: Any) -> str:
    """What is wrong with what a txt2img or img2img request says to us, in one line; empty if nothing is.

    body: the request's parsed JSON. The host itself drops what it does not know without a word.
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
        return _unreadable(read_arguments(args))
    except OptionsError as error:
        return str(error)


def _unreadable(options: Options) -> str:
    """Which of the given pictures cannot be read, and why; empty if all can."""
    given = [(name, source) for name in PICTURES for source in getattr(options, name)]
    if not given:
        return ""
    from lib_dynfuse.guidance.references import PictureError, read_picture

    for name, source in given:
        try:
            read_picture(source)
        except PictureError as error:
            return f"{name}: {error}"
    return ""


def _check_before(route: Any) -> None:
    """Let a route answer 422 to arguments that are wrong, after its own checks and before it generates."""
    from fastapi import HTTPException
    from fastapi.concurrency import run_in_threadpool
    from fastapi.dependencies.models import Dependant

    async def check(request: Any) -> None:
        try:
            body = await request.json()
        except (ValueError, RecursionError):
            return  # not JSON, or nested too deeply: the route says so itself
        if said := await run_in_threadpool(wrong_arguments, body):  # it may have pictures to open
            raise HTTPException(422, said)

    # Made by hand: what reads signatures would look for the request's type among this module's names.
    route.dependant.dependencies.append(Dependant(call=check, request_param_name="request", path=route.path))
