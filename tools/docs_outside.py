"""A hook of mkdocs: what the pages link to outside of ``docs`` is a part of the site too.

Links are written as they are in the repository, ``../benchmarks/README.md``. Here every file that is reached
by one, also through another such file, gets a page of its own at the same path: Markdown as it is, programs
as a block of code; pictures are copied.
"""

from __future__ import annotations

import json
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"(\]\()([^)\s#]+)(#[^)\s]*)?(\))")
CODE = {".py": "python", ".yaml": "yaml", ".toml": "toml", ".ipynb": ""}
"""What gets a page by its ending, and the language of its block; of a notebook each cell is one."""

PICTURES = {".png", ".svg"}


def target_of(page: str, link: str) -> str | None:
    """The file that a link names, from the repository's root; None of an address or of what is not there.

    Args:
        page: its own place, from the root.
        link: as it is written.
    """
    if "://" in link or link.startswith(("mailto:", "/")):
        return None
    found = posixpath.normpath(posixpath.join(posixpath.dirname(page), link))
    return found if (ROOT / found).is_file() else None


def page_of(target: str) -> str:
    """The site's name of a file: docs lie at its root, all else under its own path."""
    if target.startswith("docs/"):
        return target.removeprefix("docs/")
    return f"{target}.md" if Path(target).suffix in CODE else target


def rewritten(text: str, page: str) -> str:
    """Links out of ``docs``, or from outside into it, lead to the site's own pages."""

    def other(match: re.Match[str]) -> str:
        begin, link, anchor, end = match.groups()
        target = target_of(page, link)
        if target is None or (page.startswith("docs/") and target.startswith("docs/")):
            return match[0]
        place = posixpath.relpath(page_of(target), posixpath.dirname(page_of(page)) or ".")
        return f"{begin}{place}{anchor or ''}{end}"

    return LINK.sub(other, text)


def outside(pages: dict[str, str]) -> list[str]:
    """Files outside of ``docs`` that are reached from these pages, by path and text."""
    found: dict[str, None] = {}
    rest = list(pages.items())
    while rest:
        page, text = rest.pop()
        for match in LINK.finditer(text):
            target = target_of(page, match[2])
            if target is None or target.startswith("docs/") or target in found:
                continue
            found[target] = None
            if target.endswith(".md"):
                rest.append((target, (ROOT / target).read_text(encoding="utf-8")))
    return sorted(found)


def content_of(target: str) -> str:
    """The page of a file: Markdown as it is, code in a block."""
    text = (ROOT / target).read_text(encoding="utf-8")
    if target.endswith(".md"):
        return text
    if target.endswith(".ipynb"):
        return "\n\n".join(_cell(cell) for cell in json.loads(text)["cells"])
    kind = CODE.get(Path(target).suffix)
    if kind is None:
        raise ValueError(
            f"{target}: no page can be made of such a file; link to its folder's README"
        )
    return f"# {target}\n\n{_block(kind, text)}"


def _cell(cell: dict[str, Any]) -> str:
    text = "".join(cell["source"])
    return _block("python", text) if cell["cell_type"] == "code" else text


def _block(kind: str, text: str) -> str:
    fence = "`" * 4
    return f"{fence}{kind}\n{text.rstrip()}\n{fence}\n"


def on_files(files: Any, config: Any, **_: Any) -> Any:
    """Add a page, or a picture, for every such file."""
    pages = {
        f"docs/{file.src_uri}": Path(file.abs_src_path).read_text(encoding="utf-8")
        for file in files.documentation_pages()
    }
    for target in outside(pages):
        if Path(target).suffix in PICTURES:
            picture = str(ROOT / target)
            files.append(File.generated(config, target, abs_src_path=picture))
        else:
            files.append(File.generated(config, page_of(target), content=content_of(target)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """The links of one page."""
    place = page.file.src_uri
    inside = (ROOT / "docs" / place).is_file()
    if inside or (ROOT / place).is_file():
        return rewritten(markdown, f"docs/{place}" if inside else place)
    return markdown  # a program's, which has no links
