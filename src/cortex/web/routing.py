"""The route table: which handler a method and a path belong to. No I/O.

A path is compared segment by segment after decoding, so that an encoded slash is part of a segment.
Routes are tried in the order in which they were given.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Final

import msgspec

from cortex.web.asgi import Handler, Request
from cortex.wire.errors import CortexError, MethodNotAllowed, UnknownRoute, headers_of, to_bytes

Rendered = tuple[int, list[tuple[str, str]], bytes]
RenderError = Callable[[CortexError], Rendered]

_SEPARATOR: Final = "\0"
_PARAMETER: Final = re.compile(r"\{(\w+)(:path)?\}")


def canonical_error(error: CortexError) -> Rendered:
    """The envelope of `wire.errors`: status, headers, body."""
    return error.status, headers_of(error), to_bytes(error)


def always(headers: Mapping[str, str]) -> bool:
    return True


class Route(msgspec.Struct, frozen=True):
    """A method and a path pattern with its handler and its way of showing errors.

    `{name}` stands for one segment of the path, `{name:path}` for one or more. `matches` decides by the
    headers between routes that share method and path. `routine` is for what is polled: where it goes
    well, it is logged at DEBUG.
    """

    method: str
    path: str
    handler: Handler
    render_error: RenderError = canonical_error
    matches: Callable[[Mapping[str, str]], bool] = always
    routine: bool = False


Found = tuple[Route, dict[str, str]]
"""A route and the parameters that it took from the path."""


class Router:
    """Knows which routes are at a path: fixed paths by name, patterns in the order of their declaration."""

    def __init__(self, routes: Sequence[Route]) -> None:
        self._fixed: dict[str, list[Found]] = {}
        self._patterns: list[tuple[re.Pattern[str], Route]] = []
        for route in routes:
            if "{" in route.path:
                self._patterns.append((_compile(route.path), route))
            else:
                self._fixed.setdefault(route.path, []).append((route, {}))

    def at(self, request: Request) -> list[Found]:
        """Every route at the request's path, whatever its method, with the path's parameters."""
        fixed = self._fixed.get(request.path)
        if fixed is not None:
            return fixed
        segments = request.segments
        path = _SEPARATOR.join(segments)
        if path.count(_SEPARATOR) != len(segments) - 1:
            return []
        found = []
        for pattern, route in self._patterns:
            if match := pattern.fullmatch(path):
                params = {name: value.replace(_SEPARATOR, "/") for name, value in match.groupdict().items()}
                found.append((route, params))
        return found


def choose(request: Request, there: Sequence[Found]) -> Found:
    """The route for the request among those at its path. HEAD is served by the route of GET.

    Raises UnknownRoute, or MethodNotAllowed with the methods that there are in `details["allow"]`.
    """
    method = "GET" if request.method == "HEAD" else request.method
    for route, params in there:
        if route.method == method and route.matches(request.headers):
            return route, params
    if not there or any(route.method == method for route, _ in there):
        raise UnknownRoute(f"There is nothing at {request.method} {_shown(request.path)}.")
    allow = ", ".join(methods(there))
    raise MethodNotAllowed(
        f"{_shown(request.path)} does not answer {request.method}, only {allow}.", details={"allow": allow}
    )


def methods(there: Sequence[Found]) -> list[str]:
    """The methods that a path answers, from the routes at it."""
    found = {route.method for route, _ in there}
    return sorted(found | {"OPTIONS"} | ({"HEAD"} if "GET" in found else set()))


def spokesman(request: Request, there: Sequence[Found]) -> Route | None:
    """The route whose errors are shown for this request, even if it has another method."""
    fitting = [route for route, _ in there if route.matches(request.headers)] or [route for route, _ in there]
    same_method = [route for route in fitting if route.method == request.method]
    return next(iter(same_method or fitting), None)


def _compile(path: str) -> re.Pattern[str]:
    parts = []
    for segment in path.split("/"):
        if parameter := _PARAMETER.fullmatch(segment):
            name, whole = parameter.groups()
            parts.append(f"(?P<{name}>.+)" if whole else f"(?P<{name}>[^{_SEPARATOR}]+)")
        elif "{" in segment:
            raise ValueError(f"route {path}: a parameter must be a whole segment, not part of {segment!r}")
        else:
            parts.append(re.escape(segment))
    return re.compile(_SEPARATOR.join(parts), re.DOTALL)


def _shown(path: str) -> str:
    return path if len(path) <= 200 else path[:200] + "..."
