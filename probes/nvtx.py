"""NVTX ranges named like the sites, in the domain `dsv4`, with layer and token; free when nothing records"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

from dsv4_bench.engine.registry import Function, Site
from dsv4_bench.engine.step import Step

DOMAIN = "dsv4"
LAYER = 10**9  # payload = layer * LAYER + position of the first token


def recording() -> bool:
    """Whether a tool that records NVTX was injected into this process (nsys, ncu)."""
    return bool(os.environ.get("NVTX_INJECTION64_PATH"))


def payload(layer: int | None, position: int) -> int:
    """Layer and token as one number that reads well: 12000000237 is layer 12, token 237.

    Sites outside the layers have -1 - position.
    """
    return -1 - position if layer is None else layer * LAYER + position


@cache
def _domain() -> Any:
    """The nvtx package's domain, or None: no package, or nobody who records."""
    if not recording():
        return None
    try:
        import nvtx
    except ImportError:
        return None
    domain = nvtx.get_domain(DOMAIN)
    if type(domain).__name__ != "Domain":
        domain = _insist(nvtx)
    return domain if domain is None or hasattr(domain, "push_range") else _Functions(nvtx)


def _insist(nvtx: Any) -> Any:
    """A live domain where the package believes that nobody listens.

    nsys before 2024 records ranges but does not answer whether a domain is enabled; nvtx from
    0.2.12 on takes no answer for a no.
    """
    try:
        from nvtx._lib.lib import Domain, DomainHandle

        domain = object.__new__(Domain)
        domain.handle = DomainHandle(DOMAIN)
        domain.__init__(DOMAIN)
        return domain
    except (ImportError, AttributeError, TypeError):  # another version's inside
        return None


class _Functions:
    """A domain of the nvtx package before 0.2.12, which pushes ranges by functions of the module."""

    def __init__(self, nvtx: Any) -> None:
        self._nvtx = nvtx

    def get_event_attributes(self, message: str, payload: int) -> dict[str, Any]:
        return {"message": message, "payload": payload}

    def push_range(self, attributes: dict[str, Any]) -> None:
        self._nvtx.push_range(domain=DOMAIN, **attributes)

    def pop_range(self) -> None:
        self._nvtx.pop_range(domain=DOMAIN)


class _Range:
    """One range as a context manager."""

    __slots__ = ("attributes", "domain")

    def __init__(self, domain: Any, name: str, number: int) -> None:
        self.domain = domain
        self.attributes = domain.get_event_attributes(message=name, payload=number)

    def __enter__(self) -> None:
        self.domain.push_range(self.attributes)

    def __exit__(self, *_: object) -> None:
        self.domain.pop_range()


def site_range(
    path: str, layer: int | None = None, position: int = 0
) -> AbstractContextManager[Any]:
    """A range called `path` around a block; nothing where nothing records."""
    domain = _domain()
    return nullcontext() if domain is None else _Range(domain, path, payload(layer, position))


class _Pass:
    """Where the forward pass that is running begins: the position of its first token.

    Passes that follow one another count themselves, by the tokens that each embeds; whoever runs
    them in another order says where one begins.
    """

    def __init__(self) -> None:
        self.position = 0
        self._tokens = 0  # of this pass, once it has embedded them

    def begin(self, position: int) -> None:
        self.position, self._tokens = position, 0

    def embed(self, count: int) -> None:
        self.position += self._tokens
        self._tokens = count


_pass = _Pass()


def begin(step: Step) -> Step:
    """The ops that run from now on belong to `step`: its first sequence says where they stand."""
    _pass.begin(step.starts[0])
    return step


def _ranged(site: Site, function: Function) -> Function:
    """`function` in a range with the site's path, and in one named like the implementation."""
    name = site.impl.name

    def run(*args: Any) -> Any:
        if site.op == "embed":
            _pass.embed(len(args[0]))
        with site_range(site.path, site.layer, _pass.position), site_range(name):
            return function(*args)

    return run


def annotate() -> bool:
    """From now on put every op into a range, if something records; whether it does.

    It holds for models that are built later, on any route, with or without an observer.
    """
    if _domain() is None:
        return False
    Site.wrap = staticmethod(_ranged)
    return True
