"""Every op with its reference, imported in data-flow order: the order of every list we show."""

# ruff: noqa: I001
from dsv4_bench.engine.ops import embed  # noqa: F401
from dsv4_bench.engine.ops import hyper  # noqa: F401
from dsv4_bench.engine.ops import norm  # noqa: F401
from dsv4_bench.engine.ops import linear  # noqa: F401
from dsv4_bench.engine.ops import rope  # noqa: F401
from dsv4_bench.engine.ops import kv  # noqa: F401
from dsv4_bench.engine.ops import compressor  # noqa: F401
from dsv4_bench.engine.ops import indexer  # noqa: F401
from dsv4_bench.engine.ops import attention  # noqa: F401
from dsv4_bench.engine.ops import gate  # noqa: F401
from dsv4_bench.engine.ops import experts  # noqa: F401
