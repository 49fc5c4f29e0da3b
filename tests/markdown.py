"""The code blocks and commands of the documentation's pages."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])


class Block(NamedTuple):
    """A code block; an indented one has the language "sh", as all on these pages are commands."""

    page: str
    line: int  # of its first line of code, from 1
    language: str
    attributes: tuple[str, ...]  # the further words behind the language
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(page: Path) -> list[Block]:
    """Every code block of a page, in order."""
    name = str(page.relative_to(ROOT))
    found = []
    for token in MarkdownIt("commonmark").parse(page.read_text()):
        if token.type == "fence":
            language, *attributes = token.info.split() or [""]
            found.append(Block(name, token.map[0] + 2, language, tuple(attributes), token.content))
        elif token.type == "code_block":
            found.append(Block(name, token.map[0] + 1, "sh", (), token.content))
    return found


def inline_code(page: Path) -> list[str]:
    """Every code span of a page."""
    return [token.content for token in inline(page) if token.type == "code_inline"]


def links(page: Path) -> list[str]:
    """Where a page's links and pictures point to."""
    targets = [token.attrGet("href") or token.attrGet("src") for token in inline(page)]
    return [str(target) for target in targets if target]


def inline(page: Path) -> list[Token]:
    """Everything within a page's paragraphs, headings and table cells."""
    tokens = MarkdownIt("commonmark").enable("table").parse(page.read_text())
    return [child for token in tokens for child in token.children or ()]
