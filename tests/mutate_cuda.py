"""Breaks the CUDA kernels one line at a time and says whether the tests notice; on a GPU.

    python tests/mutate_cuda.py OUT [--only 'attention*'] [--jobs 3] [--limit 120]

Each mutant is a copy of csrc with one replacement. Its tests run until the first that fails; the source is
compiled before, so that code which does not compile counts as an error and not as noticed. OUT/mutants.json is
written after every mutant: {"name", "file", "before", "after", "tests", "outcome", "seconds"}, where outcome is
killed (a test failed), hung (the limit ended it: noticed too), survived, or error. Exit status 1 unless all
were noticed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

import children

TESTS = Path(__file__).parent
NOTICED = ("killed", "hung")
_ERROR = 70  # exit status of RUN where the mutant is not built
# In a process of its own: every build takes the changed sources.
RUN = f"""
import sys
from pathlib import Path
import dsv4_bench.engine.implementations
from dsv4_bench.engine import build, cuda
build.csrc = lambda: Path(sys.argv[1])
try:
    cuda.library.build_all(sys.argv[2].split(","), workers=2)
except Exception as error:
    print(error)
    sys.exit({_ERROR})
import pytest
sys.exit(pytest.main(sys.argv[3:]))
"""


class Mutant(NamedTuple):
    name: str
    file: str  # below csrc/cuda
    before: str  # found once
    after: str
    tests: str  # pytest's -k, after the file and a blank
    sources: tuple[str, ...] = ()  # those of a header

    @property
    def built(self) -> tuple[str, ...]:
        """The sources that have to be compiled."""
        return self.sources or (self.file.removesuffix("_sm90.cu"),)


MUTANTS = (
    Mutant(
        "few rows: the last warp's sums are dropped",
        "few_rows.cuh",
        "if (s < block.split) total +=",
        "if (s < block.split - (block.split > 1)) total +=",
        "test_cuda_linears.py",
        ("linears",),
    ),
    Mutant(
        "linear: one block of a cluster adds up",
        "linear_sm90.cu",
        "for (int c = 0; c < clusters; c++)\n",
        "for (int c = 0; c < 1; c++)\n",
        "test_cuda_linear.py ragged or model_shapes",
    ),
    Mutant(
        "linear: tiles of every group read the first one's columns",
        "linear_sm90.cu",
        "token * p.x_stride + row0 / p.per_group * p.w.k;",
        "token * p.x_stride;",
        "test_cuda_linear.py grouped",
    ),
    Mutant(
        "linears: the first block of a matrix takes the one before",
        "linears_sm90.cu",
        "b >= p.end[i]",
        "b > p.end[i]",
        "test_cuda_linears.py",
    ),
    Mutant(
        "skinny: the last part of the columns is not added",
        "skinny.cuh",
        "total[0] += part[b].x,",
        "total[0] += base + b + 1 < parts ? part[b].x : 0,",
        "test_cuda_skinny.py",
        ("skinny",),
    ),
    Mutant(
        "skinny: activations are overwritten while they are read",
        "skinny.cuh",
        "if (turn >= Memory::kSlots) barrier_wait(&s.empty[at], parity(turn - Memory::kSlots));",
        "",
        "test_cuda_skinny.py",
        ("skinny",),
    ),
    Mutant(
        "experts: an incomplete piece is left out",
        "experts_lists.cuh",
        "pieces = (mine + m.most - 1) / m.most;",
        "pieces = mine / m.most;",
        "test_cuda_experts.py test_experts and (256-128 or 160-96)",
        ("experts",),
    ),
    Mutant(
        "experts: the last slot is not added",
        "experts_lists.cuh",
        "for (int s = 0; s < m.k; s++)",
        "for (int s = 0; s < m.k - 1; s++)",
        "test_cuda_experts.py test_experts and (256-128 or 160-96)",
        ("experts",),
    ),
    Mutant(
        "experts of few pairs: the finisher does not wait for the sums",
        "experts_few.cuh",
        "barrier_wait(&s.summed, number++ % 2);",
        "number++;",
        "test_cuda_experts.py test_experts and (256-128 or 160-96)",
        ("experts",),
    ),
    Mutant(
        "experts of many pairs: an activation's power of two is not undone",
        "experts_many.cuh",
        "return kHalves ? *(const float2*)&item.undo[at] : make_float2(1, 1);",
        "return make_float2(1, 1);",
        "test_cuda_experts.py magnitude",
        ("experts",),
    ),
    Mutant(
        "experts of few pairs: codes are copied without exchanging units",
        "experts_few.cuh",
        "&to.codes[Ahead::row()][to.unit_of(Ahead::row(), Ahead::unit())]",
        "&to.codes[Ahead::row()][Ahead::unit()]",
        "test_cuda_experts.py test_experts and (256-128 or 160-96)",
        ("experts",),
    ),
    Mutant(
        "experts of many pairs: the second row has the first one's place",
        "experts_many.cuh",
        "row_of[8] = sum",
        "row_of[7] = sum",
        "test_cuda_experts.py tile_width",
        ("experts",),
    ),
    Mutant(
        "experts of one token: the powers of two of all hidden vectors are the first's",
        "stage_products.cuh",
        "x.restored(sum[i], row + column(i))",
        "x.restored(sum[i], column(i))",
        "test_cuda_experts.py experts_at_model_shapes",
        ("experts",),
    ),
    Mutant(
        "few rows: a row's sums belong to the next",
        "stage_products.cuh",
        "const int row = 2 * lane.member + i % 2;",
        "const int row = (2 * lane.member + i % 2) ^ (rows > 1);",
        "test_cuda_linears.py",
        ("linears",),
    ),
    Mutant(
        "shared expert: gate and up have one scale",
        "experts_ring.cuh",
        "__shfl_sync(~0u, now, h * kMost + i)",
        "__shfl_sync(~0u, now, i)",
        "test_cuda_experts.py shared_expert_at_model_shape",
        ("experts",),
    ),
    Mutant(
        "attention, tile: two keys exchange their masks",
        "attention_tile.cuh",
        "if (!(mine >> (i / 4 * 8 + i % 2) & 1))",
        "if (!(mine >> (i / 4 * 8 + (i + 1) % 2) & 1))",
        "test_cuda_attention.py widths and 150",
        ("attention",),
    ),
    Mutant(
        "attention, tile: the other warpgroup's weights are not waited for",
        "attention_tile.cuh",
        "barrier_wait(&s.weighed[stage][0], phase);",
        "",
        "test_cuda_attention.py widths or identical",
        ("attention",),
    ),
    Mutant(
        "attention, gathering: entries are indexed like the window",
        "attention_gather.cuh",
        "(block - (block >= blocks ? blocks : 0)) * kBlock",
        "block * kBlock",
        "test_cuda_attention.py widths",
        ("attention",),
    ),
    Mutant(
        "attention, packed: rows ahead are those of the same block",
        "attention_packed.cuh",
        "later < kOwn ? now : next",
        "now",
        "test_cuda_kv.py widths",
        ("attention",),
    ),
    Mutant(
        "attention, packed: every entry begins at a multiple of 16 bytes",
        "attention_packed.cuh",
        "ring[slot] + offset, lane",
        "ring[slot], lane",
        "test_cuda_kv.py widths",
        ("attention",),
    ),
    Mutant(
        "attention, few: one CTA's share is not rescaled",
        "attention_few.cuh",
        "all.sum += s.shares[k][column].sum * weight_of(s.shares[k][column].most, all.most);",
        "all.sum += s.shares[k][column].sum;",
        "test_cuda_attention.py widths or outliers",
        ("attention",),
    ),
    Mutant(
        "attention, combining: no sink",
        "attention_sm90.cu",
        "Softmax total = with_sink(all, sink[row % heads]);",
        "Softmax total = all;",
        "test_cuda_attention.py shares",
    ),
    Mutant(
        "top-k: a score at the bound is no candidate",
        "topk_bound.cuh",
        "value[j] >= bound ?",
        "value[j] > bound + 0.01f ?",
        "test_cuda_indexer.py test_topk",
        ("topk",),
    ),
    Mutant(
        "top-k: candidates of one score share a place",
        "topk_rank.cuh",
        "rank += s.binned[other] > mine[j];",
        "rank += s.binned[other] >> 32 > mine[j] >> 32;",
        "test_cuda_indexer.py test_topk",
        ("topk",),
    ),
    Mutant(
        "top-k of a short row: hidden scores are candidates",
        "topk_short.cuh",
        "mine[j] = at < count ?",
        "mine[j] = at < total ?",
        "test_cuda_indexer.py block_each",
        ("topk",),
    ),
    Mutant(
        "scores: the last key a token may see is hidden",
        "indexer_sm90.cu",
        "p.score[token * p.total + entry] = entry < visible ? mine",
        "p.score[token * p.total + entry] = entry < visible - 1 ? mine",
        "test_cuda_indexer.py scores",
    ),
    Mutant(
        "scores of a token: negative products count",
        "indexer_token.cuh",
        "w.x * relu(dot[4 * i + 2 * half]) +",
        "w.x * dot[4 * i + 2 * half] +",
        "test_cuda_indexer.py decode",
        ("indexer",),
    ),
    Mutant(
        "scores with the rope of the query: another position",
        "indexer_token.cuh",
        "turn(position, freqs.x, false)",
        "turn(position + 1, freqs.x, false)",
        "test_cuda_indexer.py rope",
        ("indexer",),
    ),
    Mutant(
        "hyper: streams are read before they are expanded",
        "hyper_roles.cuh",
        "(Expands ? s.expanded : s.loaded)",
        "s.loaded",
        "test_cuda_hyper.py post_fused or norm",
        ("hyper",),
    ),
    Mutant(
        "hyper: the last term of a weight is dropped",
        "hyper_roles.cuh",
        "rest[2 * i + 1] -= high_bf16(pair);",
        "rest[2 * i + 1] = 0;",
        "test_cuda_hyper.py real_widths",
        ("hyper",),
    ),
    Mutant(
        "hc_post: the next stream's combination",
        "hyper_post_sm90.cu",
        "expand_streams(in, streams, a[k], c + k, value);",
        "expand_streams(in, streams, a[k], c + (k + 1) % kStreams, value);",
        "test_cuda_hyper.py post",
    ),
    Mutant(
        "gate: the last token is left out",
        "gate_sm90.cu",
        "const bool valid = token < p.n && column + at < p.d;",
        "const bool valid = token + 1 < p.n && column + at < p.d;",
        "test_cuda_gate.py not hundred",
    ),
    Mutant(
        "norm_rope: the mean is of one element more",
        "norm_rope_sm90.cu",
        "/ (float)how.d + how.eps",
        "/ (float)(how.d + 1) + how.eps",
        "test_cuda_graph.py fused_norm_rope",
        ("norm_rope",),
    ),
    Mutant(
        "rope: odd elements turn the other way",
        "norm_sm90.cu",
        "v.at[j + 1] = from_float<T>(even * cs.y + odd * cs.x);",
        "v.at[j + 1] = from_float<T>(odd * cs.x - even * cs.y);",
        "test_cuda_linear.py test_rope",
    ),
    Mutant(
        "cache_write: rows of the cache are dense",
        "rows_sm90.cu",
        "cache + slot * stride, d);",
        "cache + slot * d, d);",
        "test_cuda_linear.py cache_write",
    ),
    Mutant(
        "compressor: the closed window stays in the state",
        "compressor_sm90.cu",
        "put(open(first + i), own, {-INFINITY, 0});",
        "if (!kOverlap) put(open(first + i), own, {-INFINITY, 0});",
        "test_cuda_compressor.py bits",
    ),
    Mutant(
        "compressor: the window closes a token early",
        "compressor_sm90.cu",
        "return filled + 1 == ratio;",
        "return filled + 2 == ratio;",
        "test_cuda_compressor.py bits",
    ),
    Mutant(
        "step: a window that stays open gets a slot",
        "step_sm90.cu",
        "slots[b] = seen > index ? base + index : -1;",
        "slots[b] = base + index;",
        "test_cuda_graph.py step_kernel",
    ),
    Mutant(
        "step: entries of another sequence's pool",
        "step_sm90.cu",
        "(int)(blockIdx.x * capacity) + entry",
        "(int)(blockIdx.x * k) + entry",
        "test_cuda_graph.py step_kernel and 3",
    ),
    Mutant(
        "statistics: infinity is finite",
        "probe_moments.cuh",
        "if (range.y < INFINITY) {",
        "if (range.y <= INFINITY) {",
        "test_cuda_probes.py hostile or equal",
        ("probes",),
    ),
    Mutant(
        "softmax probe: keys that do not exist count",
        "probe_softmax_sm90.cu",
        "(exist[j] >> 4 * (2 * t + i % 2) & 1)",
        "(exist[j] >> 4 * (2 * t) & 1)",
        "test_cuda_softmax_stats.py",
    ),
    Mutant(
        "attention: nobody is left what was not turned",
        "attention_few.cuh",
        "if (p.unturned) store8(",
        "if (false) store8(",
        "test_cuda_attention.py rope_in_the_same_launch",
        ("attention",),
    ),
    Mutant(
        "compressor: every sequence leaves its norm in the first row",
        "compressor_sm90.cu",
        "finish.normed + sequence.window * p.dim",
        "finish.normed",
        "test_cuda_compressor.py entry_in_one_launch",
    ),
)


def changed(mutant: Mutant, folder: Path) -> None:
    """csrc with the mutant's change at `folder`. SystemExit if its text is not there, or not once."""
    shutil.copytree(TESTS.parent / "csrc", folder)
    path = folder / "cuda" / mutant.file
    text = path.read_text()
    if text.count(mutant.before) != 1:
        raise ValueError(f"{mutant.file} has {mutant.before!r} {text.count(mutant.before)} times")
    path.write_text(text.replace(mutant.before, mutant.after))


def outcome_of(mutant: Mutant, log: Path, limit: float) -> str:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "csrc"
        try:
            changed(mutant, folder)
        except ValueError as error:
            log.write_text(str(error))
            return "error"
        file, _, chosen = mutant.tests.partition(" ")
        pytest = ["-x", "-q", "-p", "no:cacheprovider", "-c", os.devnull, "-W", "ignore"]
        pytest += ["--rootdir=.", f"tests/{file}", *(["-k", chosen] if chosen else [])]
        command = [sys.executable, "-c", RUN, str(folder), ",".join(mutant.built), *pytest]
        status = children.ended(command, log, limit, TESTS.parent)
    return "hung" if status is None else {0: "survived", 1: "killed"}.get(status, "error")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, help="folder for logs and mutants.json")
    parser.add_argument("--only", default="*", help="globs of names, with |")
    parser.add_argument("--jobs", type=int, default=3)
    parser.add_argument("--limit", type=float, default=120, help="seconds for a mutant")
    args = parser.parse_args()
    children.end_with_this_process()
    args.out.mkdir(parents=True, exist_ok=True)
    chosen = [m for m in MUTANTS if any(fnmatchcase(m.name, g) for g in args.only.split("|"))]
    found = []

    def run(number: int, mutant: Mutant) -> dict[str, object]:
        began = time.monotonic()
        outcome = outcome_of(mutant, args.out / f"mutant.{number}.log", args.limit)
        seconds = round(time.monotonic() - began, 1)
        return {**mutant._asdict(), "outcome": outcome, "seconds": seconds}

    with ThreadPoolExecutor(args.jobs) as pool:
        waiting = [pool.submit(run, MUTANTS.index(mutant), mutant) for mutant in chosen]
        for done in as_completed(waiting):
            row = done.result()
            found.append(row)
            print(f"{row['outcome']}: {row['name']}, {row['seconds']} s", flush=True)
            (args.out / "mutants.json").write_text(json.dumps(found, indent=1) + "\n")
    missed = [row for row in found if row["outcome"] not in NOTICED]
    print(f"{len(found) - len(missed)} of {len(found)} mutants were noticed")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
