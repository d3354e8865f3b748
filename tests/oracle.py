"""transformers' DeepseekV4ForCausalLM with the dequantised weights of one of our checkpoints.

The independent implementation that the engine is compared with. Only names and dequantisation are
ours; both have tests of their own (test_checkpoint.py, test_formats.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from dsv4_bench.engine.checkpoint import Checkpoint
from dsv4_bench.engine.config import Config
from dsv4_bench.engine.model import Transformer
from dsv4_bench.engine.synthetic import transformers_name


def transformers_config(config: Config) -> Any:
    from transformers import DeepseekV4Config

    data = config.to_json()
    for key in ("architectures", "torch_dtype", "topk_method", "n_shared_experts"):
        data.pop(key)
    data["compress_ratios"] = list(config.compress_ratios)  # without the one for MTP
    return DeepseekV4Config(**data)


def transformers_model(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> Any:
    """The model in float32, or cast as from_pretrained(dtype=...) would."""
    from transformers import DeepseekV4ForCausalLM

    model = DeepseekV4ForCausalLM(transformers_config(checkpoint.config)).float()
    missing, unexpected = model.load_state_dict(dict(_state(checkpoint)), strict=False)
    assert not unexpected and not missing, (missing, unexpected)
    return cast(model, dtype).eval()


def cast(model: Any, dtype: torch.dtype) -> Any:
    """What from_pretrained(dtype=...) does; test_oracle.py checks that it does."""
    kept = list(model._get_dtype_plan(dtype))
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not any(re.search(part, name) for part in kept):
            parameter.data = parameter.data.to(dtype)
    return model


def _state(checkpoint: Checkpoint) -> Iterator[tuple[str, Tensor]]:
    for name in checkpoint.plain:
        value = checkpoint.tensor(name)
        yield transformers_name(name), value.float() if value.is_floating_point() else value.long()
    for name in checkpoint.matrices:
        if ".ffn.experts." not in name:
            yield transformers_name(f"{name}.weight"), checkpoint.weight(name).dequantize()
    for layer in range(checkpoint.config.num_hidden_layers):
        bank = checkpoint.experts(layer)
        experts = [bank[e] for e in range(len(bank))]
        gate_up = [torch.cat((e.w1.dequantize(), e.w3.dequantize())) for e in experts]
        prefix = f"model.layers.{layer}.mlp.experts"
        yield f"{prefix}.gate_up_proj", torch.stack(gate_up)
        yield f"{prefix}.down_proj", torch.stack([e.w2.dequantize() for e in experts])


@torch.inference_mode()
def transformers_logits(model: Any, tokens: Sequence[int]) -> Tensor:
    """One prefill without cache: float32 [T, v]."""
    return model(torch.tensor([list(tokens)]), use_cache=False).logits[0].float()


def engine_logits(model: Transformer, tokens: Sequence[int], chunks: Sequence[int] = ()) -> Tensor:
    """float32 [T, v] of the engine, fed in pieces of these sizes (default: one prefill)."""
    cache, done, logits = model.new_cache(), 0, []
    for size in chunks or [len(tokens)]:
        logits.append(model.forward(cache.step([list(tokens[done : done + size])]), cache))
        done += size
    assert done == len(tokens)
    return torch.cat(logits)


def relative_l2(value: Tensor, truth: Tensor) -> float:
    assert value.shape == truth.shape, (value.shape, truth.shape)
    return float((value.double() - truth.double()).norm() / truth.double().norm())
