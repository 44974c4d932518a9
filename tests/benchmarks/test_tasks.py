"""The benchmark's texts: the same every time, splits that share nothing, tokens in their places."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("reasoning_gym")

from benchmarks.common.cache import cache_folder
from benchmarks.common.tasks import (
    IGNORED,
    SPLIT_SIXTEENTHS,
    TASKS,
    Collator,
    Problem,
    Task,
    batches,
    check_disjoint,
    encode,
    make_examples,
    make_split,
)

from tests.benchmarks.tokenizer import ByteTokenizer

TOKENIZER = ByteTokenizer()


@pytest.mark.parametrize("name", sorted(TASKS))
def test_splits_are_disjoint_distinct_and_deterministic(name):
    splits = {split: make_split(name, split, 30) for split in SPLIT_SIXTEENTHS}
    check_disjoint(**splits)
    for split, problems in splits.items():
        assert len({p.question for p in problems}) == 30
        assert all(p.question and p.answer for p in problems)
        assert make_split(name, split, 30) == problems  # from the cache
        path = next(p for p in _cached(name) if f"-{split}-" in p.name)
        path.unlink()
        assert make_split(name, split, 30) == problems  # made again


def _cached(name):
    return (cache_folder() / "tasks").glob(f"{name}-*")


def test_texts_do_not_depend_on_the_process():
    program = (
        "from benchmarks.common.tasks import make_split;"
        "print([(p.question, p.answer) for p in make_split('family_relationships', 'test', 8)])"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "1"}
    run = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, check=True, text=True
    )
    for path in _cached("family_relationships"):
        path.unlink()
    here = make_split("family_relationships", "test", 8)
    assert run.stdout.strip() == str([(p.question, p.answer) for p in here])


def test_a_larger_split_begins_with_the_smaller_one_and_another_seed_differs():
    small, large = make_split("chain_sum", "train", 10), make_split("chain_sum", "train", 40)
    assert large[:10] == small
    other = make_split("chain_sum", "train", 40, seed=1)
    assert other != large
    check_disjoint(train=large + other, test=make_split("chain_sum", "test", 40, seed=5))


def test_shared_questions_are_found():
    problem = Problem("1 + 1 =", "2")
    with pytest.raises(ValueError, match=r"'test' and 'train' share"):
        check_disjoint(train=[problem], test=[Problem("1 + 1 =", "2.0")])


def test_a_task_with_too_few_texts_says_so():
    tiny = Task("tiny", "chain_sum", {"min_terms": 2, "max_terms": 2, "max_digits": 1})
    with pytest.raises(ValueError, match=r"only .* distinct problems"):
        make_split(tiny, "validation", 500)


def test_prompt_is_masked_and_answer_ends():
    problem = Problem("2 + 3 =", "5")
    example = encode(problem, TOKENIZER)
    text = bytes(i - 2 for i in example.input_ids[:-1]).decode()
    assert text == "Question: 2 + 3 =\nAnswer: 5"
    assert example.input_ids[-1] == TOKENIZER.eos_token_id
    assert example.prompt_length == len("Question: 2 + 3 =\nAnswer:")
    assert example.labels[example.prompt_length :] == example.input_ids[example.prompt_length :]


def test_too_long_problems_are_replaced_not_cut():
    free = make_examples("letter_counting", "train", 40, tokenizer=TOKENIZER)
    limit = sorted(map(len, free))[20]
    short = make_examples("letter_counting", "train", 40, tokenizer=TOKENIZER, max_length=limit)
    assert len(short) == 40
    assert max(map(len, short)) <= limit
    assert all(e.input_ids[-1] == TOKENIZER.eos_token_id for e in short)
    with pytest.raises(ValueError, match="raise max_length"):
        make_examples("letter_counting", "train", 40, tokenizer=TOKENIZER, max_length=10)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("length", [None, 120])
def test_collation(side, length):
    examples = make_examples("chain_sum_short", "train", 5, tokenizer=TOKENIZER)
    (batch,) = batches(examples, 8, Collator(TOKENIZER.pad_token_id, side, length))
    assert batch["input_ids"].shape == (5, length or max(map(len, examples)))
    for row, example in enumerate(examples):
        kept = batch["attention_mask"][row].bool()
        assert batch["input_ids"][row, kept].tolist() == list(example.input_ids)
        assert batch["labels"][row, kept].tolist() == list(example.labels)
        assert (batch["labels"][row, ~kept] == IGNORED).all()
        assert kept[0 if side == "right" else -1]


def test_an_example_that_does_not_fit_the_fixed_length_is_an_error():
    examples = make_examples("chain_sum_short", "train", 2, tokenizer=TOKENIZER)
    with pytest.raises(ValueError, match="does not fit"):
        Collator(0, length=16)(examples)
