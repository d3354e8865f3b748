"""In which order and behind what a layer's sites are captured where their data leave a choice.

Which sites run side by side follows from what they read (graph_branches.py). These tables are about the
processors they compete for: a kernel takes its place when it is launched, not when its input is there.
Sites are named by their path below the layer; those that a layer does not have are left out. What the
choices are worth: docs/cuda_layer.md.
"""

from __future__ import annotations

# Sites whose first argument is the same tensor: when the first of a group is called, all are captured, in
# this order.
GROUPS: tuple[tuple[str, ...], ...] = (
    ("attn/wq_a", "attn/compressor/wkv"),
    ("attn/index/wq_b", "attn/wq_b"),
)

# Sites that wait for others whose results they do not read, if these were captured before.
AFTER: dict[str, tuple[str, ...]] = {}
