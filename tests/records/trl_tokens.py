"""What TRL's SFTTrainer makes of records: its own preparation of a data set, without a model."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import datasets
from trl import SFTTrainer
from trl.chat_template_utils import get_training_chat_template, has_generation_markers

datasets.disable_progress_bars()


def prepared(
    records: list[dict[str, Any]], tok: Any, *, assistant: bool, max_length: int = 1024
) -> list[tuple[list[int], list[int]]]:
    """Ids and labels of every record that TRL keeps, by the rules of ``SFTTrainer.__init__``.

    Args:
        records: of one form.
        tok: the tokenizer.
        assistant: ``assistant_only_loss``.
        max_length: of a sequence.
    """
    training = None
    if assistant and not has_generation_markers(tok.chat_template):
        training = get_training_chat_template(tok)
    trainer = SimpleNamespace(
        _tokenizer=tok,
        chat_template=training,
        completion_only_loss="prompt" in records[0] and "completion" in records[0],
    )
    settings = SimpleNamespace(
        dataset_num_proc=None,
        dataset_text_field="text",
        assistant_only_loss=assistant,
        max_length=max_length,
        truncation_mode="keep_start",
        shuffle_dataset=False,
    )
    rows = SFTTrainer._prepare_dataset(
        trainer, datasets.Dataset.from_list(records), tok, settings, False, None, "train"
    )
    return [(row["input_ids"], row["labels"]) for row in rows]
