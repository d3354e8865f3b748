"""What the runs of measure_profile.sh say together, as one JSON document: `profile_summary.py FOLDER`

Per layer, the sum of its sites and of the code between them over the layer measured whole; per site,
its time beside what Nsight Compute counted; the ceilings; the times of hot reload.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from dsv4_bench.workbench.timing.document import short_name

LONG = 20e-6  # seconds: kernels that are compared with Nsight Compute


def read(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def layers(document: Any) -> list[dict[str, Any]]:
    """Whole layers, times in microseconds."""
    found = []
    for entry in document["whole"]:
        parts = entry["sites"] + entry["between"]
        row = {
            "layer": entry["layer"],
            "kind": document["layers"][str(entry["layer"])],
            "whole_us": 1e6 * entry["seconds"],
            "sites_us": 1e6 * entry["sites"],
            "between_us": 1e6 * entry["between"],
            "sites_and_between_over_whole": parts / entry["seconds"],
            "comparable": entry["comparable"],
            "from_python_us": 1e6 * entry["eager"],
        }
        if "graph" in entry:
            row["graph_us"] = 1e6 * entry["graph"]["seconds"]
            row["graph_in_one_chain_us"] = 1e6 * entry["graph"]["chain"]
            row["stamped_sites_us"] = 1e6 * sum(s["seconds"] for s in entry["graph"]["sites"])
        found.append(row)
    return found


def beside_ncu(document: Any, counted: Any) -> list[dict[str, Any]]:
    """Sites with a kernel that takes long: their time over the sum of what ncu says, warm and cold."""
    kernels: dict[str, list[dict[str, Any]]] = {}
    for kernel in counted["kernels"]:
        kernels.setdefault(kernel["site"], []).append(kernel)
    found = []
    for site in document["sites"]:
        own = kernels.get(site["site"], [])
        if max((kernel["seconds"] or 0.0 for kernel in own), default=0.0) <= LONG:
            continue
        seconds = site["seconds"][site["kernel"]]
        total, cold = (sum(kernel[name] for kernel in own) for name in ("seconds", "cold"))
        found.append(
            {
                "site": site["site"],
                "kernels": [
                    f"{short_name(k['kernel'])[:60]} {1e6 * k['seconds']:.1f}" for k in own
                ],
                "profile_us": 1e6 * seconds,
                "ncu_us": 1e6 * total,
                "ncu_cold_us": 1e6 * cold,
                "ratio": seconds / total,
            }
        )
    return found


def main() -> int:
    folder = Path(sys.argv[1])
    found: dict[str, Any] = {"layers": {}, "beside_ncu": {}, "reload": {}}
    for path in sorted(folder.glob("*.json")):
        document = read(path)
        if not isinstance(document, dict):
            continue
        if "whole" in document:
            found["device"] = document["ceilings"]["device"]
            found["ceilings"] = document["ceilings"]
            found["layers"][path.stem] = layers(document)
            counted = read(path.with_name(f"ncu_{path.name}"))
            if counted:
                found["beside_ncu"][path.stem] = beside_ncu(document, counted)
        elif "seconds_to_first" in document:
            names = ("site", "file", "bytes", "seconds")
            found["reload"][path.stem] = {name: document[name] for name in names}
    print(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
