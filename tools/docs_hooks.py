"""A hook of mkdocs: code blocks are announced with one colon, and a picture opens in its own size."""

from __future__ import annotations

import re
from typing import Any


def on_page_content(html: str, **_: Any) -> str:
    """Mend a page's HTML.

    ``as follows::`` before a block, which docstrings have from reStructuredText, becomes ``as follows:``, and a
    paragraph of it alone goes. A picture is a link to itself: on a phone a wide figure is small.
    """
    html = re.sub(r'<p>(<img [^>]*?src="([^"]+)"[^>]*>)</p>', r'<p><a href="\2">\1</a></p>', html)
    html = re.sub(r"<p>\s*::</p>(?=\s*<div class=\"[^\"]*highlight)", "", html)
    return re.sub(r"\s?::</p>(?=\s*<div class=\"[^\"]*highlight)", ":</p>", html)
