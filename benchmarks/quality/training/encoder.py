"""A classifier of transformers that trains several LoRA adapters, each with its own head, at once.

The model's own forward runs on the rows of all adapters as one batch; only its linear layers and its
head know which rows belong to which adapter. So any encoder serves whose targets are plain
``nn.Linear`` layers, and there is no second implementation of it to keep right.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.quality.data.classification import pixels
from benchmarks.quality.training.adapters import Adapters, Group, StackedLinear, scored
from benchmarks.quality.training.optimizer import adamw

HEAD = "classifier"


class _Linear(nn.Module):
    """A frozen linear layer under a stack of adapters."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight.detach(), layer.bias
        self.group: Group

    def forward(self, x: Tensor) -> Tensor:
        stack = self.group.A.shape[0]
        rows = x.reshape(stack, -1, x.shape[-1])
        y: Tensor = StackedLinear.apply(rows, self.weight, self.group)
        if self.bias is not None:
            y = y + self.bias
        return y.view(*x.shape[:-1], -1)


class _HeadProduct(torch.autograd.Function):
    """``x W_e^T + b_e`` for adapter e's rows; gradients are written where the optimizer reads."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, extras: dict[str, tuple[Tensor, Tensor]]) -> Tensor:
        (weight, _), (bias, _) = extras[f"{HEAD}.weight"], extras[f"{HEAD}.bias"]
        ctx.save_for_backward(x)
        ctx.extras = extras
        return torch.baddbmm(bias[:, None], x, weight.mT)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        (weight, d_weight), (_, d_bias) = ctx.extras[f"{HEAD}.weight"], ctx.extras[f"{HEAD}.bias"]
        d_weight.copy_(torch.bmm(dy.mT, x))
        d_bias.copy_(dy.sum(1))
        return torch.bmm(dy, weight), None


class _Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.extras: dict[str, tuple[Tensor, Tensor]] = {}

    def forward(self, x: Tensor) -> Tensor:
        stack = self.extras[f"{HEAD}.weight"][0].shape[0]
        y: Tensor = _HeadProduct.apply(x.reshape(stack, -1, x.shape[-1]), self.extras)
        return y.view(*x.shape[:-1], -1)


class StackedEncoder:
    """What `StackTrainer` asks of a base, for sequence and image classifiers in float32.

    Args:
        model: read, never changed.
        fuse: the optimizer's update as a fused kernel (accelerators).
    """

    dtype = torch.float32

    def __init__(self, model: nn.Module, *, fuse: bool) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.device = next(model.parameters()).device
        self.images = self.model.main_input_name == "pixel_values"
        self.update = adamw
        if fuse:
            from benchmarks.quality.training import fused_kernels as fused

            self.update = fused.adamw
        head = self.model.get_submodule(HEAD)
        self.extras = {f"{HEAD}.{k}": v.shape for k, v in head.named_parameters()}
        self.head = _Head()
        self.model.set_submodule(HEAD, self.head)
        found = [(n, m) for n, m in self.model.named_modules() if isinstance(m, nn.Linear)]
        self.shapes = [([name], [m.out_features], m.in_features) for name, m in found]
        self.layers = []
        for name, module in found:
            self.layers.append(_Linear(module))
            self.model.set_submodule(name, self.layers[-1])
        # Nothing before the first target is trained; its input must carry a gradient all the same.
        embeddings = self.model.base_model.embeddings
        embeddings.register_forward_hook(
            lambda _module, _inputs, out: out.requires_grad_(torch.is_grad_enabled())
        )

    def rotation(self, length: int) -> tuple[Tensor, Tensor]:
        """Nothing: these models carry their own positions."""
        del length
        empty = torch.empty(0)
        return empty, empty

    def token_losses(
        self,
        tokens: Tensor,
        positions: Tensor,
        targets: Tensor,
        adapters: Adapters,
        rotation: tuple[Tensor, Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Cross-entropy and correctness of every row, each ``(E, batch, 1)``."""
        del positions, rotation
        for layer, group in zip(self.layers, adapters.groups, strict=True):
            layer.group = group
        self.head.extras = adapters.extras
        rows = tokens.reshape(-1, tokens.shape[-1])
        if self.images:
            logits = self.model(pixel_values=pixels(rows)).logits
        else:
            # A mask in its final form: nothing is left to decide from its values, so a step can be
            # captured.
            mask = (rows != 0)[:, None, None, :].expand(-1, 1, rows.shape[1], -1)
            logits = self.model(input_ids=rows, attention_mask=mask).logits
        return scored(logits, targets)
