"""Writing an adapter for servers: plain LoRA, one rank, one scaling, nothing else to know."""

from __future__ import annotations

import copy
import logging
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from safetensors.torch import save_file
from torch import Tensor

from lorainit.adapters.layers import adapter_layers, is_linear
from lorainit.adapters.save import adapter_files
from lorainit.adapters.serving import PREFIX, WEIGHTS_FILE, serving_objections
from lorainit.errors import AdapterError, RankError
from lorainit.types.numbers import require_count

logger = logging.getLogger("lorainit")


@dataclass(frozen=True)
class ExportReport:
    """What `export` wrote.

    Attributes:
        folder: where.
        rank: of every layer in the files.
        scaling: of every layer, ``lora_alpha / r`` in the files.
        errors: by layer, ``|B A - B' A'|_F / |B A|_F``; zero where nothing was cut off.
        objections: why servers might refuse it, in words; empty for a plain LoRA adapter.
    """

    folder: Path
    rank: int
    scaling: float
    errors: Mapping[str, float]
    objections: tuple[str, ...]

    @property
    def largest_error(self) -> float:
        """The largest of `errors`, or zero."""
        return max(self.errors.values(), default=0.0)


def export(
    model: PeftModel,
    folder: str | os.PathLike[str],
    *,
    adapter_name: str = "default",
    rank: int | None = None,
    max_rank: int | None = None,
) -> ExportReport:
    """Write an adapter as plain LoRA files that need no patterns and no second look.

    Every layer gets one rank ``r`` and one scaling ``lora_alpha / r``, with ``use_rslora`` off and
    no ``rank_pattern`` or ``alpha_pattern``, so servers that read only ``r`` and ``lora_alpha``
    compute what the model computes. Layers of lower rank are padded with zeros; what is left of a
    layer's own scaling is multiplied into its ``B``. An anchored adapter is written at rank ``2r``,
    exactly, or cut by singular value decomposition to the `rank` asked for. What else is trained
    (``modules_to_save``, DoRA magnitudes, biases, embeddings, trainable tokens) comes along.

    Files are written aside and take their places together, the configuration last: whatever happens, the
    folder is the older export, the new one, or has no configuration and is not loadable.

    Args:
        model: holds the adapter.
        folder: to write to, made if it is not there.
        adapter_name: of the adapter to write.
        rank: cut every layer to this rank, the best approximation there is, and report the error it
            makes; None keeps the largest rank of the adapter.
        max_rank: the server's limit on the rank (vLLM: ``--max-lora-rank``, 16 unless told), to
            have it among the objections.

    Returns:
        What was written, the errors by layer, and what servers may object to.

    Raises:
        AdapterError: no such adapter, or one that is no LoRA adapter.
        RankError: `rank` below one.
    """
    config = _lora_config(model, adapter_name)
    for setting, value in (("rank", rank), ("max_rank", max_rank)):
        if value is not None:
            require_count(setting, value, error=RankError)
    layers = adapter_layers(model, adapter_name)
    own = {n: layer for n, layer in layers.items() if not isinstance(layer, ParamWrapper)}
    common = rank or max((layer.r[adapter_name] for layer in own.values()), default=config.r)
    scaling, alpha = _global_scaling(config, common)
    tensors = {
        key: value.detach().cpu()
        for key, value in get_peft_model_state_dict(model, adapter_name=adapter_name).items()
    }
    errors: dict[str, float] = {}
    for name, layer in layers.items():
        if isinstance(layer, ParamWrapper):
            _check_experts(name, layer, adapter_name, common, scaling)
            continue
        errors[name] = _rewrite(tensors, name, layer, adapter_name, common, scaling)
    plain = _plain_config(model, config, common, alpha)
    path = Path(folder)
    _write(path, tensors, plain)
    report = ExportReport(
        path, common, scaling, errors, tuple(serving_objections(path, max_rank=max_rank))
    )
    logger.info(_summary(report))
    return report


def _lora_config(model: PeftModel, adapter_name: str) -> LoraConfig:
    if not isinstance(model, PeftModel):
        raise AdapterError(f"export wants a PeftModel, not a {type(model).__name__}.")
    if adapter_name not in model.peft_config:
        known = ", ".join(map(repr, model.peft_config))
        raise AdapterError(f"the model has no adapter '{adapter_name}'; it has {known}.")
    config = model.peft_config[adapter_name]
    if not isinstance(config, LoraConfig):
        raise AdapterError(
            f"adapter '{adapter_name}' is a {type(config).__name__}; only LoRA adapters are "
            "exported."
        )
    return config


def _global_scaling(config: LoraConfig, rank: int) -> tuple[float, int]:
    """The scaling of the files and their alpha, whole: the adapter's own, or else one."""
    scaling = config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)
    alpha = scaling * rank
    if round(alpha) >= 1 and abs(alpha - round(alpha)) < 1e-9 * alpha:
        return round(alpha) / rank, round(alpha)
    return 1.0, rank


def _plain_config(model: PeftModel, config: LoraConfig, rank: int, alpha: int) -> LoraConfig:
    plain: LoraConfig = copy.deepcopy(config)
    plain.__class__ = LoraConfig
    plain.__dict__.pop("origin", None)
    plain.r, plain.lora_alpha, plain.use_rslora = rank, alpha, False
    others = [layer for layer in model.modules() if isinstance(layer, ParamWrapper)]
    if not others:
        plain.rank_pattern, plain.alpha_pattern = {}, {}
    plain.init_lora_weights = True
    plain.inference_mode = True
    if plain.base_model_name_or_path is None:
        plain.base_model_name_or_path = (
            getattr(model.get_base_model(), "name_or_path", None) or None
        )
    return plain


def _check_experts(
    name: str, layer: LoraLayer, adapter_name: str, rank: int, scaling: float
) -> None:
    """Factors of whole expert stacks are written as they are, which only fits where they agree."""
    if layer.r[adapter_name] != rank or not math.isclose(layer.scaling[adapter_name], scaling):
        raise AdapterError(
            f"layer '{name}' adapts a parameter (target_parameters) at rank "
            f"{layer.r[adapter_name]} and "
            f"scaling {layer.scaling[adapter_name]:g}, the export has rank {rank} and scaling "
            f"{scaling:g}. Such layers are not padded or cut: use model.save_pretrained."
        )


def _rewrite(
    tensors: dict[str, Tensor],
    name: str,
    layer: LoraLayer,
    adapter_name: str,
    rank: int,
    scaling: float,
) -> float:
    """Bring one layer to the common rank and scaling, in place; the relative error made."""
    stem = PREFIX + name
    if adapter_name in layer.lora_embedding_A:
        key_a, key_b = f"{stem}.lora_embedding_A", f"{stem}.lora_embedding_B"
    else:
        key_a, key_b = f"{stem}.lora_A.weight", f"{stem}.lora_B.weight"
    if key_a not in tensors or key_b not in tensors:
        raise AdapterError(f"layer '{name}': its factors are not in PEFT's state dict.")
    ratio = layer.scaling[adapter_name] / scaling
    a, b = tensors[key_a], tensors[key_b]
    if not (is_linear(layer, adapter_name) or "embedding" in key_a):
        if a.shape[0] != rank:
            raise AdapterError(
                f"layer '{name}' ({type(layer).__name__}) has rank {a.shape[0]}, the export "
                f"{rank}; only "
                "linear layers and convolutions of one group are padded or cut. Use model.save_pretrained."
            )
        tensors[key_b] = b * ratio if ratio != 1 else b
        return 0.0
    error = 0.0
    if a.shape[0] > rank:
        kernels = a.shape[1:], b.shape[2:]
        a, b, error = _cut(a.flatten(1), b.flatten(1), rank)
        a, b = a.reshape(rank, *kernels[0]), b.reshape(*b.shape, *kernels[1])
    tensors[key_a] = _padded(a, rank, 0)
    tensors[key_b] = _padded(b * ratio if ratio != 1 else b, rank, 1)
    bias = f"{stem}.lora_B.bias"
    if bias in tensors and ratio != 1:
        tensors[bias] = tensors[bias] * ratio
    return error


def _cut(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """The best pair of `rank` for ``b @ a``, and ``|b a - b' a'|_F / |b a|_F``."""
    q_b, r_b = torch.linalg.qr(b.double())
    q_a, r_a = torch.linalg.qr(a.double().mT)
    u, s, vh = torch.linalg.svd(r_b @ r_a.mT)
    root = s[:rank].sqrt()
    total = float(s.square().sum().sqrt())
    lost = float(s[rank:].square().sum().sqrt())
    new_a = root.unsqueeze(-1) * (vh[:rank] @ q_a.mT)
    new_b = (q_b @ u[:, :rank]) * root
    return new_a.to(a.dtype), new_b.to(b.dtype), lost / total if total > 0 else 0.0


def _padded(tensor: Tensor, rank: int, dim: int) -> Tensor:
    missing = rank - tensor.shape[dim]
    if missing <= 0:
        return tensor.contiguous()
    shape = list(tensor.shape)
    shape[dim] = missing
    return torch.cat([tensor, tensor.new_zeros(shape)], dim=dim).contiguous()


def _write(folder: Path, tensors: Mapping[str, Tensor], config: LoraConfig) -> None:
    """All files at once, as `save_adapter` does."""
    with adapter_files(folder) as aside:
        save_file(_unshared(tensors), str(aside / WEIGHTS_FILE), metadata={"format": "pt"})
        config.save_pretrained(str(aside))


def _unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of tensors that share memory, which safetensors refuses."""
    seen: set[int] = set()
    out: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        pointer = tensor.untyped_storage().data_ptr()
        out[key] = tensor.clone() if pointer in seen else tensor.contiguous()
        seen.add(pointer)
    return out


def _summary(report: ExportReport) -> str:
    line = f"exported to {report.folder} at rank {report.rank}, scaling {report.scaling:g}"
    if report.largest_error:
        worst = max(report.errors, key=lambda name: report.errors[name])
        line += f"; cut, largest relative error {report.largest_error:.2g} in '{worst}'"
    if report.objections:
        line += ". Servers may object: " + " ".join(report.objections)
    return line


__all__ = ["ExportReport", "export"]
