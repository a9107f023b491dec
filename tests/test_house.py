"""The shape of the package: which module may import which, what is tested, and where names of layers may stand."""

import ast
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "mixdq_ao"
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path != PACKAGE / "__init__.py"
}

# From the bottom of the house to its top: a module imports only what stands in earlier lines. A module that stands in
# none belongs to the method, whose modules may import one another.
ROWS = """
errors progress _quiet _version
bits
packing
ops
layers
attention tensor
files
plan
checkpoint
legacy families
siblings
nodes
passes
config
model_file
summary
integrations._imports
integrations.diffusers integrations.peft integrations.torchao
integrations
describing
precompiled
compiling exporting compile_cache
<method>
report
auto demo doctor
bench.timing bench.turns bench.inputs bench.models bench.variants bench.tracing
bench.results
bench.run bench.plot
bench
cli.printing cli.options
cli.evaluation cli.files cli.measure cli.method
cli
__main__
"""
RANK = {name: rank for rank, row in enumerate(ROWS.strip().splitlines()) for name in row.split()}
METHOD_RANK = RANK.pop("<method>")

# Loading one of these takes seconds, or it may be absent: never at import time.
HEAVY = {"accelerate", "diffusers", "matplotlib", "peft", "scipy", "torchmetrics", "torchvision", "transformers"}

# In test_integrations, test_calibrate and, by the commands, in test_cli and wherever else one is run.
TESTED_BY_WHAT_THEY_DO = {"integrations.peft", "integrations.torchao", "watching"}
TESTED_BY_WHAT_THEY_DO |= {name for name in MODULES if name.startswith("cli.")}

LAYER_NAME = re.compile(r"attn[12]|conv_shortcut|to_[qkv]\b|(up|down)_blocks\.|mid_block|ff\.net|proj_(in|out)\b")
MAY_NAME_LAYERS = {"families", "tiny_model"}


def nodes(path: Path) -> list[ast.AST]:
    return list(ast.walk(ast.parse(path.read_text())))


def internal_imports(path: Path) -> set[str]:
    """Modules of the package that a file imports anywhere."""
    found = set()
    for node in nodes(path):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: write imports in full"
            if (node.module or "").partition(".")[0] == "mixdq_ao":
                base = node.module.partition(".")[2]
                inner = {f"{base}.{alias.name}".lstrip(".") for alias in node.names}
                modules = inner & MODULES.keys()
                found |= modules
                if base and modules != inner:
                    found.add(base)
        elif isinstance(node, ast.Import):
            names = (alias.name.partition(".")[2] for alias in node.names if alias.name.startswith("mixdq_ao."))
            found |= set(names)
    return found


def imports_at_load(path: Path) -> set[str]:
    """Outside libraries that are imported when the module is: not inside of functions."""
    found, left = set(), list(ast.parse(path.read_text()).body)
    while left:
        node = left.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").partition(".")[0])
        elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            left += ast.iter_child_nodes(node)
    return found - {"mixdq_ao"}


@pytest.mark.parametrize("name", MODULES)
def test_imports_run_one_way(name):
    own = RANK.get(name, METHOD_RANK)
    others = {other: RANK.get(other, METHOD_RANK) for other in internal_imports(MODULES[name])}
    wrong = [other for other, rank in others.items() if rank > own or (rank == own and own != METHOD_RANK)]
    assert not wrong, f"{name} may not import {wrong}"


def test_there_is_no_cycle():
    graphlib.TopologicalSorter({name: internal_imports(path) for name, path in MODULES.items()}).prepare()


@pytest.mark.parametrize("name", MODULES)
def test_heavy_libraries_are_imported_where_they_are_used(name):
    assert not imports_at_load(MODULES[name]) & HEAVY


def test_modules_load_without_what_windows_lacks():
    names = ", ".join(f"mixdq_ao.{name}" for name in MODULES if name != "integrations.peft")  # which needs peft
    code = "import sys\nfor name in ('fcntl', 'grp', 'pwd', 'resource', 'termios'): sys.modules[name] = None\n"
    result = subprocess.run([sys.executable, "-c", f"{code}import {names}"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_the_tensor_knows_neither_files_nor_other_libraries():
    assert imports_at_load(MODULES["tensor"]) <= {"torch", "torchao"}
    assert not internal_imports(MODULES["tensor"]) & {"files", "plan", "checkpoint", "families", "config"}


def test_the_width_table_stands_alone():
    """``setup.py`` reads it where there is no torch."""
    assert not imports_at_load(MODULES["bits"]) - {"dataclasses"}
    assert not imports_at_load(MODULES["errors"])


def test_every_module_has_a_test():
    tests = list((ROOT / "tests").glob("test_*.py"))
    tested = {path.stem.removeprefix("test_") for path in tests} | {n for path in tests for n in internal_imports(path)}
    tested |= TESTED_BY_WHAT_THEY_DO
    public = {name for name in MODULES if not name.startswith("_")}
    missing = sorted(public - tested)
    assert not missing, f"write tests/test_<module>.py, or a test that imports it, for {missing}"


@pytest.mark.parametrize("name", MODULES)
def test_names_of_layers_stand_in_families(name):
    if name in MAY_NAME_LAYERS:
        return
    documented = [n for n in nodes(MODULES[name]) if isinstance(n, (ast.Module, ast.ClassDef, ast.FunctionDef))]
    documents = {ast.get_docstring(n, clean=False) for n in documented}
    texts = {n.value for n in nodes(MODULES[name]) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
    assert not [text for text in texts - documents if LAYER_NAME.search(text)]


def test_paths_in_the_readme_exist():
    text = (ROOT / "README.md").read_text()
    linked = re.findall(r"\]\((?!https?://|#|mailto:)([^)#\s]+)", text)
    named = re.findall(r"`((?:mixdq_ao|csrc|tests|tutorials|benchmarks|third_party|\.ci)/[\w./-]*)`", text)
    missing = [path for path in {*linked, *named} if not (ROOT / path).exists()]
    assert not missing


def test_no_package_lies_in_the_repository():
    """What was built or fetched for a run is easily added with everything else."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert not [name for name in listed.splitlines() if re.search(r"\.(whl|so|cubin|tar\.gz|zip)$", name)]
