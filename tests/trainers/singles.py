"""Single examples and losses written out by hand: what a trainer's batches should come to."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorainit.types import Factors, LayerStatistics

NEEDS = frozenset({"gradient", "input_second_moment", "output_second_moment"})


@dataclass
class Recording:
    """A method that keeps the statistics it is given, and starts nothing."""

    needs: frozenset[str] = NEEDS
    seen: list[LayerStatistics] = field(default_factory=list)

    def solve(
        self, weight: Tensor, statistics: LayerStatistics, rank: int, scaling: float
    ) -> Factors:
        self.seen.append(statistics)
        *stack, rows, columns = weight.shape
        return Factors(torch.zeros(*stack, rank, columns), torch.zeros(*stack, rows, rank))

    def means(self) -> list[Tensor]:
        return [
            mean
            for s in self.seen
            for mean in (s.gradient, s.input_second_moment, s.output_second_moment)
        ]


def distance(first: Recording, second: Recording) -> float:
    """Largest relative difference, in the Frobenius norm, of any statistic of any layer."""
    assert len(first.seen) == len(second.seen) > 0
    return max(
        float((a - b).norm() / b.norm()) for a, b in zip(first.means(), second.means(), strict=True)
    )


def log_probability(model: nn.Module, prompt: list[int], answer: list[int]) -> Tensor:
    """``(answer,)`` log-probabilities of the answer's tokens after the prompt, alone and unpadded."""
    ids = torch.tensor([[*prompt, *answer]])
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]
    found = torch.log_softmax(logits.float(), -1)[:-1].gather(1, ids[0, 1:, None])[:, 0]
    return found[len(prompt) - 1 :]


def completion_loss(model: nn.Module, row: Any) -> Tensor:
    """Supervised fine-tuning on a completion: the mean over its tokens."""
    labels = torch.tensor(row["labels"])
    learned = int((labels != -100).sum())
    ids = row["input_ids"]
    first = len(ids) - learned
    assert bool((labels[:first] == -100).all())
    return -log_probability(model, ids[:first], ids[first:]).mean().reshape(1)


def _against_itself(model: nn.Module, prompt: list[int], answer: list[int]) -> Tensor:
    """Log-probability of an answer less the reference's, which is the model where it stands."""
    policy = log_probability(model, prompt, answer).sum()
    return policy - policy.detach()


def preference_loss(model: nn.Module, row: Any, beta: float = 0.1) -> Tensor:
    """DPO's, equation 7 of arXiv 2305.18290, of one pair."""
    chosen = _against_itself(model, row["prompt_ids"], row["chosen_ids"])
    rejected = _against_itself(model, row["prompt_ids"], row["rejected_ids"])
    return -F.logsigmoid(beta * (chosen - rejected)).reshape(1)


def unpaired_loss(model: nn.Module, row: Any, beta: float = 0.1) -> Tensor:
    """KTO's, equation 7 of arXiv 2402.01306, of one answer; the reference point of a base is zero."""
    ratio = _against_itself(model, row["prompt_ids"], row["completion_ids"])
    sign = 1.0 if row["label"] else -1.0
    return (1 - torch.sigmoid(sign * beta * ratio)).reshape(1)


def odds_ratio_loss(model: nn.Module, row: Any, beta: float = 0.1) -> Tensor:
    """ORPO's, equations 6 and 7 of arXiv 2403.07691, of one pair; prompts are learned too, as TRL does."""
    start = len(row["prompt_input_ids"]) - 1
    wholes = [row[f"{kind}_input_ids"] for kind in ("chosen", "rejected")]
    whole, other = (log_probability(model, ids[:1], ids[1:]) for ids in wholes)
    chosen, rejected = whole[start:].mean(), other[start:].mean()
    log_odds = (chosen - rejected) - (
        torch.log1p(-torch.exp(chosen)) - torch.log1p(-torch.exp(rejected))
    )
    return (-whole.mean() - beta * F.logsigmoid(log_odds)).reshape(1)


def reward_loss(model: nn.Module, row: Any) -> Tensor:
    """Bradley and Terry's, of one pair."""
    scores = [
        model(input_ids=torch.tensor([row[f"{kind}_ids"]])).logits[0, 0]
        for kind in ("chosen", "rejected")
    ]
    return -F.logsigmoid(scores[0] - scores[1]).reshape(1)


def policy_loss(model: nn.Module, row: Any) -> Tensor:
    """Minus advantage times log-probability, times the completion's weight: the policy gradient."""
    logps = log_probability(model, row["prompt"], row["completion"])
    return -(row["advantage"] * row["weight"] * logps.sum()).reshape(1)
