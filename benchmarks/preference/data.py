"""Pairs of answers to a task's questions: the right one, and one that is right for another question."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.common.tasks import Problem, Split, make_split

NEIGHBOURS = 16


def wrong_answer(problems: Sequence[Problem], index: int) -> str:
    """Of the next problems' answers that are other than this one's, the one nearest in length.

    Raises:
        ValueError: all of them have the same answer.
    """
    own = problems[index].answer
    others = [
        problems[(index + step) % len(problems)].answer
        for step in range(1, min(NEIGHBOURS, len(problems) - 1) + 1)
    ]
    others = [answer for answer in others if answer != own]
    if not others:
        raise ValueError(f"no other answer than {own!r} among {NEIGHBOURS} problems")
    return min(others, key=lambda answer: abs(len(answer) - len(own)))


def pairs(task: str, split: Split, size: int, seed: int = 0) -> list[dict[str, str]]:
    """``prompt``, ``chosen`` and ``rejected`` of the first `size` problems of a split."""
    problems = make_split(task, split, size, seed)
    return [
        {
            "prompt": problem.prompt,
            "chosen": problem.completion,
            "rejected": f" {wrong_answer(problems, index)}",
        }
        for index, problem in enumerate(problems)
    ]
