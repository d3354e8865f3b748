"""Bundles: ops as they ran, with everything that is needed to run them again without the checkpoint.

A bundle is a folder, or a zip of one:

    manifest.json          what this is: schema version, command, versions, environment, checkpoint and
                           its config, route, tokens, steps, coverage, what watching cost, limits, and
                           the size and sha256 of every other file
    calls.json             `sites`: op, layer, stamp and constant arguments of each captured site;
                           `calls`: the captured ops in the order they ran
    calls/NNNN-<site>.safetensors     arguments, outputs and the reference's outputs of one call
    weights/<site>.safetensors        constant arguments of a site: weights as the checkpoint stores
                                      them, and of an expert bank the experts that were used
    readings.jsonl         what the probes read, one JSON object a line
    replay.py              runs the captured ops again with nothing but torch
    report.md report.html plots/      for people

A tensor file holds storages, not tensors: each piece of memory once, from the first byte some tensor
uses to the last, the gaps between included. A tensor is a view of it:

    {"kind": "tensor", "file": ..., "storage": ..., "dtype": "BF16", "shape": [...], "stride": [...],
     "offset": elements from the start of the storage}

so strides, padding and aliasing survive, and a kernel that gets them wrong gets them wrong again.
Other values are {"kind": "weight" | "expert" | "experts" | "step" | "dtype" | "value", ...}; see
`values.py`. Floats are JSON numbers, "inf", "-inf" or "nan".

Writing, from captured ops (`probes.capture.Captured`):

    from dsv4_bench.probes import bundle

    calls = [bundle.examine(captured, forward, limits) for captured in capture.calls]
    with bundle.Writer(Path("bug.zip"), max_bytes=25_000_000) as writer:
        for call in calls:
            writer.add_call(call)           # False: it did not fit, and is named in the manifest
        writer.add_readings(readings)
        writer.publish(manifest)            # appears whole under its name, or not at all

Reading is safe for files from strangers: nothing is unpickled, executed or written, names, sizes and
shapes are checked before memory is taken, and whatever is wrong is a `BadBundle` (exit code 4):

    opened = bundle.open_bundle(Path("bug.zip"))
    for entry in opened.calls:
        call = opened.load(entry)           # a BundleCall; call.captured.run(function) runs it again
"""

from dsv4_bench.probes.bundle.format import BadBundle
from dsv4_bench.probes.bundle.reader import Bundle, CallEntry, open_bundle
from dsv4_bench.probes.bundle.record import BundleCall, OutputCheck, examine, judge
from dsv4_bench.probes.bundle.writer import LeftOut, Writer

__all__ = [
    "BadBundle",
    "Bundle",
    "BundleCall",
    "CallEntry",
    "LeftOut",
    "OutputCheck",
    "Writer",
    "examine",
    "judge",
    "open_bundle",
]
