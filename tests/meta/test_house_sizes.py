"""The ceilings and word rules themselves: each must find its violation, and only that."""

from pathlib import Path

import pytest

from house import sizes
from house.source import Module, Tree, functions, strings


def module(text: str, name: str = "pkg.a") -> Module:
    return Module(name, Path("a.py"), text)


def function_of(lines: int, name: str = "f") -> str:
    return f"def {name}():\n" + "    x = 1\n" * (lines - 1)


def test_a_file_over_its_ceiling_is_found() -> None:
    assert sizes.too_long([module("x = 1\n" * 10)], 10, 60, []) == []
    assert sizes.too_long([module("x = 1\n" * 11)], 10, 60, []) == ["pkg.a: 11 lines, the ceiling is 10"]


def test_a_function_over_its_ceiling_is_found_in_a_class_and_in_a_function() -> None:
    inner = "class C:\n    async def g(self):\n        def h():\n" + "            x = 1\n" * 5
    violations = sizes.too_long([module(function_of(5)), module(inner, "pkg.b")], 99, 5, [])
    assert violations == [
        "pkg.b:C.g: 7 lines, the ceiling is 5",
        "pkg.b:C.g.h: 6 lines, the ceiling is 5",
    ]


def test_an_exception_lifts_its_ceiling_and_no_other() -> None:
    text = function_of(9) + function_of(9, "g")
    excess = sizes.Excess("pkg.a:f", 9, "one table of fifty cases")
    assert sizes.too_long([module(text)], 99, 5, [excess]) == ["pkg.a:g: 9 lines, the ceiling is 5"]


def test_an_exception_has_a_ceiling_of_its_own() -> None:
    excess = sizes.Excess("pkg.a:f", 8, "one table of fifty cases")
    assert sizes.too_long([module(function_of(9))], 99, 5, [excess]) == ["pkg.a:f: 9 lines, the ceiling is 8"]


@pytest.mark.parametrize("where", ["pkg.a:f", "pkg.a:gone", "pkg.gone"])
def test_a_stale_exception_is_found(where: str) -> None:
    excess = sizes.Excess(where, 9, "one table of fifty cases")
    violations = sizes.too_long([module(function_of(5))], 99, 5, [excess])
    assert violations == [f"{where}: its exception is not needed any more"]


def test_an_exception_without_a_reason_is_found() -> None:
    excess = sizes.Excess("pkg.a:f", 9, "long")
    violations = sizes.too_long([module(function_of(9))], 99, 5, [excess])
    assert violations == ["pkg.a:f: its exception gives no reason"]


def test_a_module_with_an_empty_name_is_found() -> None:
    modules = [module("", name) for name in ("pkg.utils", "pkg.x.types", "pkg.typesetting")]
    found = sizes.forbidden_names(modules, {"utils", "types"})
    assert [violation.partition(":")[0] for violation in found] == ["pkg.utils", "pkg.x.types"]


def test_a_module_without_a_docstring_is_found() -> None:
    assert sizes.without_docstring([module('"""What it does."""'), module("x = 1", "pkg.b")]) == [
        "pkg.b: has no docstring"
    ]


def test_a_word_outside_its_folder_is_found_in_code_and_comments(tmp_path: Path) -> None:
    (tmp_path / "pkg" / "acme").mkdir(parents=True)
    (tmp_path / "pkg" / "acme" / "dialect.py").write_text("name = 'acme'")
    (tmp_path / "pkg" / "serve.py").write_text("x = 1\n# as Acme has it\n")
    assert sizes.word_outside(Tree(tmp_path), "pkg", "acme", ["pkg.acme"]) == ["pkg.serve:2: says 'acme'"]


def test_matches_name_file_line_and_meaning_and_pass_over_binaries(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("fine\nsee /somewhere/else\n")
    (tmp_path / "b.bin").write_bytes(b"\xff\xfe/somewhere/else")
    found = sizes.matches(tmp_path.iterdir(), tmp_path, [("/somewhere/", "a path of one machine")])
    assert found == ["a.md:2: a path of one machine: /somewhere/"]


def test_strings_leave_out_docstrings() -> None:
    text = '"""Doc."""\nx = "a"\n"""About x."""\ndef f(y="b"):\n    """Doc."""\n    return f"c{y}"\n'
    assert sorted(value for value, _ in strings(module(text))) == ["a", "b", "c"]


def test_functions_are_named_by_where_they_stand() -> None:
    text = "class A:\n    def f(self):\n        pass\nif True:\n    def g():\n        pass\n"
    assert [name for name, _ in functions(module(text))] == ["A.f", "g"]
