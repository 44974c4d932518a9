"""The second-order change of the KL divergence beside FILet's Fisher energy."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from benchmarks.studies.theory.algebra import DTYPE, spearman
from lorainit.methods.filet import fisher_energy


def gram_candidates(weight: Tensor) -> tuple[Tensor, Tensor]:
    """FILet's candidates by its formula: ``U`` ``(out, in)``, ``V`` ``(in, in)``, unit columns."""
    v = nn.functional.normalize(weight.T @ weight, dim=0)
    return nn.functional.normalize(weight @ v, dim=0), v


def svd_candidates(weight: Tensor) -> tuple[Tensor, Tensor]:
    u, _, vh = torch.linalg.svd(weight, full_matrices=False)
    return u, vh.T


def curvature(divergence: Callable[[Tensor], Tensor], u: Tensor, v: Tensor) -> Tensor:
    """``(k,)``: second derivatives of ``divergence(t u_k v_k^T)`` at 0, by double backward."""
    steps = torch.zeros(u.shape[1], dtype=u.dtype, requires_grad=True)
    slope = torch.autograd.grad(divergence(u * steps @ v.T), steps, create_graph=True)[0]
    every = torch.eye(len(steps), dtype=u.dtype)
    return torch.autograd.grad(slope, steps, every, is_grads_batched=True)[0].diagonal()


def categorical_kl(logits: Tensor, changed: Tensor) -> Tensor:
    """KL of the changed predictions from the unchanged, ``(...)``."""
    base = logits.detach().log_softmax(-1)
    return (base.exp() * (base - changed.log_softmax(-1))).sum(-1)


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head"
    }


def sampled_fisher_factors(
    model: nn.Module, tokens: Tensor, draws: int, seed: int
) -> dict[str, tuple[Tensor, Tensor]]:
    """``Sx`` and ``Sy`` of every layer, labels drawn from the model at every position."""
    layers, inputs, outputs = linear_layers(model), {}, {}

    def keep(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            inputs[name] = args[0].detach()
            outputs[name] = output

        return hook

    handles = [layer.register_forward_hook(keep(name)) for name, layer in layers.items()]
    embeddings = model.get_input_embeddings()(tokens).requires_grad_()
    try:
        logits = model(inputs_embeds=embeddings).logits
    finally:
        for handle in handles:
            handle.remove()
    generator = torch.Generator().manual_seed(seed)
    chances = logits.detach().softmax(-1).flatten(0, 1)
    sums = {
        name: torch.zeros(layer.out_features, layer.out_features, dtype=DTYPE)
        for name, layer in layers.items()
    }
    for _ in range(draws):
        labels = torch.multinomial(chances, 1, generator=generator).squeeze(-1)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels, reduction="sum")
        gradients = torch.autograd.grad(loss, list(outputs.values()), retain_graph=True)
        for name, gradient in zip(outputs, gradients, strict=True):
            g = gradient.flatten(0, 1)
            sums[name] += g.T @ g / (len(g) * draws)
    factors = {}
    for name in layers:
        x = inputs[name].flatten(0, 1)
        factors[name] = x.T @ x / len(x), sums[name]
    return factors


def transformer_divergence(
    model: nn.Module, tokens: Tensor, name: str
) -> Callable[[Tensor], Tensor]:
    """Mean KL per token as a function of a change of one layer's weight."""
    weight = linear_layers(model)[name].weight.detach()
    with torch.no_grad():
        base = model(input_ids=tokens).logits

    def divergence(change: Tensor) -> Tensor:
        parameters = {f"{name}.weight": weight + change}
        changed = torch.func.functional_call(model, parameters, kwargs={"input_ids": tokens})
        return categorical_kl(base, changed.logits).mean()

    return divergence


def transformer_correlations(
    model: nn.Module,
    tokens: Tensor,
    candidates: Callable[[Tensor], tuple[Tensor, Tensor]],
    *,
    draws: int = 16,
    names: Iterable[str] | None = None,
) -> dict[str, dict[str, float]]:
    """Per layer: Spearman of measured curvature with the Fisher energy, and with simpler scores."""
    factors = sampled_fisher_factors(model, tokens, draws, seed=3)
    result = {}
    for name in factors if names is None else names:
        weight = linear_layers(model)[name].weight.detach()
        u, v = candidates(weight)
        measured = curvature(transformer_divergence(model, tokens, name), u, v)
        second_in, second_out = factors[name]
        result[name] = {
            "energy": spearman(measured, fisher_energy(u, v, second_in, second_out)),
            "input_part_alone": spearman(measured, (v * (second_in @ v)).sum(0)),
            "output_part_alone": spearman(measured, (u * (second_out @ u)).sum(0)),
            "weight_gain_alone": spearman(measured, (weight @ v).norm(dim=0)),
        }
    return result
