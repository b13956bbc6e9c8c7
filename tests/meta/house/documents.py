"""Reads what the reference pages promise out of their Markdown, so that it can be compared with the code."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Section:
    """A heading and what stands below it, up to the next heading of any level."""

    level: int
    title: str
    text: str


def sections(text: str) -> list[Section]:
    found: list[tuple[int, str, list[str]]] = [(0, "", [])]
    fenced = False
    for line in text.splitlines():
        if line.lstrip().startswith("```"):
            fenced = not fenced
        heading = None if fenced else re.match(r"(#{1,6})\s+(.+?)\s*$", line)
        if heading:
            found.append((len(heading[1]), heading[2], []))
        else:
            found[-1][2].append(line)
    return [Section(level, title, "\n".join(lines)) for level, title, lines in found]


def section(text: str, title: str) -> str:
    """The text of the section called `title` with all the sections below it."""
    lines: list[str] = []
    inside = 0
    for part in sections(text):
        if part.title == title:
            inside = part.level
        elif inside and part.level <= inside:
            break
        if inside:
            lines += ["#" * part.level + " " + part.title, part.text]
    return "\n".join(lines)


def rows(text: str) -> list[list[str]]:
    """The cells of every table row; heading and ruler rows included, `\\|` read as a bar."""
    found = []
    for line in text.splitlines():
        if line.startswith("|"):
            cells = re.split(r"(?<!\\)\|", line.strip().strip("|"))
            found.append([cell.strip().replace("\\|", "|") for cell in cells])
    return found


def first_codes(text: str) -> list[str]:
    """The first cell of every table row whose first cell is nothing but one `code`."""
    return [found[1] for row in rows(text) if (found := re.fullmatch(r"`([^`]+)`", row[0]))]


def codes(text: str) -> list[str]:
    """Everything in single backticks, outside fenced blocks."""
    plain = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    return re.findall(r"`([^`\n]+)`", plain)


def fences(text: str, language: str) -> list[str]:
    """The fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def compare(real: Collection[str], documented: Collection[str], page: str) -> list[str]:
    """What exists and is not documented, what is documented and does not exist, what stands there twice."""
    written = list(documented)
    doubled = sorted({name for name in written if written.count(name) > 1})
    return [
        *(f"{page}: {name} is missing" for name in sorted(set(real) - set(written))),
        *(f"{page}: {name} does not exist" for name in sorted(set(written) - set(real))),
        *(f"{page}: {name} is documented twice" for name in doubled),
    ]


def broken_links(pages: Collection[Path]) -> list[str]:
    """Relative links to files that are not there, and to headings that a page does not have."""
    return [
        f"{page.name}: {target} leads nowhere"
        for page in pages
        for target in _links(page.read_text(encoding="utf-8"))
        if not _leads_somewhere(page, target)
    ]


def _links(text: str) -> Iterator[str]:
    plain = re.sub(r"^```.*?^```|`[^`\n]+`", "", text, flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)\s]+)\)", plain):
        if not re.match(r"[a-z]+:", target):
            yield target


def _leads_somewhere(page: Path, target: str) -> bool:
    name, _, anchor = target.partition("#")
    file = (page.parent / name) if name else page
    if not file.exists():
        return False
    if not anchor or file.is_dir():
        return True
    return anchor in {_anchor(part.title) for part in sections(file.read_text(encoding="utf-8"))}


def _anchor(title: str) -> str:
    """GitHub's anchor of a heading."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
