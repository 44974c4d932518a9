"""The pages as a browser finds them: the site builds without a warning, and every link leads somewhere."""

from __future__ import annotations

import posixpath
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

pytest.importorskip("mkdocs")
pytest.importorskip("mkdocstrings")

from tools import docs_outside

ROOT = Path(__file__).parents[1]


class Links(HTMLParser):
    """What a page links to or shows, and the anchors that it has."""

    def __init__(self) -> None:
        super().__init__()
        self.targets: list[str] = []
        self.anchors: set[str] = set()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        self.anchors |= {str(given[key]) for key in ("id", "name") if given.get(key)}
        target = given.get("href") if tag in ("a", "link") else given.get("src")
        if target:
            self.targets.append(target)


def read(page: Path) -> Links:
    found = Links()
    found.feed(page.read_text(encoding="utf-8"))
    return found


def broken(site: Path) -> list[str]:
    """Links of a built site that lead to no file, or to no place in it."""
    pages = {page: read(page) for page in site.rglob("*.html") if page.name != "404.html"}
    missing = []
    for page, links in pages.items():
        for link in links.targets:
            address = urlsplit(link)
            if address.scheme or address.netloc:
                continue
            path = posixpath.normpath(page.parent / unquote(address.path)) if address.path else page
            place = Path(path)
            place = place / "index.html" if place.is_dir() else place
            if not place.is_file():
                missing.append(f"{page.relative_to(site)}: {link}")
            elif address.fragment and place in pages:
                anchor = unquote(address.fragment)
                if anchor not in pages[place].anchors and not anchor.startswith("__"):
                    missing.append(f"{page.relative_to(site)}: {link}")
    return missing


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def test_site_builds_without_a_warning(site: Path) -> None:
    assert "Smallest eigenvectors" in (site / "methods" / "lora-da" / "index.html").read_text()


def test_every_link_leads_somewhere(site: Path, tmp_path: Path) -> None:
    assert broken(site) == []
    # The control: a file and an anchor that are not there.
    (tmp_path / "index.html").write_text(
        '<a href="no/">x</a><a href="#no">y</a><a id="yes" href="#yes">z</a>'
    )
    assert broken(tmp_path) == ["index.html: no/", "index.html: #no"]


def test_what_lies_outside_of_the_pages_is_a_part_of_the_site(site: Path) -> None:
    assert "The referee of this project" in (site / "benchmarks" / "index.html").read_text()
    assert "start_trainer" in (site / "examples" / "start_trainer.py" / "index.html").read_text()
    notebook = (site / "examples" / "quick_start.ipynb" / "index.html").read_text()
    assert "cell_type" not in notebook


@pytest.mark.parametrize(
    ("page", "link", "expected"),
    [
        ("docs/learning_rate.md", "../benchmarks/README.md#a", "benchmarks/README.md#a"),
        ("docs/by_tool/trainers.md", "../../examples/sft.py", "../examples/sft.py.md"),
        ("benchmarks/README.md", "../docs/images/quality.png", "../images/quality.png"),
        ("docs/by_tool.md", "by_tool/axolotl.md", "by_tool/axolotl.md"),
        ("docs/by_tool.md", "../nothing.md", "../nothing.md"),
        ("docs/by_tool.md", "https://arxiv.org/abs/1", "https://arxiv.org/abs/1"),
    ],
)
def test_links_out_of_the_pages_lead_to_the_sites_own(page: str, link: str, expected: str) -> None:
    assert docs_outside.rewritten(f"[x]({link})", page) == f"[x]({expected})"


PAGES = [
    "README.md", "CONTRIBUTING.md", "SUPPORT.md", "SECURITY.md", "CHANGELOG.md", "benchmarks/README.md",
    *(str(page.relative_to(ROOT)) for page in sorted((ROOT / "docs").rglob("*.md"))),
]  # fmt: skip


def slugs(page: Path) -> set[str]:
    """The anchors that a repository's own view gives to headings."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    headings = re.findall(r"^#+ (.+)$", text, re.M)
    plain = (re.sub(r"\]\([^)]*\)|[^\w\s-]", "", h).strip().lower() for h in headings)
    return {re.sub(r"\s", "-", heading) for heading in plain}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere_in_the_repository_too(page: str) -> None:
    for match in docs_outside.LINK.finditer((ROOT / page).read_text(encoding="utf-8")):
        link, anchor = match[2], match[3]
        if "://" in link:
            continue
        target = docs_outside.target_of(page, link)
        assert target, f"{page}: {link}"
        if anchor and target.endswith(".md"):
            assert anchor[1:] in slugs(ROOT / target), f"{page}: {link}{anchor}"
