"""The repository as a newcomer meets it: the shipped examples, the targets of make, links, stray paths."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest

from cortex import __version__
from cortex.config import load_gateway, load_models, load_neuron
from house import documents, nothing_in, sizes

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
CACHES = {
    ".git",
    ".venv",
    ".cache",
    "__pycache__",
    ".mypy_cache",
    ".ruff_cache",
    ".pytest_cache",
    ".hypothesis",
}


def project_files() -> list[Path]:
    """What git has or would take; without git, everything but caches."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=False,
    )
    if listed.returncode == 0:
        return [ROOT / name.decode() for name in listed.stdout.split(b"\0") if name]
    return [path for path in ROOT.rglob("*") if path.is_file() and CACHES.isdisjoint(path.parts)]


def test_the_example_of_the_gateway_loads_with_its_catalogue() -> None:
    path = ROOT / "cortex.example.toml"
    config = load_gateway(path, {})
    assert [node.name for node in config.neurons] == ["beast", "benjy"]
    assert load_models(config, path).models


def test_the_example_of_the_neuron_loads() -> None:
    assert load_neuron(ROOT / "neuron.example.toml", {}).default_models


def test_keys_that_the_examples_offer_in_comments_exist(tmp_path: Path) -> None:
    """`# key = value` lines of the examples, uncommented, are still a good configuration."""
    for name, load in (("cortex", load_gateway), ("neuron", load_neuron)):
        text = (ROOT / f"{name}.example.toml").read_text()
        offered = re.sub(r"^# (\[\[\w+\]\]|\w+ = .*)$", r"\1", text, flags=re.MULTILINE)
        assert offered != text
        path = tmp_path / f"{name}.toml"
        path.write_text(offered)
        load(path, {})


def test_no_machine_and_no_registry_is_named() -> None:
    patterns = [
        (r"(?<![\w.~-])/(work|root|home|opt|Users)/\w", "a path of one machine"),
        (r"/tmp/" + r"models", "a path of one machine"),
        (r"(pythonhosted|pypi)" + r"\.org", "a registry's host"),
    ]
    here = Path(__file__)
    nothing_in(sizes.matches([path for path in project_files() if path != here], ROOT, patterns))


def test_links_between_pages_lead_somewhere() -> None:
    assert len(PAGES) > 10
    nothing_in(documents.broken_links(PAGES))


def test_every_page_is_reached_from_the_readme() -> None:
    reached: set[Path] = set()
    waiting = [ROOT / "README.md"]
    while waiting:
        page = waiting.pop()
        if page in reached:
            continue
        reached.add(page)
        targets = re.findall(r"\]\(([^)#\s:]+\.md)", page.read_text(encoding="utf-8"))
        waiting += [found for target in targets if (found := (page.parent / target).resolve()).exists()]
    assert [str(page.relative_to(ROOT)) for page in PAGES if page not in reached] == []


@pytest.mark.parametrize("target", ["up", "test", "lint", "soak", "bench", "clean"])
def test_make_knows_its_targets(target: str) -> None:
    done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_continuous_integration_runs_what_the_readme_says() -> None:
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o100
    assert re.findall(r"^make .*$", script.read_text(), re.MULTILINE) == ["make test"]
    assert "make test" in (ROOT / "README.md").read_text()


def test_the_changelog_knows_the_version() -> None:
    titles = [part.title for part in documents.sections((ROOT / "CHANGELOG.md").read_text())]
    assert any(title.startswith((__version__, "Unreleased")) for title in titles)


def test_the_licence_is_the_one_that_the_project_names() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["license"] == "GPL-3.0-or-later"
    text = (ROOT / "LICENSE").read_text()
    assert "GNU GENERAL PUBLIC LICENSE" in text
    assert "Version 3, 29 June 2007" in text
