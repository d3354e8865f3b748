"""How long `watch` takes from saving a kernel's source to its verdict

    python tests/reload_times.py SITE FILE [WATCH ARGUMENT ...]

Starts `dsv4-bench watch SITE` as a user does and saves FILE a few times with another comment at its
end. Prints one JSON document: seconds from the save to the line with the verdict, and the lines.
FILE is put back at the end.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

SAVES = 4


def main() -> int:
    site, file, *arguments = sys.argv[1:]
    path = Path(file)
    original = path.read_bytes()
    mark = "#" if path.suffix == ".py" else "//"
    words = [sys.executable, "-u", "-m", "dsv4_bench.workbench", "watch", site, *arguments]
    words += ["--attempts", str(SAVES + 1)]
    started = time.perf_counter()
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        lines = [process.stdout.readline().strip()]
        first = time.perf_counter() - started
        seconds = []
        for number in range(SAVES):
            time.sleep(0.5)
            path.write_bytes(original + f"\n{mark} save {number} of {started}\n".encode())
            saved = time.perf_counter()
            lines.append(process.stdout.readline().strip())
            seconds.append(time.perf_counter() - saved)
        process.wait(timeout=30)
    finally:
        process.kill()
        path.write_bytes(original)
    found = {"site": site, "file": path.name, "bytes": len(original), "seconds_to_first": first}
    print(json.dumps({**found, "seconds": seconds, "lines": lines}, indent=1))
    return 0 if all(seconds) else 1


if __name__ == "__main__":
    sys.exit(main())
