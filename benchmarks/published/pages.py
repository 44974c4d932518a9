"""Where blocks of figures stand, and whether they are what the records say."""

from __future__ import annotations

import re

from benchmarks.common.cache import REPOSITORY
from benchmarks.published.blocks import BLOCKS

PAGES = (
    REPOSITORY / "README.md",
    REPOSITORY / "docs" / "quantized.md",
    REPOSITORY / "docs" / "learning_rate.md",
    REPOSITORY / "docs" / "heads.md",
    REPOSITORY / "benchmarks" / "README.md",
)

_BLOCK = re.compile(
    r"(?<=<!-- figures: )(?P<name>[\w-]+) -->\n(?P<text>.*?)(?=<!-- end of figures -->)", re.DOTALL
)


def _block(name: str) -> str:
    # Markdown wants a table apart from the comment before it.
    return f"\n{BLOCKS[name]()}\n\n"


def with_blocks(text: str) -> str:
    """A page with every block made anew.

    Raises:
        KeyError: a block has a name that nothing makes.
    """

    def made(match: re.Match[str]) -> str:
        name = match["name"]
        return f"{name} -->\n{_block(name)}"

    return _BLOCK.sub(made, text)


def stale(text: str) -> list[str]:
    """Names of the page's blocks that differ from what the records say."""
    return [m["name"] for m in _BLOCK.finditer(text) if m["text"] != _block(m["name"])]
