"""Procedural reasoning tasks (reasoning-gym) as prompts with one right answer, split and tokenized.

A *question* of the task becomes the prompt ``"Question: {question}\\nAnswer:"`` and the completion
``" {answer}"`` followed by the tokenizer's end token. Prompt and completion are tokenized apart and
then joined, so a gold prefix is exactly what a decoder would have seen. Labels are -100 on the
prompt; the loss is that of the answer and its end token.

Splits are disjoint twice over: each draws from its own seeds, and each text belongs to one split by
its hash, whatever the seed or the size. So a test question is never in any training set, and a
larger split begins with the smaller one.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from tqdm.auto import tqdm

from benchmarks.common.cache import cache_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Split = Literal["train", "validation", "test", "statistics"]

SPLIT_SIXTEENTHS: dict[Split, range] = {
    "train": range(0, 8),
    "validation": range(8, 10),
    "test": range(10, 14),
    "statistics": range(14, 16),
}
"""Which sixteenths of all texts, by hash, belong to a split."""

IGNORED = -100
PROMPT = "Question: {question}\nAnswer:"
CHAT = "<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
Style = Literal["plain", "chat"]
"""``"chat"``: one turn in SmolLM2's own template, without its system text; the answer then stands
without a leading space."""

_SEED_STRIDE = 10**9
_MOST_TRIES = 60
_FORMAT = 1


@dataclass(frozen=True)
class Task:
    """A reasoning-gym data set with its parameters.

    Attributes:
        name: of the task here.
        dataset: name in reasoning-gym.
        parameters: its own configuration, without seed and size.
    """

    name: str
    dataset: str
    parameters: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """Digest of everything that decides the task's texts."""
        version = importlib.metadata.version("reasoning-gym")
        text = json.dumps([_FORMAT, version, self.dataset, self.parameters], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Problem:
    """One question and its only right answer."""

    question: str
    answer: str

    @property
    def prompt(self) -> str:
        return PROMPT.format(question=self.question)

    @property
    def completion(self) -> str:
        """With its leading space, without the end token."""
        return f" {self.answer}"


CANDIDATES = (
    "basic_arithmetic",
    "gcd",
    "fraction_simplification",
    "decimal_chain_sum",
    "products",
    "base_conversion",
    "leg_counting",
    "number_format",
    "time_intervals",
    "isomorphic_strings",
    "word_sequence_reversal",
    "complex_arithmetic",
    "ransom_note",
    "aiw",
    "bitwise_arithmetic",
    "decimal_arithmetic",
    "power_function",
    "knights_knaves",
    "binary_alternation",
    "count_bits",
    "number_sorting",
    "letter_jumble",
)
"""Tasks with one short answer and enough distinct questions at reasoning-gym's own settings."""

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("chain_sum", "chain_sum"),
        # At most 32 tokens with SmolLM2's tokenizer.
        Task("chain_sum_short", "chain_sum", {"max_terms": 3, "max_digits": 2}),
        Task("family_relationships", "family_relationships"),
        Task("letter_counting", "letter_counting"),
        Task("simple_equations", "simple_equations"),
        Task("gsm_symbolic", "gsm_symbolic"),
        Task("calendar_arithmetic", "calendar_arithmetic"),
        Task("syllogism", "syllogism"),
        Task("word_sorting", "word_sorting"),
        Task("spell_backward", "spell_backward"),
        *(Task(name, name) for name in CANDIDATES),
    )
}


def make_split(task: Task | str, split: Split, size: int, seed: int = 0) -> list[Problem]:
    """The first ``size`` distinct problems of a split, the same on every machine.

    The texts are kept in the cache, so a second call reads a file. Raises ``ValueError`` where the
    task has fewer distinct texts than were asked for.
    """
    task = TASKS[task] if isinstance(task, str) else task
    if split not in SPLIT_SIXTEENTHS:
        raise ValueError(f"split must be one of {', '.join(SPLIT_SIXTEENTHS)}, got {split!r}")
    if size < 1 or seed < 0:
        raise ValueError(f"size must be positive and seed not negative, got {size} and {seed}")
    path = cache_folder() / "tasks" / f"{task.name}-{task.key}-{split}-{seed}.jsonl"
    problems = _read(path)
    if len(problems) < size:
        problems = _generate(task, split, size, seed)
        _write(path, problems)
    return problems[:size]


@dataclass(frozen=True)
class Example:
    """A tokenized problem: prompt, answer and end token; labels are -100 on the prompt."""

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def prompt_length(self) -> int:
        return sum(label == IGNORED for label in self.labels)


def check_disjoint(**splits: Sequence[Problem] | Sequence[Example]) -> None:
    """Raise ``ValueError`` if two of the named splits share a question.

    Problems are told apart by their question, examples by the tokens of their prompt.
    """
    seen: dict[object, str] = {}
    for name, items in splits.items():
        for question in {
            i.question if isinstance(i, Problem) else i.input_ids[: i.prompt_length] for i in items
        }:
            if question in seen:
                raise ValueError(f"'{name}' and '{seen[question]}' share the question {question!r}")
            seen[question] = name


def encode(
    problem: Problem,
    tokenizer: PreTrainedTokenizerBase,
    style: Style = "plain",
    *,
    begin: bool = False,
) -> Example:
    """Tokens of the prompt, of the completion, and the end token; with `begin`, its first token first."""
    before, after = problem.prompt, problem.completion
    if style == "chat":
        before, after = CHAT.format(question=problem.question), problem.answer
    prompt = tokenizer(before, add_special_tokens=False)["input_ids"]
    if begin:
        prompt = [tokenizer.bos_token_id, *prompt]
    answer = tokenizer(after, add_special_tokens=False)["input_ids"]
    answer = [*answer, tokenizer.eos_token_id]
    return Example((*prompt, *answer), (*([IGNORED] * len(prompt)), *answer))


def make_examples(
    task: Task | str,
    split: Split,
    size: int,
    *,
    tokenizer: PreTrainedTokenizerBase,
    seed: int = 0,
    max_length: int | None = None,
    style: Style = "plain",
    begin: bool = False,
) -> list[Example]:
    """``size`` tokenized problems of a split (see `encode`), none longer than ``max_length`` tokens.

    Problems that are too long are passed over, never cut, and further ones take their place.
    """
    wanted = size
    while True:
        problems = make_split(task, split, wanted, seed)
        examples = [encode(problem, tokenizer, style, begin=begin) for problem in problems]
        fitting = [e for e in examples if max_length is None or len(e) <= max_length]
        if len(fitting) >= size:
            return fitting[:size]
        if len(fitting) < wanted / 100:
            shortest = min(map(len, examples))
            raise ValueError(
                f"almost no problem of '{task if isinstance(task, str) else task.name}' fits into "
                f"{max_length} tokens (the shortest has {shortest}): raise max_length"
            )
        wanted = max(int(1.1 * size * len(problems) / len(fitting)), wanted + 1)


@dataclass(frozen=True)
class Collator:
    """Examples to padded ``input_ids``, ``attention_mask``, ``labels``, each ``(batch, length)``.

    Attributes:
        pad_token_id: written into padding, whose labels are -100 and whose mask is 0.
        side: where the padding stands.
        length: pad every batch to this length (for CUDA graphs); None: to its longest example.
    """

    pad_token_id: int
    side: Literal["right", "left"] = "right"
    length: int | None = None

    def __call__(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        longest = max(map(len, examples))
        length = longest if self.length is None else self.length
        if longest > length:
            raise ValueError(f"an example of {longest} tokens does not fit into length={length}")
        shape = (len(examples), length)
        batch = {
            "input_ids": torch.full(shape, self.pad_token_id, dtype=torch.long),
            "attention_mask": torch.zeros(shape, dtype=torch.long),
            "labels": torch.full(shape, IGNORED, dtype=torch.long),
        }
        for row, example in enumerate(examples):
            end = length if self.side == "left" else len(example)
            place = slice(end - len(example), end)
            batch["input_ids"][row, place] = torch.tensor(example.input_ids)
            batch["attention_mask"][row, place] = 1
            batch["labels"][row, place] = torch.tensor(example.labels)
        return batch


def batches(
    examples: Sequence[Example], batch_size: int, collate: Collator
) -> list[dict[str, Tensor]]:
    """The examples in order, as keyword batches for a model's forward."""
    starts = range(0, len(examples), batch_size)
    return [collate(examples[start : start + batch_size]) for start in starts]


def _stream(task: Task, split: Split, seed: int, limit: int) -> Iterator[Problem]:
    """Problems as reasoning-gym draws them, those whose text belongs to another split left out."""
    import reasoning_gym

    # reasoning-gym draws item i from seed + i: streams must start far apart or they overlap.
    start = (seed * len(SPLIT_SIXTEENTHS) + list(SPLIT_SIXTEENTHS).index(split)) * _SEED_STRIDE
    dataset = reasoning_gym.create_dataset(task.dataset, seed=start, size=limit, **task.parameters)
    for index in range(limit):
        item = dataset[index]
        problem = Problem(str(item["question"]).strip(), str(item["answer"]).strip())
        if _sixteenth(problem.question) in SPLIT_SIXTEENTHS[split]:
            yield problem


def _sixteenth(question: str) -> int:
    return hashlib.sha256(question.encode()).digest()[0] % 16


def _generate(task: Task, split: Split, size: int, seed: int) -> list[Problem]:
    found: dict[str, Problem] = {}
    limit = max(size * _MOST_TRIES, 2000)
    with tqdm(total=size, desc=f"Making {task.name}/{split}", unit="problem", leave=False) as bar:
        for problem in _stream(task, split, seed, limit):
            if problem.question not in found:
                found[problem.question] = problem
                bar.update()
            if len(found) == size:
                return list(found.values())
    raise ValueError(
        f"'{task.name}' has only {len(found)} distinct problems in {limit} draws for the split "
        f"'{split}'; {size} were asked for: ask for fewer, or make the task's parameters wider"
    )


def _read(path: Path) -> list[Problem]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    return [Problem(**json.loads(line)) for line in lines]


def _write(path: Path, problems: Sequence[Problem]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, suffix=".part")
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(asdict(p), ensure_ascii=False) + "\n" for p in problems)
    os.replace(name, path)
