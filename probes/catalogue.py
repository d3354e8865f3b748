"""The built-in probes; importing this module registers them."""

from dsv4_bench.probes import (  # noqa: F401
    attention,
    experts,
    indexer,
    model,
    occupancy,
    origin,
    scales,
    tensor,
)
