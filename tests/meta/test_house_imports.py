"""The import rules themselves: each must find its violation in a made-up tree, and only that."""

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from house import imports
from house.source import Tree

Grow = Callable[[Mapping[str, str]], Tree]


@pytest.fixture
def grow(tmp_path: Path) -> Grow:
    """Writes a package from {path: source} and reads it as a tree."""

    def write(files: Mapping[str, str]) -> Tree:
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        return Tree(tmp_path)

    return write


HOUSE = [
    imports.Part("pkg!"),
    imports.Part("pkg.low"),
    imports.Part("pkg.left", ("pkg.low",), {"pkg.left.app": ("pkg.settings",)}),
    imports.Part("pkg.right", ("pkg.low.errors",)),
    imports.Part("pkg.settings"),
]


def test_directions_accept_what_the_table_allows(grow: Grow) -> None:
    tree = grow(
        {
            "pkg/__init__.py": "",
            "pkg/settings.py": "",
            "pkg/low/errors.py": "import os",
            "pkg/left/app.py": "from pkg import settings\nfrom pkg.low import errors\nfrom . import other",
            "pkg/left/other.py": "import pkg.low.errors",
            "pkg/right/one.py": "from pkg.low.errors import Oops",
        }
    )
    assert imports.directions(tree, HOUSE, "pkg") == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("pkg/left/other.py", "from pkg.right import one"),
        ("pkg/left/other.py", "from ..right import one"),
        ("pkg/left/other.py", "def f():\n    import pkg.right.one"),
        ("pkg/left/other.py", "if TYPE_CHECKING:\n    from pkg.right.one import Thing"),
        ("pkg/left/other.py", "from pkg import settings"),
        ("pkg/low/errors.py", "import pkg.left.app"),
        ("pkg/right/two.py", "from pkg.low import chat"),
        ("pkg/stray.py", "x = 1"),
    ],
)
def test_directions_find_a_wrong_import(grow: Grow, path: str, source: str) -> None:
    skeleton = {
        "pkg/left/app.py": "",
        "pkg/low/errors.py": "",
        "pkg/low/chat.py": "",
        "pkg/right/one.py": "",
        "pkg/settings.py": "",
    }
    violations = imports.directions(grow({**skeleton, path: source}), HOUSE, "pkg")
    assert len(violations) == 1
    assert path.removesuffix(".py").replace("/", ".") in violations[0]


def test_an_own_import_inside_a_function_is_found(grow: Grow) -> None:
    source = "import os\nimport pkg.a\ndef f():\n    import os.path\n    from pkg import b\n"
    tree = grow({"pkg/a.py": "", "pkg/b.py": "", "pkg/c.py": source, "pkg/cli/d.py": source})
    assert imports.lazy_own_imports(tree, "pkg", ["pkg.cli"]) == ["pkg.c:5: imports pkg.b inside a function"]


@pytest.mark.parametrize(
    "source",
    [
        "import importlib\nimportlib.import_module('x')",
        "from importlib import import_module\nimport_module('x')",
        "__import__('x')",
        "import runpy\nrunpy.run_module('x')",
    ],
)
def test_an_import_by_name_is_found(grow: Grow, source: str) -> None:
    tree = grow({"pkg/plugins.py": source, "pkg/sly.py": source, "pkg/good.py": "import importlib.metadata"})
    violations = imports.by_name_imports(tree, "pkg", ["pkg.plugins"])
    assert violations
    assert {violation.partition(":")[0] for violation in violations} == {"pkg.sly"}


def test_an_outsider_is_found_wherever_it_is_imported(grow: Grow) -> None:
    tree = grow({"pkg/a.py": "def f():\n    from requests.auth import X", "pkg/b.py": "import requests_like"})
    assert imports.outsiders(tree, "pkg", ["requests"]) == ["pkg.a:2: imports requests.auth"]


def test_torch_outside_its_rooms_is_found(grow: Grow) -> None:
    tree = grow({"pkg/nn/a.py": "import torch", "pkg/text.py": "def f():\n    import torch.nn"})
    violations = imports.only_in(tree, "pkg", "torch", ["pkg.nn"])
    assert [violation.partition(":")[0] for violation in violations] == ["pkg.text"]


def test_a_heavy_import_is_found_through_others_and_through_packages(grow: Grow) -> None:
    tree = grow(
        {
            "pkg/app.py": "from pkg.middle import thing",
            "pkg/middle.py": "import pkg.deep.leaf",
            "pkg/deep/__init__.py": "import torch",
            "pkg/deep/leaf.py": "",
            "pkg/lazy.py": "def f():\n    import torch",
            "pkg/typed.py": "if TYPE_CHECKING:\n    import torch",
        }
    )
    assert imports.never_reaches(tree, ["pkg.lazy", "pkg.typed"], ["torch"]) == []
    (violation,) = imports.never_reaches(tree, ["pkg.app"], ["torch"])
    way = "torch <- pkg.deep <- pkg.deep.leaf <- pkg.middle <- pkg.app"
    assert violation == f"pkg.app: reaches torch by {way}"


def test_a_cycle_is_found_also_if_it_hides_in_a_function(grow: Grow) -> None:
    tree = grow(
        {
            "pkg/a.py": "from pkg import b",
            "pkg/b.py": "import pkg.c",
            "pkg/c.py": "def f():\n    from pkg.a import x",
            "pkg/d.py": "import pkg.a, pkg.e",
            "pkg/e.py": "if typing.TYPE_CHECKING:\n    import pkg.d",
        }
    )
    assert imports.cycles(tree, "pkg") == ["pkg.a <-> pkg.b <-> pkg.c"]


def test_an_undeclared_distribution_is_found(grow: Grow) -> None:
    tree = grow({"pkg/a.py": "import os\nimport pynvml\nimport yaml\n"})
    known = {"os": "the standard library", "pynvml": "nvidia-ml-py"}
    allowed = {"the standard library", "nvidia-ml-py"}
    violations = imports.undeclared(tree, "pkg", known, allowed)
    assert violations == ["pkg.a:3: imports yaml, which is no declared dependency here"]


def test_relative_imports_are_resolved_from_modules_and_from_packages(grow: Grow) -> None:
    tree = grow(
        {
            "pkg/a/__init__.py": "from . import b\nfrom .b import x\nfrom .. import c",
            "pkg/a/b.py": "from . import x\nfrom ..c import y",
            "pkg/c.py": "",
        }
    )
    assert [found.target for found in tree.imports(tree.modules["pkg.a"])] == ["pkg.a.b", "pkg.a.b", "pkg.c"]
    assert [found.target for found in tree.imports(tree.modules["pkg.a.b"])] == ["pkg.a", "pkg.c"]
