"""Train the demo checkpoint: transformers' DeepseekV4ForCausalLM on the texts of tasks.py.

    python -m dsv4_bench.engine.demo_model.train --out FOLDER            # the whole plan, one GPU
    python -m dsv4_bench.engine.demo_model.train --out F --resume F      # go on from saved weights
    python -m dsv4_bench.engine.demo_model.train --check                 # equality with transformers

A plan is a list of stages length:batch:steps:topk:quantised; steps may be "90s", which ends the
stage 90 seconds after the program started (the log says at which step that was). A sixth number
ends the stage sooner, once that share of the values beyond the window has been recalled over the
last 200 steps. A seventh is the window of every second sequence, 128 if left out: with a short one
nearly every value has to come through the compressed entries, which a model with the whole window
learns to use by chance only (LOG.md). The data of stage s, sequence i comes from the seed "s/i", so
a run that goes on sees the texts it would have seen.
Every two minutes the weights are written to --out as bfloat16 safetensors of at most 15.5 MiB each,
and everything with the optimiser to --state, from which the next run continues exactly.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from dsv4_bench.engine.config import Config
from dsv4_bench.engine.demo_model import tasks
from dsv4_bench.engine.demo_model.fast import FastForward
from dsv4_bench.engine.demo_model.quant import fake_quantized

CONFIG = Config(
    vocab_size=tasks.VOCAB_SIZE,
    hidden_size=192,
    num_hidden_layers=16,
    num_attention_heads=4,
    q_lora_rank=128,
    o_groups=2,
    o_lora_rank=128,
    n_routed_experts=8,
    num_experts_per_tok=2,
    moe_intermediate_size=64,
    index_n_heads=16,
    index_topk=32,
    max_position_embeddings=65536,
    compress_ratios=(0, 0, *(4, 128) * 7),
)
# The shipped checkpoint had 2775, 1690 and 732 steps; LOG.md says what fixed numbers led to.
PLAN = "512:32:6000:0:0:0.97:16,2304:7:1690:1:0,2304:7:732:1:1"
RECENT = 4  # reports over which a stage's goal is judged
FAR = 3.0  # how much more a recalled value counts that stands beyond the window
SHARD = 31 << 19  # 15.5 MiB


class Stage(NamedTuple):
    """`steps` steps on `batch` sequences of `length` tokens; with top-k, through quantisation."""

    length: int
    batch: int
    steps: int
    topk: int
    quantised: int
    until: float = math.inf  # seconds since the program started
    goal: float = math.inf  # share of recall beyond the window that ends it
    window: int = CONFIG.sliding_window  # of every second sequence

    def windows(self, device: torch.device) -> Tensor:
        """[batch] int64: how many tokens back a sequence sees without entries."""
        windows = torch.full((self.batch,), CONFIG.sliding_window, device=device)
        windows[::2] = self.window
        return windows


def parse_plan(text: str) -> list[Stage]:
    stages = []
    for part in text.split(","):
        length, batch, steps, topk, quantised, *rest = part.split(":")
        until = float(steps[:-1]) if steps.endswith("s") else math.inf
        count = 1_000_000 if steps.endswith("s") else int(steps)
        goal = float(rest[0]) if rest else math.inf
        window = int(rest[1]) if rest[1:] else CONFIG.sliding_window
        stages.append(
            Stage(int(length), int(batch), count, int(topk), int(quantised), until, goal, window)
        )
    return stages


# ------------------------------------------------------------------------------ model


def make_model(config: Config, seed: int = 0) -> Any:
    """A transformers model in float32 with our initial values, every tensor from its own seed."""
    from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

    data = config.to_json()
    for key in ("architectures", "torch_dtype", "topk_method", "n_shared_experts"):
        data.pop(key)
    data["compress_ratios"] = list(config.compress_ratios)
    model = DeepseekV4ForCausalLM(DeepseekV4Config(**data)).float()
    with torch.no_grad():
        for name, value in model.named_parameters():
            _initialise(name, value, config, random.Random(f"{seed}/{name}"))
        for layer in range(config.num_hash_layers):
            table = model.model.layers[layer].mlp.gate.tid2eid
            table.copy_(hash_table(config, random.Random(f"{seed}/hash/{layer}")))
    return model


def hash_table(config: Config, rng: random.Random) -> Tensor:
    """[v, k] expert ids: every set of experts equally often, in random order."""
    assert config.num_experts_per_tok == 2
    pairs = [(a, b) for a in range(config.n_routed_experts) for b in range(a)]
    order = list(range(config.vocab_size))
    rng.shuffle(order)
    table = torch.empty(config.vocab_size, 2, dtype=torch.long)
    for rank, token in enumerate(order):
        table[token] = torch.tensor(pairs[rank % len(pairs)])
    return table


def _initialise(name: str, value: Tensor, config: Config, rng: random.Random) -> None:
    generator = torch.Generator().manual_seed(rng.getrandbits(62))
    leaf = name.rsplit(".", 2)
    if "norm" in leaf[-2]:
        value.fill_(1.0)
    elif leaf[-1] == "sinks" or "position_bias" in name:
        value.zero_()
    elif leaf[-1] in ("scale", "hc_scale"):
        value.fill_(1.0)
    elif leaf[-1] in ("base", "hc_base"):
        value.zero_()
        if leaf[-1] == "base":  # read mostly one stream, keep the streams apart
            layer = int(name.split(".")[2])
            value[:4] = -1.0
            value[(2 * layer + ("ffn" in name)) % 4] = 1.0
            value[8:] = 3.0 * torch.eye(4).flatten()
    elif leaf[-1] in ("fn", "hc_fn"):
        value.copy_(0.01 * torch.randn(value.shape, generator=generator))
    else:
        std = value.shape[-1] ** -0.5
        if "embed_tokens" in name:
            std = 0.5
        elif any(part in name for part in ("lm_head", "o_b_proj", "down_proj")):
            std *= 0.3
        value.copy_(std * torch.randn(value.shape, generator=generator))


# ------------------------------------------------------------------------------ data


class Texts(torch.utils.data.Dataset):
    """Sequence i of stage s: int16 [3, length] of ids, kinds and distances."""

    def __init__(self, number: int, stage: Stage, first: int) -> None:
        self.number, self.stage, self.first = number, stage, first

    def __len__(self) -> int:
        return (self.stage.steps - self.first) * self.stage.batch

    def __getitem__(self, index: int) -> Tensor:
        if index >= len(self):
            raise IndexError(index)
        index += self.first * self.stage.batch
        doc = tasks.document(f"{self.number}/{index}", self.stage.length + 1)
        return torch.tensor([doc.ids, doc.kinds, doc.distances], dtype=torch.int16)


def batches(number: int, stage: Stage, first: int, workers: int) -> Iterator[Tensor]:
    """The stage's batches from step `first` on, int16 [batch, 3, length + 1]."""
    loader = torch.utils.data.DataLoader(
        Texts(number, stage, first),
        batch_size=stage.batch,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        prefetch_factor=8 if workers else None,
    )
    return iter(loader)


# ------------------------------------------------------------------------------ saving


def save_weights(model: Any, folder: Path, note: dict[str, Any]) -> None:
    """The model as bfloat16 shards of at most 15.5 MiB, with the step in progress.json."""
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, value in model.state_dict().items():
        small = value.dim() < 2 or not value.is_floating_point()
        value = value.detach().cpu() if small else value.detach().to(torch.bfloat16).cpu()
        if size + value.nbytes > SHARD:
            shards.append({})
            size = 0
        shards[-1][name] = value.contiguous()
        size += value.nbytes
    for number, shard in enumerate(shards):
        save_file(shard, folder / f"weights-{number}.part")
        (folder / f"weights-{number}.part").replace(folder / f"weights-{number}.safetensors")
    (folder / "progress.json").write_text(json.dumps(note))


def load_weights(model: Any, folder: Path) -> dict[str, Any]:
    """The opposite; returns the note."""
    state: dict[str, Tensor] = {}
    for path in sorted(folder.glob("weights-*.safetensors")):
        state |= load_file(path)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not missing and not unexpected, (missing, unexpected)
    return json.loads((folder / "progress.json").read_text())


# ------------------------------------------------------------------------------ training


class Trainer:
    """The model, its optimiser and the position in the plan."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.plan = parse_plan(args.plan)
        self.total = sum(stage.steps for stage in self.plan)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.set_float32_matmul_precision("high")
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.model = make_model(CONFIG).to(self.device)
        self.fast = FastForward(self.model, CONFIG, dtype, args.compile)
        self.optimizer = self._optimizer()
        self.step = self.resumed_at = 0
        self.started = self.saved = time.monotonic()
        self._resume()
        self.kind_weights = torch.tensor(tasks.WEIGHTS, device=self.device)

    def _optimizer(self) -> torch.optim.Optimizer:
        decayed: list[Tensor] = []
        free: list[Tensor] = []
        for name, value in self.model.named_parameters():
            matrix = value.dim() >= 2 and not any(s in name for s in ("embed", "hc", "bias"))
            (decayed if matrix else free).append(value)
        groups = [
            {"params": decayed, "weight_decay": self.args.decay},
            {"params": free, "weight_decay": 0.0},
        ]
        cuda = self.device.type == "cuda"
        rate = torch.tensor(self.args.lr, device=self.device) if cuda else self.args.lr
        return torch.optim.AdamW(
            groups, lr=rate, betas=(0.9, 0.95), eps=1e-9, fused=cuda, capturable=cuda
        )

    def _resume(self) -> None:
        state = Path(self.args.state)
        if self.args.state and state.exists():
            data = torch.load(state, map_location=self.device, weights_only=True)
            self.model.load_state_dict(data["model"])
            self.optimizer.load_state_dict(data["optimizer"])
            self.step = data["step"]
            self.resumed_at = -(10**9)
            print(f"continues exactly from {state}, step {self.step}", flush=True)
        elif self.args.resume:
            self.step = load_weights(self.model, Path(self.args.resume))["step"]
            if self.args.step >= 0:
                self.step = self.args.step
            self.resumed_at = self.step
            print(f"continues from bfloat16 weights, step {self.step}", flush=True)

    def save(self, suffix: str = "") -> None:
        note = {"step": self.step, "plan": self.args.plan, "lr": self.args.lr}
        save_weights(self.model, Path(self.args.out + suffix), note)
        if self.args.state:
            data = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
            torch.save({**data, "step": self.step}, self.args.state + ".part")
            Path(self.args.state + ".part").replace(self.args.state)
        self.saved = time.monotonic()
        print(f"saved at step {self.step}", flush=True)

    def learning_rate(self) -> float:
        """Warm up, hold, then fall linearly to 2 % over the last `cool` share of the plan."""
        warm = min(1.0, (self.step + 1) / 300, (self.step + 1 - self.resumed_at) / 100)
        end = self.plan[-1].until
        if end < math.inf:
            left = (end - (time.monotonic() - self.started)) / (self.args.cool * end)
        else:
            left = (self.total - self.step) / max(1.0, self.args.cool * self.total)
        return self.args.lr * min(warm, max(0.02, min(1.0, left)))

    def losses(self, batch: Tensor, stage: Stage) -> tuple[Tensor, dict[str, Tensor]]:
        """The training loss, and what to report of this batch."""
        ids, kinds, distances = batch.to(self.device, non_blocking=True).long().unbind(1)
        override = fake_quantized(self.fast.params) if stage.quantised else None
        topk = CONFIG.index_topk if stage.topk else 0
        windows = stage.windows(self.device)
        out = self.fast(ids[:, :-1].contiguous(), topk, override, windows)
        target, weight = ids[:, 1:], self.kind_weights[kinds[:, 1:]]
        far = (kinds[:, 1:] == tasks.RECALL) & (distances[:, 1:] >= windows[:, None])
        weight = torch.where(far, FAR * weight, weight)
        each = F.cross_entropy(out.logits.flatten(0, 1), target.flatten(), reduction="none")
        loss = (each * weight.flatten()).sum() / weight.sum()
        seen = {
            "loss": loss.detach(),
            "index": out.index_loss.detach(),
            "captured": out.captured.detach(),
            "right": (out.logits.argmax(-1) == target).detach(),
            "kinds": kinds[:, 1:],
            "distances": distances[:, 1:],
            "far": far,
        }
        self._balance(out.loads)
        return loss + self.args.index_weight * out.index_loss, seen

    def _balance(self, loads: list[Tensor]) -> None:
        """Move the routers' selection bias towards the experts that get too few tokens."""
        for layer, load in zip(self.model.model.layers, loads, strict=True):
            bias = getattr(layer.mlp.gate, "e_score_correction_bias", None)
            if bias is not None:
                bias.data += 1e-3 * torch.sign(load.mean() - load)

    def run(self) -> None:
        first = 0
        for number, stage in enumerate(self.plan):
            if self.step < first + stage.steps:
                self._stage(number, stage, max(0, self.step - first))
            early = min(stage.until, stage.goal) < math.inf
            first = self.step if early else first + stage.steps
            self.total = first + sum(later.steps for later in self.plan[number + 1 :])
        self.save()

    def _steer(self) -> None:
        """Take new end times from the file --steer, when somebody watching has written one."""
        if self.args.steer and Path(self.args.steer).exists():
            plan = parse_plan(Path(self.args.steer).read_text().strip())
            if plan != self.plan:
                print(f"plan changed to {plan}", flush=True)
                self.plan = plan

    def _advance(self, batch: Tensor, stage: Stage) -> tuple[dict[str, Tensor], Tensor]:
        """One step of the optimiser on a batch that is on the device."""
        self.optimizer.zero_grad(set_to_none=True)
        loss, seen = self.losses(batch, stage)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return seen, norm

    def _set_rate(self) -> None:
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(self.learning_rate())
            else:
                group["lr"] = self.learning_rate()

    def _stage(self, number: int, stage: Stage, done: int) -> None:
        """One stage from its step `done` on; the first steps eagerly, the rest as a CUDA graph."""
        print(f"stage {number}: {stage} from step {self.step}", flush=True)
        runner = Replay(self, stage) if self.device.type == "cuda" and self.args.graph else None
        since, tokens = time.monotonic(), 0
        recalls: deque[float] = deque(maxlen=RECENT)
        for batch in batches(number, stage, done, self.args.workers):
            self._set_rate()
            if runner:
                seen, norm = runner(batch)
            else:
                seen, norm = self._advance(batch.to(self.device), stage)
            self.step += 1
            tokens += stage.batch * stage.length
            if self.step % self.args.every == 0:
                line = self._line(seen, norm)
                print(f"{line} {tokens / (time.monotonic() - since) / 1e3:.0f}k tok/s", flush=True)
                since, tokens = time.monotonic(), 0
                self._steer()
                recalls.append(_far_recall(seen))
                if len(recalls) == RECENT and sum(recalls) / RECENT >= stage.goal:
                    print(f"goal {stage.goal} reached: {sum(recalls) / RECENT:.3f}", flush=True)
                    break
            if time.monotonic() - self.started > self.plan[number].until:
                break
            if time.monotonic() - self.saved > self.args.save_every:
                self.save()
                since, tokens = time.monotonic(), 0
        print(f"stage {number} ends at step {self.step}", flush=True)
        if self.args.keep_stages:
            self.save(f"-stage{number}")

    def _line(self, seen: dict[str, Tensor], norm: Tensor) -> str:
        right, kinds, distances = seen["right"], seen["kinds"], seen["distances"]

        def share(mask: Tensor) -> str:
            count = int(mask.sum())
            return f"{100 * float(right[mask].float().mean()):.0f}" if count else "-"

        by_kind = " ".join(
            f"{tasks.KIND_NAMES[k]} {share(kinds == k)}"
            for k in (tasks.TEXT, tasks.COPY, tasks.SUM, tasks.RULE, tasks.QUESTION)
        )
        recall = kinds == tasks.RECALL
        bands = "/".join(
            share(recall & (distances >= low) & (distances < high)) for low, high in tasks.BANDS
        )
        elapsed = time.monotonic() - self.started
        return (
            f"{self.step:6d} {elapsed:5.0f}s loss {float(seen['loss']):.4f} recall {bands} {by_kind} "
            f"index {float(seen['index']):.3f} captured {float(seen['captured']):.3f} "
            f"norm {float(norm):.2f} lr {self.learning_rate():.1e}"
        )


def _far_recall(seen: dict[str, Tensor]) -> float:
    """Share of values beyond the window that were predicted right in one batch."""
    found = seen["right"][seen["far"]]
    return float(found.float().mean()) if len(found) else 0.0


class Replay:
    """A whole training step as one CUDA graph: thousands of launches cost more than their work."""

    def __init__(self, trainer: Trainer, stage: Stage) -> None:
        self.trainer, self.stage = trainer, stage
        shape = (stage.batch, 3, stage.length + 1)
        self.batch = torch.zeros(shape, dtype=torch.int16, device=trainer.device)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.result: tuple[dict[str, Tensor], Tensor] | None = None
        self.eager = 0  # steps done without a graph
        self.failed = False
        self.side = torch.cuda.Stream()

    def __call__(self, batch: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        self.batch.copy_(batch, non_blocking=True)
        if self.graph is None and not self.failed and self.eager >= 4:
            self._capture()
        if self.graph is not None and self.result is not None:
            self.graph.replay()
            return self.result
        self.eager += 1
        self.side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.side):
            result = self._profiled() if self.eager == 4 else self._step()
        torch.cuda.current_stream().wait_stream(self.side)
        return result

    def _step(self) -> tuple[dict[str, Tensor], Tensor]:
        return self.trainer._advance(self.batch, self.stage)

    def _profiled(self) -> tuple[dict[str, Tensor], Tensor]:
        """One step with the profiler on: what the time goes into."""
        if not self.trainer.args.profile:
            return self._step()
        kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        torch.cuda.synchronize()
        start = time.monotonic()
        with torch.profiler.profile(activities=kinds) as profile:
            result = self._step()
            torch.cuda.synchronize()
        print(f"profiled step: {time.monotonic() - start:.3f} s", flush=True)
        found = sorted(profile.key_averages(), key=lambda e: -e.self_device_time_total)
        total = sum(e.self_device_time_total for e in found)
        lines = [f"device time {total / 1e3:.1f} ms"]
        lines += [
            f"{e.self_device_time_total / 1e3:9.2f} ms {e.count:6d} x {e.key[:90]}"
            for e in found[:60]
        ]
        Path(self.trainer.args.profile).write_text("\n".join(lines) + "\n")
        return result

    def _capture(self) -> None:
        trainer, start = self.trainer, time.monotonic()
        try:
            torch.cuda.synchronize()
            trainer.optimizer.zero_grad(set_to_none=True)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self.result = self._step()
            self.graph = graph
            print(f"captured in {time.monotonic() - start:.1f} s", flush=True)
        except RuntimeError as error:
            print(f"no CUDA graph: {str(error)[:600]}", flush=True)
            self.failed = True
            torch.cuda.synchronize()


# ------------------------------------------------------------------------------ check


def check(compiled: bool) -> None:
    """Compare the fast forward with transformers' own on the same weights and tokens."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = make_model(CONFIG).to(device).eval()
    with torch.no_grad():  # move away from the regular initial values
        for name, value in model.named_parameters():
            value += 0.02 * torch.randn(value.shape, generator=_seeded(name)).to(device)
    ids = torch.tensor([tasks.document(f"check/{i}", 512).ids for i in range(2)], device=device)
    with torch.no_grad():
        theirs = model(ids, use_cache=False).logits.float()
        for dtype in (torch.float32, torch.bfloat16):
            fast = FastForward(model, CONFIG, dtype, compiled)
            ours = fast(ids, CONFIG.index_topk).logits
            error = float((ours - theirs).norm() / theirs.norm())
            print(
                f"fast forward in {dtype} against transformers: relative L2 {error:.2e}", flush=True
            )
            dense = fast(ids, 0).logits
            print(f"  all entries instead of {CONFIG.index_topk}: "
                  f"{float((dense - theirs).norm() / theirs.norm()):.2e}")  # fmt: skip


def _seeded(name: str) -> torch.Generator:
    return torch.Generator().manual_seed(random.Random(name).getrandbits(62))


def warm(args: argparse.Namespace) -> None:
    """Run two steps of every stage, so that a run beside this one finds its kernels compiled."""
    trainer = Trainer(args)
    for stage in trainer.plan:
        start = time.monotonic()
        for _ in range(2):
            batch = torch.zeros(stage.batch, 3, stage.length + 1, dtype=torch.int16)
            loss = trainer._advance(batch.to(trainer.device), stage)[0]["loss"]
        print(f"{stage}: {time.monotonic() - start:.1f} s, loss {float(loss):.3f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--out", default="demo-weights")
    parser.add_argument("--resume", default="", help="folder of saved bfloat16 weights")
    parser.add_argument("--state", default="", help="file with everything, to continue exactly")
    parser.add_argument(
        "--step", type=int, default=-1, help="with --resume: the step to go on from"
    )
    parser.add_argument("--plan", default=PLAN)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--cool", type=float, default=0.35)
    parser.add_argument("--decay", type=float, default=0.05)
    parser.add_argument("--index-weight", type=float, default=0.2)
    parser.add_argument("--graph", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--profile", default="", help="file for a profile of one step a stage")
    parser.add_argument("--steer", default="", help="file with a plan that replaces --plan")
    parser.add_argument("--warm", action="store_true", help="only compile: two steps a stage")
    parser.add_argument(
        "--keep-stages", action="store_true", help="save each stage's end, in OUT-stage<n>"
    )
    parser.add_argument("--save-every", type=float, default=120)
    parser.add_argument("--every", type=int, default=50)
    parser.add_argument("--workers", type=int, default=12)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    torch._dynamo.config.cache_size_limit = 64
    if args.check:
        check(compiled=args.compile and torch.cuda.is_available())
    elif args.warm:
        warm(args)
    else:
        Trainer(args).run()


if __name__ == "__main__":
    main()
