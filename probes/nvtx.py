"""NVTX ranges named like the sites, in the domain `dsv4`, with layer and token; free when nothing records"""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

from dsv4_bench.engine.registry import Site
from dsv4_bench.probes.tap import set_taps

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
    return domain if type(domain).__name__ == "Domain" else _insist(nvtx)


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


class Annotator:
    """A tap's observer that puts every op into a range, with the position of the pass's first token.

    It counts the tokens that the passes before brought, so it must see a sequence from its start.
    """

    def __init__(self) -> None:
        self.position = 0
        self._tokens = 0  # of the pass that is going on

    def wants(self, site: Site) -> bool:
        return True

    def around(self, site: Site, args: tuple[Any, ...]) -> Any:
        if site.op == "embed":  # a pass begins
            self.position += self._tokens
            self._tokens = len(args[0])
        with site_range(site.path, site.layer, self.position):
            return site.run(args)


def annotate(sites: Iterable[Site]) -> int:
    """Put every op of `sites` into a range, if something records; the number of sites."""
    return set_taps(sites, Annotator()) if _domain() is not None else 0
