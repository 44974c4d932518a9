"""What arrives: batches, how they are sampled and divided, and records of JSON lines made into batches."""

from lorainit.data.chat import Tokenizer
from lorainit.data.encoding import Example, encode
from lorainit.data.loading import Records, batches_of, collate, load_batches
from lorainit.data.records import read_records
from lorainit.types import IGNORED

__all__ = [
    "IGNORED",
    "Example",
    "Records",
    "Tokenizer",
    "batches_of",
    "collate",
    "encode",
    "load_batches",
    "read_records",
]
