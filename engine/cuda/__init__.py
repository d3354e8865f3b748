"""Registers the CUDA implementations; importing it touches no GPU and builds nothing."""

import dsv4_bench.engine.cuda.attention
import dsv4_bench.engine.cuda.compressor
import dsv4_bench.engine.cuda.experts
import dsv4_bench.engine.cuda.fusion
import dsv4_bench.engine.cuda.gate
import dsv4_bench.engine.cuda.hyper
import dsv4_bench.engine.cuda.indexer
import dsv4_bench.engine.cuda.linear
import dsv4_bench.engine.cuda.linears
import dsv4_bench.engine.cuda.rows
import dsv4_bench.engine.cuda.sm100
import dsv4_bench.engine.cuda.softmax_stats
import dsv4_bench.engine.cuda.stats
import dsv4_bench.engine.cuda.step
import dsv4_bench.engine.cuda.timing  # noqa: F401
