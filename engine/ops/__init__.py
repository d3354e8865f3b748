"""Every op with its reference, imported in data-flow order: the order of every list we show."""

from dsv4_bench.engine.ops import (  # noqa: F401
    embed,
    hyper,
    norm,
    linear,
    rope,
    kv,
    compressor,
    indexer,
    attention,
    gate,
    experts,
)
