"""A hook of mkdocs: docstrings announce a code block as reStructuredText does, pages with one colon."""

from __future__ import annotations

import re
from typing import Any


def on_page_content(html: str, **_: Any) -> str:
    """``as follows::`` before a block becomes ``as follows:``; a paragraph of it alone goes."""
    html = re.sub(r"<p>\s*::</p>(?=\s*<div class=\"[^\"]*highlight)", "", html)
    return re.sub(r"\s?::</p>(?=\s*<div class=\"[^\"]*highlight)", ":</p>", html)
