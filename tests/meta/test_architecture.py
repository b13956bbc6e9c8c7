"""The house rules over the real sources: who imports whom, how long things are, what they are called."""

import sys
import tomllib
from pathlib import Path

import pytest

from house import imports, nothing_in, sizes
from house.imports import Part
from house.source import Tree

ROOT = Path(__file__).parents[2]
SOURCES = Tree(ROOT / "src")

STRANGERS = ("cortex!", "cortex.wire", "cortex.hookspecs", "cortex.web.client", "cortex.testing")
"""What a plugin may import, built in or not."""

ENGINE_BORDER = ("cortex.neuron.engine.messages", "cortex.hookspecs", "cortex.wire")
"""The two sides of the process border meet here alone."""

TORCH_ROOMS = (
    "cortex.neuron.nn",
    "cortex.neuron.models",
    "cortex.neuron.weights",
    "cortex.neuron.engine.cache",
    "cortex.neuron.engine.graphs",
    "cortex.neuron.engine.loading",
    "cortex.neuron.engine.loop",
    "cortex.neuron.engine.paged",
    "cortex.neuron.engine.ranks",
    "cortex.neuron.engine.runner",
    "cortex.neuron.engine.race",
    "cortex.neuron.engine.sampler",
    "cortex.neuron.engine.states",
    "cortex.neuron.engine.threads",
    "cortex.neuron.engine.windows",
    "cortex.neuron.engine.worker",
)

PARTS = [
    Part("cortex!"),
    Part("cortex.__main__", ("cortex.cli",)),
    Part(
        "cortex.cli",
        (
            "cortex!",
            "cortex.config",
            "cortex.plugins",
            "cortex.wire",
            "cortex.web",
            "cortex.gateway.app",
            "cortex.neuron.app",
        ),
    ),
    Part("cortex.config", ("cortex.wire",)),
    Part("cortex.hookspecs", ("cortex.wire",)),
    Part("cortex.plugins", ("cortex!", "cortex.hookspecs", "cortex.wire.errors")),
    Part("cortex.testing", ("cortex!", "cortex.wire", "cortex.web", "cortex.hookspecs")),
    Part("cortex.wire"),
    Part("cortex.web", ("cortex.wire.errors",)),
    Part(
        "cortex.gateway",
        ("cortex.wire", "cortex.web", "cortex.hookspecs"),
        {"cortex.gateway.app": ("cortex!", "cortex.config", "cortex.plugins")},
    ),
    Part("cortex.harnesses!"),
    Part("cortex.harnesses.openai", STRANGERS),
    Part(
        "cortex.neuron",
        (
            *ENGINE_BORDER,
            "cortex!",
            "cortex.web",
            "cortex.neuron.text",
            "cortex.neuron.models.division",
            "cortex.neuron.models.reading",
            "cortex.neuron.models.shape",
            "cortex.neuron.weights.checkpoint",
            "cortex.neuron.weights.gguf",
            "cortex.neuron.engine.entry",
        ),
        {"cortex.neuron.app": ("cortex.config", "cortex.plugins")},
    ),
    Part("cortex.neuron.text", ("cortex.wire", "cortex.hookspecs")),
    Part(
        "cortex.neuron.engine",
        (
            *ENGINE_BORDER,
            "cortex.neuron.heap",
            "cortex.neuron.nn",
            "cortex.neuron.models",
            "cortex.neuron.weights",
        ),
    ),
    Part("cortex.neuron.models", ("cortex.neuron.nn", "cortex.neuron.weights", "cortex.wire.errors")),
    Part("cortex.neuron.weights", ("cortex.wire.errors",)),
    Part("cortex.neuron.nn"),
]

EXCEPTIONS: list[sizes.Excess] = [
    sizes.Excess("cortex.hookspecs", 460, "all that a plugin's author may meet stands on one page"),
]
"""Rows of (module or module:function, its own ceiling, why it may be longer)."""

IMPORT_NAMES = {"pynvml": "nvidia-ml-py", "cortex": "helexa-cortex"}
"""Top-level import names that differ from their distribution's."""

UNSEEN = {
    "numpy": "torch warns at import where it is missing",
    "mypy": "a command of `make lint`",
    "ruff": "a command of `make lint`",
    "pytest-asyncio": "a plugin that pytest finds by itself",
    "pytest-timeout": "a plugin that pytest finds by itself",
    "pytest-xdist": "a plugin that pytest finds by itself",
}
"""Dependencies that no import shows, and why they are there."""

HEAVY = ("torch", "transformers", "safetensors", "gguf", "huggingface_hub", "numpy", "tokenizers", "jinja2")


def distributions(*extras: str) -> set[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = project["dependencies"] + [
        line for extra in extras for line in project["optional-dependencies"][extra]
    ]
    return {line.partition(">")[0].partition("=")[0].strip() for line in lines}


def test_imports_point_the_way_that_the_design_says() -> None:
    nothing_in(imports.directions(SOURCES, PARTS, "cortex"))


def test_gateway_and_neuron_never_reach_each_other() -> None:
    for start, other in (("cortex.gateway.app", "cortex.neuron"), ("cortex.neuron.app", "cortex.gateway")):
        reached = [name for name in SOURCES.reach(start) if name == other or name.startswith(other + ".")]
        assert reached == [], f"{start} reaches {reached}"


def test_no_import_cycles() -> None:
    nothing_in(imports.cycles(SOURCES, "cortex"))


def test_own_modules_are_imported_at_the_top() -> None:
    nothing_in(imports.lazy_own_imports(SOURCES, "cortex", ["cortex.cli"]))


def test_modules_are_imported_by_name_only_where_the_design_says() -> None:
    allowed = ["cortex.plugins", "cortex.neuron.engine.entry", "cortex.neuron.models.registry"]
    nothing_in(imports.by_name_imports(SOURCES, "cortex", allowed))


def test_torch_stays_in_its_rooms() -> None:
    nothing_in(imports.only_in(SOURCES, "cortex", "torch", TORCH_ROOMS))


@pytest.mark.parametrize(
    ("start", "heavy"),
    [
        ("cortex", HEAVY),
        ("cortex.cli", HEAVY),
        ("cortex.gateway.app", HEAVY),
        ("cortex.neuron.app", ("torch", "transformers")),
        ("cortex.neuron.engine.entry", ("torch", "transformers")),
        ("cortex.testing", HEAVY),
    ],
)
def test_nothing_heavy_is_reached_from(start: str, heavy: tuple[str, ...]) -> None:
    assert start in SOURCES.modules
    nothing_in(imports.never_reaches(SOURCES, [start], heavy))


def test_only_the_torch_half_of_the_engine_reaches_torch() -> None:
    light = [
        module.name for module in SOURCES.under("cortex.neuron.engine") if module.name not in TORCH_ROOMS
    ]
    assert "cortex.neuron.engine.messages" in light
    nothing_in(imports.never_reaches(SOURCES, light, ["torch"]))


def test_other_web_stacks_and_client_libraries_stay_out() -> None:
    out = ["starlette", "fastapi", "pydantic", "requests", "httpx", "aiohttp", "openai", "transformers"]
    nothing_in(imports.outsiders(SOURCES, "cortex", [*out, "anthropic"]))


def test_the_gateway_side_imports_only_base_dependencies_and_the_neuron_only_its_extra() -> None:
    names = dict.fromkeys(sys.stdlib_module_names, "the standard library") | IMPORT_NAMES
    base = distributions() | {"the standard library", "helexa-cortex"}
    node = base | distributions("neuron")
    gateway_side = [module.name for module in SOURCES if not module.name.startswith("cortex.neuron")]
    violations = [
        violation
        for violation in imports.undeclared(SOURCES, "cortex", names, base)
        if violation.partition(":")[0] in gateway_side
    ]
    nothing_in(violations)
    nothing_in(imports.undeclared(SOURCES, "cortex.neuron", names, node))


def test_every_dependency_is_used() -> None:
    names = {distribution: name for name, distribution in IMPORT_NAMES.items()}

    def unused(tree: Tree, wanted: set[str]) -> list[str]:
        taken = {found.target.partition(".")[0] for module in tree for found in tree.imports(module)}
        return sorted(name for name in wanted - set(UNSEEN) if names.get(name, name) not in taken)

    nothing_in(unused(SOURCES, distributions("neuron")))
    nothing_in(unused(Tree(ROOT / "tests"), distributions("dev") - distributions()))


def test_tests_import_only_declared_dependencies() -> None:
    names = dict.fromkeys(sys.stdlib_module_names, "the standard library") | IMPORT_NAMES
    known = distributions("neuron", "dev") | {"the standard library", "helexa-cortex", "house", "soaking"}
    violations = imports.undeclared(Tree(ROOT / "tests"), "", names, known)
    nothing_in([violation for violation in violations if not violation.startswith("bench.")])


def test_one_vendor_has_no_name_outside_its_folder() -> None:
    allowed = ["cortex.harnesses.anthropic", "cortex.cli", "cortex.plugins"]
    nothing_in(sizes.word_outside(SOURCES, "cortex", "anthropic", allowed))


def test_files_and_functions_stay_under_their_ceilings() -> None:
    nothing_in(sizes.too_long(SOURCES, 400, 60, EXCEPTIONS))


def test_test_files_stay_under_their_ceiling() -> None:
    tests = [module for module in Tree(ROOT / "tests") if "fixtures" not in module.path.parts]
    nothing_in(sizes.too_long(tests, 600, 600, []))


def test_module_names_say_something() -> None:
    empty = {"utils", "util", "common", "core", "types", "helpers", "misc"}
    nothing_in(sizes.forbidden_names(SOURCES, empty))


def test_every_module_says_what_it_is() -> None:
    nothing_in(sizes.without_docstring(SOURCES))


def test_nothing_in_the_sources_is_left_for_later() -> None:
    words = [(r"\b(TODO|FIXME|XXX|HACK)\b", "left for later"), (r"\bNotImplementedError\b", "not done")]
    nothing_in(sizes.matches([module.path for module in SOURCES], ROOT, words))


def test_the_package_is_typed() -> None:
    assert (ROOT / "src/cortex/py.typed").exists()
