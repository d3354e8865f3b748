"""The tap: the one place where the engine lets somebody look at, or take over, an op.

A site without a tap costs one test. An observer is asked once per site whether it wants it
(`wants`); only those sites get a tap, and only they pay for observation.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from dsv4_bench.engine.registry import Site


class Observer(Protocol):
    """Somebody who looks at ops while the engine runs."""

    def wants(self, site: Site) -> bool:
        """Whether `around` shall be called for this site. Asked when the tap is set."""
        ...

    def around(self, site: Site, args: tuple[Any, ...]) -> Any:
        """Run the op (`site.run(args)`), look at what it likes, return the outputs."""
        ...


def set_taps(sites: Iterable[Site], observer: Observer | None) -> int:
    """Tap the sites that `observer` wants; None removes every tap. Returns the number of taps."""
    count = 0
    for site in sites:
        wanted = observer is not None and observer.wants(site)
        site.tap = observer.around if observer is not None and wanted else None
        count += wanted
    return count
