"""Registers every implementation for a GPU; importing it touches none and builds nothing."""

import dsv4_bench.engine.cuda_attention
import dsv4_bench.engine.cuda_experts
import dsv4_bench.engine.cuda_fusion
import dsv4_bench.engine.cuda_hyper
import dsv4_bench.engine.cuda_indexer
import dsv4_bench.engine.cuda_linear
import dsv4_bench.engine.cuda_rows
import dsv4_bench.engine.cuda_sm100
import dsv4_bench.engine.cuda_softmax_stats
import dsv4_bench.engine.cuda_stats
import dsv4_bench.engine.cuda_step
import dsv4_bench.engine.cuda_timing
import dsv4_bench.engine.dsl.linear  # noqa: F401
