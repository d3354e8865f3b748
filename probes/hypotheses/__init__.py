"""What was computed instead: the op's float64 oracle with one thing changed, compared with the wrong output

`base` has the machinery and the rule which mechanism counts as which kind, `arguments` the changes
any op may suffer, the other modules what is special to a family of ops.
"""

from dsv4_bench.probes.hypotheses import (  # noqa: F401  (they register their candidates)
    attention,
    experts,
    hyper,
    indexer,
    rows,
)
from dsv4_bench.probes.hypotheses.base import Explanation, Hypothesis, explain

__all__ = ["Explanation", "Hypothesis", "explain"]
