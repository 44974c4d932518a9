"""An adapter resized so that it trains at one learning rate as it would at another.

A LoRA adapter ``s B A`` is the same function as ``(s / k^2) (k B) (k A)``. An optimizer whose steps depend
neither on the gradient's size nor on the weights' (Adam, a descent by signs) moves every entry by about
the learning rate, so training the second at ``k`` times the rate takes the steps of the first, one by
one. That symmetry of sizes, multipliers and rates is the one behind "abc-parametrizations" (Yang and Hu,
"Feature Learning in Infinite-Width Neural Networks", ICML 2021, arXiv 2011.14522; for Adam Yang et al.,
arXiv 2203.03466); LoRA-alpha (arXiv 2606.12883) sets the scale of LoRA in place of the rate, too.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.utils import CONFIG_NAME
from torch import Tensor, nn

from lorainit.adapters.anchor import AnchoredFactor
from lorainit.adapters.layers import adapter_layers, check_not_merged, configurations
from lorainit.adapters.origin import remember, remember_measured
from lorainit.adapters.patterns import scaled
from lorainit.adapters.restore import restored_on_error
from lorainit.adapters.wrappers import adapter_parameters, unwrapped
from lorainit.errors import AdapterError
from lorainit.parallel.partitioned import whole
from lorainit.types.numbers import require_number


def match_learning_rate(
    model: nn.Module, suggested: float, learning_rate: float, *, adapter_name: str = "default"
) -> float:
    """Resize an adapter so that `learning_rate` does to it what `suggested` does to it now.

    Both factors are multiplied by ``k``, about ``learning_rate / suggested``, and ``lora_alpha`` and the
    entries of ``alpha_pattern`` by ``k^-2``, which is the nearest power of two: that is within 19% of the
    ratio, and as a rule the same again where a run that goes on measures its start anew. What the model
    computes stays, to rounding, and so does an anchored start's zero. Call it before the first step of
    training: an optimizer's moments would be of other sizes. It holds for optimizers whose steps depend
    neither on the gradient's size nor on the weights', and is tested with AdamW; gradients grow by ``1 / k``,
    of which a clipping of their norm sees more. What trains beside the factors (DoRA's magnitudes, heads,
    biases of the base) is not resized. A rate that was measured with the start is then `learning_rate` in
    the adapter's side file, its range ``k`` times what it was.

    Args:
        model: a PeftModel, or a model whose adapter is its own.
        suggested: a peak learning rate that suits the adapter as it is, as `suggest_learning_rate` gives it.
        learning_rate: the one that it will be trained at.
        adapter_name: of the adapter.

    Returns:
        ``k``, by which the factors were multiplied.

    Raises:
        AdapterError: there is no such adapter, it is merged or on the meta device, it has ``lora_bias``, whose
            contribution is not a product, or a rate is no positive number.
    """
    model = unwrapped(model)
    for name, value in (("suggested", suggested), ("learning_rate", learning_rate)):
        require_number(name, value, inclusive=False, error=AdapterError)
    check_can_match(model, adapter_name)
    check_not_merged(model)
    with (
        whole(adapter_parameters(model, adapter_name), written=True),
        restored_on_error(model, adapter_name),
    ):
        return resize_for(model, adapter_name, suggested, learning_rate)


def check_can_match(model: nn.Module, adapter_name: str, config: LoraConfig | None = None) -> None:
    """Raise unless the adapter, or the one that a configuration asks for, can be resized.

    Raises:
        AdapterError: it does not exist, or has ``lora_bias``.
    """
    config = configurations(model).get(adapter_name) if config is None else config
    if not isinstance(config, LoraConfig):
        raise AdapterError(
            f"the model has no LoRA adapter '{adapter_name}' to match a learning rate to. Make it first, with "
            "lorainit.get_peft_model or PEFT's own."
        )
    if config.lora_bias:
        raise AdapterError(
            "an adapter with lora_bias=True cannot be matched to a learning rate: its bias is added once, "
            "where the factors are multiplied with each other. Leave lora_bias out, or train at the suggested "
            "rate."
        )


def resize_for(
    model: nn.Module, adapter_name: str, suggested: float, learning_rate: float
) -> float:
    """`match_learning_rate`, once all is checked."""
    # The factor near the ratio of rates that multiplies alpha by a power of two.
    k = math.pow(2.0, round(2 * math.log2(learning_rate / suggested)) / 2)
    resize(model, adapter_name, k)
    origin = getattr(configurations(model)[adapter_name], "origin", None)
    if origin is not None and "learning_rate" in origin.measured:
        remember_measured(model, adapter_name, {"learning_rate": float(learning_rate)})
    return k


def resize(model: nn.Module, adapter_name: str, k: float) -> None:
    """Multiply both factors by `k`, anchors too, and divide the scaling by its square.

    The origin keeps it, and has what was measured in rates of the adapter as it is then.

    Args:
        model: holds the adapter, whole.
        adapter_name: of the adapter.
        k: above zero.

    Raises:
        AdapterError: a factor is on the meta device; nothing is changed then.
    """
    if k == 1:
        return
    tensors = {
        # Factors of tied layers may be one.
        getattr(tensor, "_local_tensor", tensor).data_ptr() or id(tensor): (name, tensor)
        for name, layer in adapter_layers(model, adapter_name).items()
        for tensor in _tensors(layer, adapter_name)
    }
    for name, tensor in tensors.values():
        if tensor.is_meta:
            raise AdapterError(
                f"layer '{name}': the adapter's factors are on the meta device and cannot be resized. "
                "Load its weights first, and match it before the model is offloaded."
            )
    with torch.no_grad():
        for _, tensor in tensors.values():
            tensor.mul_(k)
    _scale(model, adapter_name, alphas_times(k))
    origin = getattr(configurations(model)[adapter_name], "origin", None)
    if origin is not None:
        measured = _rates_times(k, origin.measured)
        remember(
            model, adapter_name, replace(origin, resized=origin.resized * k, measured=measured)
        )


def _rates_times(k: float, measured: Mapping[str, Any]) -> dict[str, Any]:
    """What was measured of an adapter, for one whose factors are `k` times as large."""
    rates = (
        "learning_rate",
        "learning_rate_low",
        "learning_rate_high",
        "two_steps_rate",
        "factors_norm",
    )
    found = dict(measured)
    try:
        found |= {name: measured[name] * k for name in rates if name in measured}
        if "learning_rate_trials" in measured:
            trials = measured["learning_rate_trials"]
            found["learning_rate_trials"] = [[rate * k, loss] for rate, loss in trials]
    except (TypeError, ValueError):
        # Of a side file that somebody has written into nothing is known.
        for name in (*rates, "learning_rate_trials"):
            found.pop(name, None)
    return found


def alphas_times(k: float) -> float:
    """``k^-2``, a power of two where it is one but for rounding."""
    by = k**-2
    power = math.pow(2.0, round(math.log2(by)))
    return power if abs(by / power - 1) < 1e-9 else by


def take_alpha_of(model: nn.Module, adapter_name: str, folder: Path) -> None:
    """Give an adapter whose weights were read from a folder the scaling that they were saved with.

    A trainer that goes on from a checkpoint reads its weights, not its ``lora_alpha``.

    Raises:
        AdapterError: there is no configuration in the folder.
    """
    try:
        # What is no folder PEFT would ask the hub for.
        if not (folder / CONFIG_NAME).is_file():
            raise FileNotFoundError(folder / CONFIG_NAME)
        saved = LoraConfig.from_pretrained(str(folder))
    except (OSError, ValueError) as error:
        raise AdapterError(
            f"the run goes on from a checkpoint whose lora_alpha is not known: '{folder}' holds no adapter. "
            "Go on from a checkpoint in output_dir, or leave match_learning_rate out and write the "
            "checkpoint's lora_alpha into the LoraConfig."
        ) from error
    by = saved.lora_alpha / configurations(model)[adapter_name].lora_alpha
    if by != 1:
        _scale(model, adapter_name, by)


def _scale(model: nn.Module, adapter_name: str, by: float) -> None:
    """Multiply the scaling of every layer, and every alpha."""
    known = configurations(model)
    # The object may be the user's own.
    known[adapter_name] = copy.deepcopy(known[adapter_name])
    for layer in adapter_layers(model, adapter_name).values():
        before = layer.lora_alpha[adapter_name]
        layer.lora_alpha[adapter_name] = after = scaled(before, by)
        # In this order what was whole is whole again when it is taken back.
        layer.scaling[adapter_name] = layer.scaling[adapter_name] * after / before
    scale_alphas(known[adapter_name], by)


def resized_by(model: nn.Module, adapter_name: str) -> float:
    """By what an adapter's factors were multiplied for a learning rate, 1 where nothing is known of it."""
    origin = getattr(configurations(model)[adapter_name], "origin", None)
    return 1.0 if origin is None else origin.resized


def scale_alphas(config: LoraConfig, by: float) -> None:
    """Multiply every alpha of a configuration, in place."""
    config.lora_alpha = scaled(config.lora_alpha, by)
    config.alpha_pattern = {key: scaled(v, by) for key, v in config.alpha_pattern.items()}


def _tensors(layer: LoraLayer, adapter_name: str) -> Iterator[Tensor]:
    """Every tensor of both factors, frozen halves among them."""
    for holder in (layer.lora_A, layer.lora_B):
        if adapter_name in holder:
            factor = holder[adapter_name]
            if isinstance(factor, AnchoredFactor):
                yield factor.anchor
            yield from factor.parameters()
    for holder in (layer.lora_embedding_A, layer.lora_embedding_B):
        if adapter_name in holder:
            yield holder[adapter_name]
