"""`python -m dsv4_bench.workbench` is `dsv4-bench`."""

import sys

from dsv4_bench.workbench.cli import main

sys.exit(main())
