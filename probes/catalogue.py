"""The built-in probes; importing this module registers them."""

from dsv4_bench.probes import model, scales, tensor  # noqa: F401
