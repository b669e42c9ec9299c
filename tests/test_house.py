# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
The house stays one to live in: how many files a reader opens, how long they are, what an import costs. What a layer costs on the
host is counted in `modeling/test_host_cost.py`.
"""

import ast
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import gma_hf


pytestmark = pytest.mark.quick
PACKAGE = Path(gma_hf.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in FILES}

# Files that a reader opens to follow a piece: all that it imports, directly or not, inside of functions too. Not counted are files
# that only gather names (`__init__.py`), the kernels for GPUs, what shares a text among processes (`parallel`), and what is imported
# for annotations alone.
CLOSURES = {
    "one gated layer": (("modeling/attention_gma.py",), 15),
    "one converted layer": (("conversion/runtime/attention.py",), 14),
    "convert_to_gma": (("conversion/convert.py",), 27),
}
LONGEST_FILE = 400  # lines, or a few more
FEW_MORE = 10
BENCHMARKS = PACKAGE.parent / "benchmarks"
FILES_OF_A_FOLDER = 12  # without `__init__.py`
# CPU time of `import gma_hf` beside that of the classes of Transformers that it builds on
IMPORT = "from transformers import AutoModelForCausalLM, DynamicCache, GenerationMixin, PreTrainedConfig, PreTrainedModel, Trainer"
TIME_OF_IMPORT = 1.15


def imports(path: Path):
    """The import statements of a file that are more than annotations need."""
    annotations = {
        id(statement)
        for node in ast.walk(TREES[path])
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for child in node.body
        for statement in ast.walk(child)
    }
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.ImportFrom) and node.level > 0 and id(node) not in annotations:
            yield node


def imported_files(path: Path, node: ast.ImportFrom, names: set[str] | None = None):
    """The files of the package that an import statement means, whichever `__init__.py` hands their names on."""
    if names is not None and not names & {alias.asname or alias.name for alias in node.names}:
        return
    folder = path.parents[node.level - 1]
    target = folder.joinpath(*(node.module or "").split(".")) if node.module else folder
    if target.with_suffix(".py").is_file():
        yield target.with_suffix(".py")
        return
    for alias in node.names:
        if names is not None and (alias.asname or alias.name) not in names:
            continue
        if (target / f"{alias.name}.py").is_file():
            yield target / f"{alias.name}.py"
        elif (target / "__init__.py").is_file():
            for handed_on in imports(target / "__init__.py"):
                yield from imported_files(target / "__init__.py", handed_on, {alias.name})


def closure(*starts: str) -> set[Path]:
    """All files that are imported from some files, these included."""
    found, waiting = set(), [PACKAGE / start for start in starts]
    while waiting:
        path = waiting.pop()
        if path in found or path.name == "__init__.py" or {"triton", "parallel"} & {*path.relative_to(PACKAGE).parts}:
            continue
        found.add(path)
        waiting += [other for node in imports(path) for other in imported_files(path, node)]
    return found


@pytest.mark.parametrize("piece", list(CLOSURES))
def test_a_reader_opens_few_files(piece):
    starts, wanted = CLOSURES[piece]
    found = sorted(str(path.relative_to(PACKAGE)) for path in closure(*starts))
    assert len(found) <= wanted, "\n".join(found)


def test_the_public_functions_of_the_operators_import_none_of_their_ways():
    """A way registers itself in the table of its operator, so that who reads the door reads no way."""
    doors = sorted(str(path.relative_to(PACKAGE)) for path in PACKAGE.glob("ops/*/functional.py"))
    assert doors == [f"ops/{room}/functional.py" for room in ("attention", "convolution", "rotation", "window")]
    for door in doors:
        beyond = {path.parent.name for path in closure(door)} - {"gma_hf", "ops", "attention"}
        assert beyond <= {Path(door).parent.name}
        ways = {path.name for path in closure(door)} & {
            "fused.py", "recurrent.py", "reference.py", "plain.py", "softmax.py", "blocks.py", "dense.py", "causal.py"
        }  # fmt: skip
        assert not ways


def test_the_import_graph_has_no_circle():
    """At import time: an import inside of a function may go back."""
    graph = {
        path: {other for node in TREES[path].body if isinstance(node, ast.ImportFrom) and node.level > 0
               for other in imported_files(path, node) if other.name != "__init__.py"}
        for path in FILES if path.name != "__init__.py"
    }  # fmt: skip
    while leaves := [path for path, others in graph.items() if not others & graph.keys() - {path}]:
        for path in leaves:
            del graph[path]
    assert not graph


@pytest.mark.parametrize("house", [PACKAGE, BENCHMARKS], ids=lambda house: house.name)
def test_a_file_has_one_subject_and_a_folder_few_files(house):
    paths = sorted(house.rglob("*.py"))
    lines = {str(path.relative_to(house)): len(path.read_text(encoding="utf-8").splitlines()) for path in paths}
    assert len(lines) > 40  # the files are there
    assert {name: number for name, number in lines.items() if number > LONGEST_FILE + FEW_MORE} == {}
    folders = Counter(str(path.parent.relative_to(house)) for path in paths if path.name != "__init__.py")
    assert {folder: number for folder, number in folders.items() if number > FILES_OF_A_FOLDER} == {}


def test_an_import_costs_hardly_more_than_the_classes_of_transformers_that_it_builds_on():
    def seconds(statement: str) -> float:
        program = f"import time\n{statement}\nprint(time.process_time())"
        runs = [subprocess.run([sys.executable, "-c", program], capture_output=True, text=True) for _ in range(2)]
        return min(float(run.stdout.split()[-1]) for run in runs)

    assert seconds("import gma_hf") <= TIME_OF_IMPORT * seconds(IMPORT)
