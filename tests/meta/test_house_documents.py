"""The reading of documents itself: what is missing, made up or broken must be found."""

from pathlib import Path

import pytest

from house import documents

PAGE = """# Title

before

## `first(a)`

| key | what |
|---|---|
| `a.b` | one \\| two |
| plain | x |
| `a.c` and more | y |

```python
# no heading
`no code`
```

### Deeper

see `code` and `more code`

## Second

| `z` | other |
"""


def test_sections_end_at_the_next_heading_and_skip_fences() -> None:
    titles = [part.title for part in documents.sections(PAGE)]
    assert titles == ["", "Title", "`first(a)`", "Deeper", "Second"]


def test_a_section_holds_what_is_below_it() -> None:
    text = documents.section(PAGE, "`first(a)`")
    assert "Deeper" in text
    assert "more code" in text
    assert "other" not in text


def test_a_section_that_is_not_there_is_empty() -> None:
    assert documents.section(PAGE, "Third") == ""


def test_rows_keep_an_escaped_bar() -> None:
    assert ["`a.b`", "one | two"] in documents.rows(PAGE)


def test_first_codes_are_cells_of_nothing_but_code() -> None:
    assert documents.first_codes(PAGE) == ["a.b", "z"]


def test_codes_leave_out_fences() -> None:
    assert "no code" not in documents.codes(PAGE)
    assert "more code" in documents.codes(PAGE)


def test_fences_are_found_by_language() -> None:
    assert documents.fences(PAGE, "python") == ["# no heading\n`no code`\n"]
    assert documents.fences(PAGE, "toml") == []


def test_compare_finds_missing_made_up_and_doubled_names() -> None:
    assert documents.compare({"a", "b"}, ["a", "b"], "page.md") == []
    assert documents.compare({"a", "b"}, ["a", "c", "a"], "page.md") == [
        "page.md: b is missing",
        "page.md: c does not exist",
        "page.md: a is documented twice",
    ]


@pytest.mark.parametrize("target", ["gone.md", "other.md#gone", "#gone", "../gone/"])
def test_a_link_that_leads_nowhere_is_found(tmp_path: Path, target: str) -> None:
    (tmp_path / "other.md").write_text("# Other page\n")
    page = tmp_path / "page.md"
    good = "[a](other.md) [b](other.md#other-page) [c](#here) [d](http://x.y/z)"
    page.write_text(f"# Here\n{good} [e]({target})")
    assert documents.broken_links([page]) == [f"page.md: {target} leads nowhere"]
