"""Weights as the CUDA kernels take them: in GPU memory, from addresses that 16-byte loads accept."""

from __future__ import annotations

from dsv4_bench.engine.cuda.library import dense, wrong
from dsv4_bench.engine.packed import Packed, Packs, WeightStruct

__all__ = ["Packed", "WeightStruct", "pack"]

pack = Packs("of one GPU", lambda tensor: tensor.is_cuda, dense, wrong)
