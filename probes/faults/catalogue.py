"""Every built-in fault; importing this module registers them"""

# ruff: noqa: I001
from dsv4_bench.probes.faults import linear  # noqa: F401
from dsv4_bench.probes.faults import experts  # noqa: F401
from dsv4_bench.probes.faults import attention  # noqa: F401
from dsv4_bench.probes.faults import hyper  # noqa: F401
from dsv4_bench.probes.faults import rope  # noqa: F401
from dsv4_bench.probes.faults import indexer  # noqa: F401
from dsv4_bench.probes.faults import cache  # noqa: F401
from dsv4_bench.probes.faults import router  # noqa: F401
from dsv4_bench.probes.faults import combination  # noqa: F401
from dsv4_bench.probes.faults import knockout  # noqa: F401
