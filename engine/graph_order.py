"""In which order sites of one input are captured.

Which sites run side by side follows from what they read (graph_branches.py). A kernel takes its place on the
processors when it is launched, not when its input is there, so that what is captured first is served first.
Sites are named by their path below the layer; those that a layer does not have are left out. What the
orders are worth: docs/cuda_layer.md.
"""

from __future__ import annotations

# When the first of a group is called, all are captured, in this order.
GROUPS: tuple[tuple[str, ...], ...] = (
    ("attn/wq_a", "attn/compressor/wkv"),
    ("attn/index/wq_b", "attn/wq_b"),
)
