"""`dsv4-bench generate`: prefill and decode."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from dsv4_bench.engine.errors import CannotAnswer, DSV4Error
from dsv4_bench.workbench.cli import common, output

_ALARMS = 4  # of a pass, that are said


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_engine_arguments(parser)
    common.add_prompt_arguments(parser)
    common.add_memory_arguments(parser)
    parser.add_argument("--max-new-tokens", type=int, default=32, metavar="N")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    parser.add_argument("--seed", type=int, default=0)
    common.add_graph_argument(parser)
    parser.add_argument(
        "--probes", metavar="a,b", help="watch every pass with these (all, or names); says alarms"
    )
    parser.add_argument(
        "--eval",
        type=int,
        nargs="?",
        const=4,
        metavar="N",
        help="measure what the demo model can do: N unseen texts (default 4), N / 2 facts at every "
        "distance, and the shipped prompts",
    )


def run(args: argparse.Namespace) -> int:
    if args.max_new_tokens < 1:
        raise DSV4Error(f"--max-new-tokens {args.max_new_tokens}: at least 1 is needed", "e.g. 32")
    if not 0 <= args.temperature < float("inf"):
        raise DSV4Error(f"--temperature {args.temperature} must be 0 or more", "0 is greedy")
    if not -(2**63) <= args.seed < 2**63:
        raise DSV4Error(f"--seed {args.seed} does not fit in 64 bits", "e.g. --seed 1")
    if args.eval is not None:
        return _evaluate(args)
    tokens = common.read_tokens(args.tokens, args.prompt)
    chunks = common.parse_chunks(args.chunks)

    from dsv4_bench.workbench.loading import load_model, prompt_tokens

    loaded = load_model(common.engine_options(args), output.loading)
    for note in loaded.notes:
        output.narrate(f"note: {note}")
    prompt = prompt_tokens(loaded, args.prompt, tokens)
    result = _decode(loaded, prompt, chunks, args)
    if args.json:
        output.print_json(result)
    else:
        rate = f"{result['tokens_per_second']:.1f} tokens/s" if result["tokens_per_second"] else ""
        output.narrate(
            f"{len(prompt)} prompt tokens in {result['prefill_seconds']:.2f} s, "
            f"{len(result['tokens'])} new {rate}"
        )
    return 0


def _evaluate(args: argparse.Namespace) -> int:
    """`--eval`: the texts and questions the demo model was trained for, none of them seen before."""
    if args.eval < 1:
        raise DSV4Error(f"--eval {args.eval}: at least one text is needed", "e.g. --eval 4")
    if args.prompt is not None or args.tokens is not None:
        raise DSV4Error("--eval brings its own prompts", "leave out --prompt and --tokens")

    from dsv4_bench.engine.demo_model import tasks
    from dsv4_bench.engine.demo_model.evaluate import evaluate, show
    from dsv4_bench.workbench.loading import load_model

    loaded = load_model(common.engine_options(args), output.loading)
    words = loaded.tokenizer.get_vocab() if loaded.tokenizer else {}
    if words != tasks.ID:
        raise CannotAnswer(
            f"--eval knows the demo model's words, and {loaded.folder} has {len(words)} others",
            "leave out CKPT for the demo checkpoint",
        )
    for note in loaded.notes:
        output.narrate(f"note: {note}")
    result = evaluate(loaded.model, args.eval, args.eval // 2, 2304, True, output.narrate)
    if args.json:
        output.print_json(result)
    else:
        show(result)
    return 0


def _decode(
    loaded: Any, prompt: list[int], chunks: tuple[int, ...], args: argparse.Namespace
) -> dict[str, Any]:
    from dsv4_bench.engine.generate import generate

    notes = list(loaded.notes)

    def tell(text: str) -> None:
        notes.append(text)
        output.narrate(f"note: {text}")

    watch = _watch(loaded, args, tell)
    started = time.perf_counter()
    first: float | None = None
    new: list[int] = []
    shown = ""
    for token in _watched(
        watch,
        generate(
            loaded.model,
            prompt,
            args.max_new_tokens,
            args.temperature,
            args.seed,
            chunks,
            graph=not args.no_graph,
            note=tell,
            observer=watch.observer if watch else None,
        ),
    ):
        first = first or time.perf_counter()
        new.append(token)
        text = loaded.tokenizer.decode(new) if loaded.tokenizer else " ".join(map(str, new))
        if not args.json and not text.endswith("\ufffd"):  # not in the middle of a character
            sys.stdout.write(text[len(shown) :])
            sys.stdout.flush()
            shown = text
    if not args.json:
        print(text[len(shown) :])
    ended = time.perf_counter()
    assert first is not None
    decoding = ended - first
    return {
        "prompt_tokens": prompt,
        "tokens": new,
        "text": text,
        "prefill_seconds": first - started,
        "seconds": ended - started,
        "tokens_per_second": (len(new) - 1) / decoding if len(new) > 1 and decoding > 0 else None,
        "route": [str(entry) for entry in loaded.model.route],
        "notes": notes,
        **({"probes": watch.summary()} if watch else {}),
    }


def _watch(loaded: Any, args: argparse.Namespace, tell: Callable[[str], None]) -> Any:
    """The GenerationWatch that `--probes` asks for, or None."""
    names = (args.probes or "none").replace(",", " ").split()
    if names in ([], ["none"]):
        return None
    from dsv4_bench.probes.base import make_probes
    from dsv4_bench.workbench.generation_watch import GenerationWatch

    return GenerationWatch(loaded.model, make_probes(names), not args.no_graph, tell)


def _watched(watch: Any, tokens: Iterator[int]) -> Iterator[int]:
    """The tokens, with what alarms a pass raised said before its token, even if none comes of it."""
    try:
        for token in tokens:
            if watch:
                _say(watch.token())
            yield token
    except DSV4Error:  # logits that are not finite: the pass was watched nevertheless
        if watch:
            _say(watch.token())
        raise


def _say(alarms: list[Any]) -> None:
    for alarm in alarms[:_ALARMS]:
        where = f"pass {alarm.forward} {alarm.site} {alarm.output}".rstrip()
        detail = f" ({alarm.detail})" if alarm.detail else ""
        output.narrate(f"alarm: {where}: {alarm.probe}.{alarm.name} {alarm.value}{detail}")
    if len(alarms) > _ALARMS:
        output.narrate(f"alarm: {len(alarms) - _ALARMS} more in this pass")
