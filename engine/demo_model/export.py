"""Write trained weights as a checkpoint: ModelOpt's NVFP4 layout, or everything in bfloat16.

    python -m dsv4_bench.engine.demo_model.export --weights FOLDER --out checkpoint [--layout bf16]

The routed experts become NVFP4 with one global scale for gate and up, the dense matrices FP8 in
128x128 blocks, the rest bfloat16 or float32 as in the releases. `input_scale` comes from the
largest activations that transformers' forward has on a few texts. Files stay below 16 MiB.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from dsv4_bench.engine.config import Config
from dsv4_bench.engine.demo_model import tasks
from dsv4_bench.engine.demo_model.train import CONFIG, load_weights, make_model
from dsv4_bench.engine.formats import quantize_nvfp4
from dsv4_bench.engine.names import Expected, expected_tensors
from dsv4_bench.engine.synthetic import encode, transformers_name

LIMIT = 31 << 19  # 15.5 MiB a file
_NVFP4_PEAK = 2688.0  # the largest e2m1 times the largest e4m3


def expert_peaks(model: Any, texts: int = 4, length: int = 512) -> dict[str, Tensor]:
    """Largest input of the routed experts' matrices: by layer, [2] for gate/up and down."""
    peaks: dict[str, Tensor] = {}

    def watch(name: str) -> Any:
        def hook(module: Any, args: tuple[Tensor, ...]) -> None:
            x, index, weights = args
            both = torch.einsum("nd,eid->nei", x, module.gate_up_proj)
            hidden = module._apply_gate(both)  # [n, e, i]
            share = torch.zeros(len(x), module.num_experts).scatter(1, index, weights)
            found = torch.stack((x.abs().max(), (hidden * share.unsqueeze(-1)).abs().max()))
            peaks[name] = torch.maximum(peaks.get(name, found), found)

        return hook

    layers = model.model.layers
    hooks = [
        layer.mlp.experts.register_forward_pre_hook(watch(f"layers.{i}"))
        for i, layer in enumerate(layers)
    ]
    with torch.no_grad():
        for number in range(texts):
            ids = tasks.document(f"calibration/{number}", length).ids
            model(torch.tensor([ids]), use_cache=False)
    for hook in hooks:
        hook.remove()
    return peaks


def find(state: dict[str, Tensor], item: Expected) -> Tensor:
    """The value of one expected tensor in a transformers state dict."""
    prefix, _, rest = item.name.partition(".ffn.experts.")
    if rest:
        number, leaf = rest.split(".")
        if leaf == "w2":
            return state[f"model.{prefix}.mlp.experts.down_proj"][int(number)]
        gate, up = state[f"model.{prefix}.mlp.experts.gate_up_proj"][int(number)].chunk(2)
        return gate if leaf == "w1" else up
    name = f"{item.name}.weight" if item.kind == "matrix" else item.name
    return state[transformers_name(name)]


def stored(
    model: Any, config: Config, layout: str, peaks: dict[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Every stored tensor of the checkpoint, by its original name."""
    state = {name: value.detach().cpu() for name, value in model.state_dict().items()}
    for item in expected_tensors(config):
        value = find(state, item)
        assert tuple(value.shape) == item.shape, (item, value.shape)
        if layout == "nvfp4" and ".ffn.experts." in item.name:
            yield from _expert(item, value, state, peaks)
        else:
            yield from encode(item, value, layout).items()


def _expert(
    item: Expected, value: Tensor, state: dict[str, Tensor], peaks: dict[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    leaf = item.name[-2:]
    peak = float(value.abs().max())
    if leaf != "w2":
        other = item._replace(name=item.name[:-2] + ("w3" if leaf == "w1" else "w1"))
        peak = max(peak, float(find(state, other).abs().max()))
    data, scale, global_scale = quantize_nvfp4(value, peak)
    inputs = peaks[item.name.partition(".ffn.")[0]][int(leaf == "w2")]
    yield f"{item.name}.weight", data
    yield f"{item.name}.weight_scale", scale
    yield f"{item.name}.weight_scale_2", global_scale
    yield f"{item.name}.input_scale", inputs / _NVFP4_PEAK


def write(folder: Path, tensors: Iterator[tuple[str, Tensor]], config: Config) -> None:
    """config.json, tokenizer.json, shards of at most 15.5 MiB and their index."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.safetensors*"):
        old.unlink()
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors:
        if size + tensor.nbytes > LIMIT - (256 << 10):  # the header takes some
            shards.append({})
            size = 0
        shards[-1][name] = tensor.contiguous()
        size += tensor.nbytes
    placed: dict[str, str] = {}
    for number, shard in enumerate(shards):
        name = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / name, metadata={"format": "pt"})
        (folder / name).chmod(0o644)
        placed |= dict.fromkeys(shard, name)
    total = sum(t.nbytes for shard in shards for t in shard.values())
    index = {"metadata": {"total_size": total}, "weight_map": placed}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=0) + "\n")
    (folder / "config.json").write_text(json.dumps(config.to_json(), indent=2) + "\n")
    tasks.write_tokenizer(folder / "tokenizer.json")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--weights", required=True, help="folder written by train.py")
    parser.add_argument("--out", required=True)
    parser.add_argument("--layout", default="nvfp4", choices=("nvfp4", "bf16"))
    args = parser.parse_args()
    model = make_model(CONFIG).eval()
    load_weights(model, Path(args.weights))
    peaks = expert_peaks(model) if args.layout == "nvfp4" else {}
    out = Path(args.out)
    write(out, stored(model, CONFIG, args.layout, peaks), CONFIG)
    size = sum(path.stat().st_size for path in out.iterdir())
    print(f"{out}: {size / 1e6:.2f} MB in {len(list(out.iterdir()))} files")


if __name__ == "__main__":
    main()
