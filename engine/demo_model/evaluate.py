"""Judge a checkpoint of the demo model with this engine: what it says, not how far its numbers are.

    python -m dsv4_bench.engine.demo_model.evaluate [CKPT] [--quick] [--route kernel]

Texts of 2304 tokens, never seen in training, are read once: the loss, and the share of tokens
predicted right by kind, recalled values by their distance d to the latest mention. Then prompts
with one fact at a chosen distance, and a few prompts that are continued greedily. What mistakes in
the engine do to the answers: `dsv4-bench faults --blast`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv4_bench.engine.checkpoint import Checkpoint
from dsv4_bench.engine.demo_model import tasks
from dsv4_bench.engine.generate import generate, teacher_forced_logits
from dsv4_bench.engine.model import Transformer
from dsv4_bench.engine.registry import parse_route

HERE = Path(__file__).parent / "checkpoint"
NEEDLES = (20, 60, 100, 160, 300, 450, 600, 900, 1200, 1600, 2000)
Tally = dict[str, list[int]]  # right, asked
Say = Callable[[str], None]


# ------------------------------------------------------------------------------ measuring


def count(tally: Tally, name: str, right: bool) -> None:
    entry = tally.setdefault(name, [0, 0])
    entry[0] += int(right)
    entry[1] += 1


def band(distance: int) -> str:
    for name, (low, high) in zip(tasks.BAND_NAMES, tasks.BANDS, strict=True):
        if low <= distance < high:
            return name
    raise ValueError(distance)


def read_documents(model: Transformer, number: int, length: int, say: Say) -> tuple[float, Tally]:
    """Loss over all tokens, and the tallies by kind and band."""
    tally: Tally = {}
    losses = []
    for index in range(number):
        say(f"document {index + 1} of {number}")
        doc = tasks.document(f"eval/{index}", length)
        logits = teacher_forced_logits(model, doc.ids[:-1])
        target = torch.tensor(doc.ids[1:])
        losses.append(float(F.cross_entropy(logits, target)))
        right = (logits.argmax(-1) == target).tolist()
        for hit, kind, distance in zip(right, doc.kinds[1:], doc.distances[1:], strict=True):
            name = tasks.KIND_NAMES[kind]
            if kind in (tasks.RECALL, tasks.QUESTION):
                name += f" {band(distance)}"
            if kind != tasks.RANDOM:
                count(tally, name, hit)
    return sum(losses) / len(losses), tally


def find_needles(model: Transformer, each: int, distances: tuple[int, ...], say: Say) -> Tally:
    """Recall of one fact at each distance, by distance."""
    tally: Tally = {}
    for distance in distances if each else ():
        say(f"{each} facts at a distance of {distance}")
        for index in range(each):
            ids, value, _exact = tasks.needle(f"needle/{distance}/{index}", distance)
            found = last_logits(model, ids).argmax()
            count(tally, f"needle {distance}", int(found) == value)
    return tally


def last_logits(model: Transformer, ids: list[int]) -> Tensor:
    cache = model.new_cache()
    return model.forward(cache.step([ids]), cache, last_only=True)[0]


def continuations(model: Transformer, new: int, say: Say) -> list[tuple[str, str]]:
    """Each prompt with what the model says next, greedily."""
    found = []
    for prompt in tasks.PROMPTS:
        say(f"continuing {prompt!r}")
        ids = [tasks.ID[tasks.BOS], *tasks.encode(prompt)]
        found.append((prompt, tasks.decode(list(generate(model, ids, new)))))
    return found


def evaluate(
    model: Transformer, documents: int, needles: int, length: int, texts: bool, say: Say
) -> dict[str, Any]:
    """What `model` can do on its route, as one JSON object.

    `documents` (at least one) texts of `length` tokens are read, `needles` facts looked for at each
    of NEEDLES; `texts` asks for the continuations too. `say` is told what is going on.
    """
    start = time.monotonic()
    loss, tally = read_documents(model, documents, length, say)
    tally |= find_needles(model, needles, NEEDLES, say)
    continued = continuations(model, 16, say) if texts else []
    used = Counter(site.stamp.implementation for site in model.sites.values())
    return {
        "checkpoint": model.checkpoint.folder.name,
        "route": ", ".join(str(entry) for entry in model.route),
        "dtype": str(model.dtype).removeprefix("torch."),
        "sites by implementation": used,
        "documents": documents,
        "loss": round(loss, 4),
        "tally": tally,
        "texts": continued,
        "seconds": round(time.monotonic() - start, 1),
    }


# ------------------------------------------------------------------------------ command


def show(result: dict[str, Any]) -> None:
    """The result as a table."""
    print(
        f"{result['checkpoint']}: route {result['route']}, {result['dtype']}; "
        f"{result['documents']} documents, loss {result['loss']:.4f}, {result['seconds']} s"
    )
    used = ", ".join(f"{n} {name}" for name, n in result["sites by implementation"].items())
    print(f"  sites by implementation: {used}")
    order = {name: place for place, name in enumerate(tasks.BAND_NAMES)}
    names = sorted(result["tally"], key=lambda n: (n.split()[0], order.get(n.split()[-1], 0)))
    for name in names:
        right, asked = result["tally"][name]
        print(f"  {name:20} {100 * right / asked:6.1f} %  of {asked}")
    for prompt, text in result["texts"]:
        print(f"  {prompt} -> {text}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("checkpoint", nargs="?", default=str(HERE))
    parser.add_argument("--route", default="reference", help="reference or kernel")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true", help="2 documents, no needles")
    parser.add_argument("--documents", type=int, default=0)
    parser.add_argument("--needles", type=int, default=-1, help="prompts for each distance")
    parser.add_argument("--length", type=int, default=2304)
    parser.add_argument("--text", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--json", default="", help="also write the result to this file")
    args = parser.parse_args()
    model = Transformer(Checkpoint(args.checkpoint), getattr(torch, args.dtype), args.device)
    if args.route != "reference":
        import dsv4_bench.engine.cpu  # noqa: F401  (registers the CPU kernels)
    model.set_route(parse_route([args.route]))
    documents = args.documents or (2 if args.quick else 20)
    each = args.needles if args.needles >= 0 else (0 if args.quick else 8)
    result = evaluate(model, documents, each, args.length, args.text, _narrate)
    show(result)
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n")


def _narrate(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r{text:70}", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
