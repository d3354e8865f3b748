"""How long nvcc takes for every CUDA source, one after the other, as JSON: build_times.py [NAME ...]

Everything is built anew into an empty cache; what others do on the machine is in the times.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time

from dsv4_bench.engine import cuda, ptxas


def main() -> int:
    names = sys.argv[1:] or cuda.library.sources()
    found = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["DSV4_CACHE"] = folder
        for name in names:
            started = time.perf_counter()
            built = cuda.library.library_path(name)
            seconds = time.perf_counter() - started
            found.append(
                {"source": name, "seconds": seconds, "kernels": len(ptxas.resources_of(built))}
            )
    print(json.dumps(sorted(found, key=lambda row: row["seconds"]), indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
