"""Registers every implementation that ships; importing it touches no GPU and builds nothing."""

import dsv4_bench.engine.cpu
import dsv4_bench.engine.cuda
import dsv4_bench.engine.dsl.linear
import dsv4_bench.engine.ops  # noqa: F401
