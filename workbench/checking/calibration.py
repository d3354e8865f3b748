"""What honest kernels may do to the logits of a run: their limits, and what counts as a near tie

The reference runs with every output moved at random, as far as the reference itself is from float64
(probes/noise.py). What this does to the logits is what honest kernels do; limits are MARGIN times that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from dsv4_bench.engine.model import Transformer
from dsv4_bench.engine.step import Step
from dsv4_bench.probes.decisions import Record, Replay
from dsv4_bench.probes.metrics import masks_differ, tensor_and_row_error
from dsv4_bench.probes.noise import Amplitudes, Noise
from dsv4_bench.probes.tap import Observer, set_taps
from dsv4_bench.workbench.checking import layerwise

MARGIN = 2.0
NOISE_RUNS = 3  # the first says what a near tie is, the others what noise does with ties settled
_FLOOR = 1e-7  # relative; float32 logits differ by this when one sum is taken in another order

Progress = Callable[[str, float, float], None]  # text, seconds or steps done, and in all


@contextmanager
def tapped(model: Transformer, observer: Observer | None) -> Iterator[None]:
    """The model's sites are tapped by `observer` inside the block."""
    set_taps(model.sites.values(), observer)
    try:
        yield
    finally:
        set_taps(model.sites.values(), None)


@dataclass(frozen=True)
class Calibration:
    """Limits of honest kernels on one set of tokens.

    error, row_error: relative L2 of all logits and of the worst position. logit_move: largest honest
    change of one logit. ties: by site that decides, how far apart scores may be for a near tie.
    """

    error: float
    row_error: float
    logit_move: float
    ties: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class LogitsError:
    """Logits of a run against the reference's, both [n, v]. `masks`: positions where exactly one of
    the two is not finite. `top1`: positions with another most likely token, beyond honest moves."""

    error: float
    row_error: float
    masks: int
    top1: int

    def within(self, limits: Calibration) -> bool:
        finite = self.error <= limits.error and self.row_error <= limits.row_error
        return finite and not self.masks


def logits_error(logits: Tensor, reference: Tensor, logit_move: float = 0.0) -> LogitsError:
    """Compare logits; a top-1 change counts if the reference's lead exceeds twice `logit_move`."""
    error, row_error = tensor_and_row_error(logits, reference)
    masks = int(masks_differ(logits, reference).any(-1).sum())
    lead = reference.amax(-1) - reference.gather(1, logits.argmax(-1, keepdim=True)).squeeze(1)
    return LogitsError(error, row_error, masks, int((lead > 2 * logit_move).sum()))


def calibrate(
    model: Transformer,
    steps: Sequence[Step],
    reference: Tensor,
    record: Record,
    amplitudes: Amplitudes,
    progress: Progress,
) -> Calibration:
    """Run the model on its present route, the reference, with noise; `record` holds its decisions."""
    ties: dict[str, float] = {}
    errors, row_errors, moves = [_FLOOR], [_FLOOR], [0.0]
    for seed in range(NOISE_RUNS):
        progress("calibrate", seed, NOISE_RUNS)
        replay = Replay(record, ties if seed else float("inf"), Noise(amplitudes, seed))
        with tapped(model, replay):
            logits = layerwise.run(model, steps)
        if not seed:
            # Two scores may each move by MARGIN times what is typical, in opposite directions.
            ties = {p: 2 * MARGIN * f.move for p, f in replay.flips.items() if f.move is not None}
        found = logits_error(logits, reference)
        errors.append(found.error)
        row_errors.append(found.row_error)
        moves.append(float((logits - reference).abs().nan_to_num(0.0, 0.0).max()))
    progress("calibrate", NOISE_RUNS, NOISE_RUNS)
    return Calibration(MARGIN * max(errors), MARGIN * max(row_errors), MARGIN * max(moves), ties)
