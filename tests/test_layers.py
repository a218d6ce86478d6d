"""The order of the rooms: which module may import which, and who knows the parsed options."""

import ast
from functools import cache
from pathlib import Path

import pytest

from tests.helpers.source import ROOT, require_none

#: From the top down. A module imports from its own layer and from those below. A package stands for all its modules.
LAYERS = (
    (
        *("train_phase1", "train_phase2"),
        *("c2r.__main__", "c2r.app", "c2r.encode", "c2r.estimate", "c2r.evaluate", "c2r.export", "c2r.generate"),
        *("c2r.prepare", "c2r.quickstart", "c2r.report", "c2r.study"),
    ),
    ("c2r.toy", "c2r.reporting", "c2r.scoring", "c2r.panel"),
    ("c2r.generation",),  # takes the parsed options of c2r.generate: c2r.panel makes such ones too
    ("c2r.evaluation",),
    ("c2r.training", "c2r.estimation"),
    ("c2r.cli",),
    ("c2r.options",),
    ("c2r.preparation",),
    ("c2r.encoding", "c2r.metrics"),
    ("c2r.pipeline", "c2r.pipeline_folder"),
    ("c2r.data",),
    ("c2r.models",),
    (
        *("c2r", "c2r.bars", "c2r.files", "c2r.flow_matching", "c2r.guidance", "c2r.sampler", "c2r.units"),
        "c2r.windows",
    ),
)
SCRIPTS = ("train_phase1", "train_phase2")
#: Rooms whose functions take values by name, never the parsed options of a command.
WITHOUT_OPTIONS = (
    *("c2r.data", "c2r.encoding", "c2r.flow_matching", "c2r.guidance", "c2r.metrics", "c2r.models", "c2r.pipeline"),
    *("c2r.pipeline_folder", "c2r.preparation", "c2r.sampler", "c2r.windows"),
)
#: Imported before a command has answered --help: they must load within a moment.
LIGHT = (
    *("c2r", "c2r.cli", "c2r.data.buckets", "c2r.data.settings", "c2r.metrics.catalogue", "c2r.models.injections"),
    *("c2r.generation", "c2r.generation.control", "c2r.generation.models", "c2r.generation.options"),
    "c2r.generation.video",
    *("c2r.options", "c2r.options.option", "c2r.options.presets", "c2r.options.shared", "c2r.options.tools"),
    *("c2r.options.training", "c2r.options.training_checks", "c2r.options.types"),
)
HEAVY = {"torch", "numpy", "diffusers", "transformers", "accelerate", "datasets", "av", "pyarrow", "matplotlib"}


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {
    name_of(path): path for folder in ("c2r", "tests", "benchmarks") for path in sorted((ROOT / folder).rglob("*.py"))
} | {name: ROOT / f"{name}.py" for name in SCRIPTS}
CODE = [name for name in MODULES if not name.startswith(("tests", "benchmarks"))]


@cache
def tree_of(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text())


def imports(module: str, nodes=None) -> dict[str, int]:
    """Return the modules that a module imports, each with a line."""
    found: dict[str, int] = {}
    for node in ast.walk(tree_of(module)) if nodes is None else nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name: node.lineno for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}:{node.lineno}: a relative import"
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                found[submodule if submodule in MODULES else node.module] = node.lineno
    return found


def layer_of(module: str) -> int:
    """Return the number of a module's layer, 0 at the top."""
    while module:
        for number, names in enumerate(LAYERS):
            if module in names:
                return number
        module = module.rpartition(".")[0] if module.count(".") > 1 else ""
    raise AssertionError("name the layer of this module in LAYERS")


def parameters(module: str):
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs):
                yield argument.arg, node.lineno


def test_every_module_has_a_layer():
    for module in CODE:
        layer_of(module)


def test_no_import_goes_upwards_between_rooms():
    require_none(
        f"{MODULES[module].relative_to(ROOT)}:{line}: imports {imported}, which is in a layer above"
        for module in CODE
        for imported, line in imports(module).items()
        if imported in MODULES and layer_of(imported) < layer_of(module)
    )


def test_no_modules_import_each_other_in_a_circle():
    graph = {module: [name for name in imports(module) if name in CODE] for module in CODE}
    done = set()

    def visit(module, path):
        if module in path:
            pytest.fail(" -> ".join([*path[path.index(module) :], module]), pytrace=False)
        if module not in done:
            for imported in graph[module]:
                visit(imported, [*path, module])
            done.add(module)

    for module in CODE:
        visit(module, [])


def test_rooms_below_the_training_know_no_options_object():
    require_none(
        f"{MODULES[module].relative_to(ROOT)}:{line}: takes a parameter {name!r}; take the values by name"
        for module in CODE
        if any(module == room or module.startswith(f"{room}.") for room in WITHOUT_OPTIONS)
        for name, line in parameters(module)
        if name in ("args", "options")
    )


def test_options_are_parsed_without_heavy_imports():
    require_none(
        f"{MODULES[module].relative_to(ROOT)}:{line}: imports {imported} at once"
        for module in LIGHT
        for imported, line in imports(module, tree_of(module).body).items()
        if imported.partition(".")[0] in HEAVY or (imported in MODULES and imported not in LIGHT)
    )


def test_nothing_but_tests_and_benchmarks_imports_a_script():
    require_none(
        f"{MODULES[module].relative_to(ROOT)}:{line}: imports the script {imported}"
        for module in CODE
        for imported, line in imports(module).items()
        if imported in SCRIPTS
    )


def test_no_test_module_imports_another():
    require_none(
        f"{MODULES[module].relative_to(ROOT)}:{line}: imports {imported}; move what they share to tests/helpers"
        for module in MODULES
        for imported, line in imports(module).items()
        if imported.startswith("tests.") and imported.rpartition(".")[2].startswith(("test_", "conftest"))
    )
