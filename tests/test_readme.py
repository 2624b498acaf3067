"""What README and docs say can be done: commands parse, files exist, the example runs."""

import ast
import re
import shlex
from pathlib import Path

import pytest

from moejax.cli import VERBS
from moejax.overrides import load_config, read_overrides
from moejax.sweep_runs import load_sweep
from moejax.workdir import MAY_CHANGE_AFTER_TRAINING, matches

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
README = ROOT / "README.md"


def _blocks(page: Path) -> list[tuple[str, str]]:
    """Returns (language, content) of each fenced code block."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def _commands(program: str) -> list[tuple[str, str]]:
    """Returns (page, command) for each line of a code block that runs `program`."""
    found = []
    for page in PAGES:
        for _, block in _blocks(page):
            lines = block.replace("\\\n", " ").splitlines()
            found += [(page.name, line) for line in lines if line.startswith(program + " ")]
    return found


@pytest.mark.parametrize(("page", "command"), _commands("moejax"))
def test_commands_parse(page, command, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = shlex.split(command, comments=True)
    end = next((i for i, word in enumerate(words) if word in ("|", "&&", ">")), len(words))
    verb = VERBS[words[1]]
    line = verb.read(words[2:end])
    if line.config is not None and verb.name == "sweep":
        load_sweep(line.config, read_overrides(line.overrides))
    elif line.config is not None:
        load_config(line.config, line.overrides)
    for key in read_overrides(line.overrides):
        assert line.config is not None or matches(key, MAY_CHANGE_AFTER_TRAINING)


def test_commands_are_found():
    pages = {page for page, _ in _commands("moejax")}
    assert {"README.md", "data.md", "checkpoints.md"} <= pages
    verbs = {shlex.split(command)[1] for page, command in _commands("moejax")}
    assert verbs == set(VERBS)


@pytest.mark.parametrize(("page", "command"), _commands("make"))
def test_make_targets_exist(page, command):
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert shlex.split(command, comments=True)[1] in targets


def _tree() -> list[str]:
    """Returns the paths that README's tree names, first in a line or in its remark."""
    (tree,) = [block for _, block in _blocks(README) if block.startswith("moejax/\n")]
    paths, folder = [], ""
    for line in tree.splitlines():
        name, _, remark = line.strip().partition(" ")
        if not line.startswith(" "):
            folder, name = name, ""
        paths.append(folder + name)
        paths += [folder + other for other in re.findall(r"[a-z]\w*\.py", remark)]
    return paths


@pytest.mark.parametrize("path", _tree())
def test_files_of_the_tree_exist(path):
    assert (ROOT / path).exists()


def test_the_tree_names_every_module():
    private = {"__init__.py", "__main__.py"}
    modules = {f"moejax/{file.name}" for file in ROOT.glob("moejax/*.py")}
    assert modules - {f"moejax/{name}" for name in private} <= set(_tree())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        assert "://" in target or (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_files_exist(page):
    """Paths in backticks, such as `tests/test_cli.py`."""
    folders = "tests|docs|scripts|configs|benchmarks|moejax"
    for path in re.findall(rf"`((?:{folders})/[\w/]+\.\w+)`", page.read_text()):
        assert (ROOT / path).exists(), path


def test_the_python_example_runs(capsys):
    (example,) = [block for language, block in _blocks(README) if language == "python"]
    exec(compile(example, str(README), "exec"), {"__name__": "example"})  # noqa: S102
    assert capsys.readouterr().out.count(" ") >= 7  # eight counts


def test_the_benchmark_table_has_its_markers():
    text = README.read_text()
    marks = ("<!-- benchmark:begin -->\n", "<!-- benchmark:end -->\n")
    assert [text.count(mark) for mark in marks] == [1, 1]
    assert text.index(marks[0]) < text.index(marks[1])


def test_imports_go_one_way():
    """A module imports only from the modules before it in the list of docs/design.md."""
    (block,) = [b for language, b in _blocks(ROOT / "docs" / "design.md") if language == "imports"]
    order = block.split()
    assert len(order) == len(set(order))
    modules = [file for file in ROOT.glob("moejax/*.py") if not file.stem.startswith("__")]
    files = {file.stem: [file] for file in modules}
    files["commands"] = sorted(ROOT.glob("moejax/commands/*.py"))
    assert set(order) == set(files)
    for name in order:
        for imported in set().union(*map(_imports, files[name])) & set(files) - {name}:
            assert order.index(imported) < order.index(name), f"{name} imports {imported}"


def _imports(file: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "moejax":
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("moejax."):
            names.add(node.module.split(".")[1])
    return names
