"""transformers' DeepseekV4ForCausalLM with the dequantised weights of one of our checkpoints."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dsv4_bench.engine.checkpoint import Checkpoint
from dsv4_bench.engine.config import Config
from dsv4_bench.engine.synthetic import transformers_name


def transformers_config(config: Config) -> Any:
    from transformers import DeepseekV4Config

    data = config.to_json()
    for key in ("architectures", "torch_dtype", "topk_method", "n_shared_experts"):
        data.pop(key)
    data["compress_ratios"] = list(config.compress_ratios)
    return DeepseekV4Config(**data)


def transformers_model(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> Any:
    """The independent oracle; only the dequantisation is ours (tested on its own)."""
    from transformers import DeepseekV4ForCausalLM

    with torch.device("meta"):
        model = DeepseekV4ForCausalLM(transformers_config(checkpoint.config))
    fresh = DeepseekV4ForCausalLM(transformers_config(checkpoint.config)).float()
    del model
    state = {name: value for name, value in _state(checkpoint)}
    missing, unexpected = fresh.load_state_dict(state, strict=False)
    assert not unexpected and not missing, (missing, unexpected)
    return _cast(fresh, dtype).eval()


def _cast(model: Any, dtype: torch.dtype) -> Any:
    """What from_pretrained(dtype=...) does: the modules named as float32 stay so."""
    keep = tuple(getattr(model, "_keep_in_fp32_modules_strict", None) or ()) + tuple(
        getattr(model, "_keep_in_fp32_modules", None) or ()
    )
    for name, parameter in [*model.named_parameters(), *model.named_buffers()]:
        if parameter.is_floating_point() and "inv_freq" not in name:
            if not any(part in name for part in keep):
                parameter.data = parameter.data.to(dtype)
    return model


def _state(checkpoint: Checkpoint) -> Any:
    config = checkpoint.config
    for name in checkpoint.plain:
        value = checkpoint.tensor(name)
        yield transformers_name(name), value if value.dtype == torch.int64 else value.float()
    for name in checkpoint.matrices:
        if ".ffn.experts." not in name:
            yield transformers_name(f"{name}.weight"), checkpoint.weight(name).dequantize()
    for layer in range(config.num_hidden_layers):
        bank = checkpoint.experts(layer)
        experts = [bank[e] for e in range(len(bank))]
        gate_up = [torch.cat((e.w1.dequantize(), e.w3.dequantize())) for e in experts]
        prefix = f"model.layers.{layer}.mlp.experts"
        yield f"{prefix}.gate_up_proj", torch.stack(gate_up)
        yield f"{prefix}.down_proj", torch.stack([e.w2.dequantize() for e in experts])


@torch.inference_mode()
def transformers_logits(model: Any, tokens: list[int]) -> Tensor:
    """One prefill without cache: float32 [T, v]."""
    return model(torch.tensor([tokens]), use_cache=False).logits[0].float()


def relative_l2(value: Tensor, truth: Tensor) -> float:
    return float((value.double() - truth.double()).norm() / truth.double().norm())
