"""The threat model of docs/security.md: its tests exist, and what holds of the whole package."""

import ast
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

from rich.console import Console

from moejax.config import Config
from moejax.progress import show_evaluation
from moejax.workdir import open_workdir

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "security.md").read_text()
SOURCES = {
    str(path.relative_to(ROOT)): ast.parse(path.read_text())
    for folder in ("moejax", "launch")
    for path in sorted((ROOT / folder).rglob("*.py"))
}


def _rows() -> list[list[str]]:
    table = PAGE.partition("## What is done")[2].partition("## What is not")[0]
    rows = [line.strip("|").split(" | ") for line in table.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows[2:]]


def test_each_row_of_the_page_names_tests_that_exist():
    rows = _rows()
    assert len(rows) > 12
    for what, done, tests in rows:
        names = re.findall(r"`(test_\w+\.py)::(test_\w+)`", tests)
        assert names, f"{what}: {done} has no test"
        assert re.sub(r"`[^`]*`|[, ]", "", tests) == "", tests
        for file, name in names:
            assert re.search(rf"^def {name}\(", (ROOT / "tests" / file).read_text(), re.M), name


def _imported(tree: ast.Module) -> set[str]:
    """The packages that a module imports, by their first name; in functions too."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.partition(".")[0])
    return found


def _calls(tree: ast.AST) -> list[tuple[str, ast.Call]]:
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [(ast.unparse(call.func), call) for call in calls]


def test_nobody_unpickles():
    """Nor loads what may hold a pickle; `np.load` says so each time."""
    unpickling = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    unpickling |= {"torch", "msgpack"}
    for name, tree in SOURCES.items():
        assert not unpickling & _imported(tree), name
        for function, call in _calls(tree):
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
            if function.rpartition(".")[2] in ("load", "loads", "fromfile", "memmap"):
                assert function in ("json.loads", "line.load", "np.load"), f"{name}: {function}"
            if function == "np.load":
                assert keywords.get("allow_pickle") == "False", name


def test_only_config_files_are_executed():
    found = set()
    for name, tree in SOURCES.items():
        for function, call in _calls(tree):
            bare = function in ("exec", "eval", "compile", "__import__", "execfile")
            if bare or function.rpartition(".")[2] in ("import_module", "run_path", "run_module"):
                found.add((name, ast.unparse(call)))
    assert found == {
        ("moejax/overrides.py", "exec(compile(source, str(path), 'exec'), module.__dict__)"),
        ("moejax/overrides.py", "compile(source, str(path), 'exec')"),
        ("moejax/__init__.py", "import_module(_EXPORTS[name])"),  # names of this package
        ("moejax/tokenizer.py", "import_module(package)"),  # one of two
    }


# `supervise` starts the program of its command line, a sweep trainings and its own workers.
STARTERS = ("moejax/supervisor.py", "moejax/sweep.py", "moejax/sweep_worker.py")


def test_no_shell_and_no_other_programs():
    for name, tree in SOURCES.items():
        assert "yaml" not in _imported(tree) or name == "launch/kubernetes.py", "which writes it"
        for function, call in _calls(tree):
            assert function not in ("os.system", "os.popen", "yaml.load", "yaml.unsafe_load"), name
            assert not any(keyword.arg == "shell" for keyword in call.keywords), name
            if function.startswith("subprocess.") and name.startswith("moejax/"):
                assert name in STARTERS, name


def test_no_python_of_a_run_is_executed(tmp_path):
    """Whatever its files are called, and also where moejax is started in it."""
    workdir = open_workdir(tmp_path / "run", Config())
    (workdir / "checkpoints" / "1").mkdir(parents=True)
    hostile = f"open({str(tmp_path / 'hacked')!r}, 'w')\ndef get_config(arg): return {{}}\n"
    names = ["config.py", "sitecustomize.py", "json.py", "moejax.py", "rich.py", "checkpoints.py"]
    for folder in (workdir, workdir / "checkpoints", workdir / "checkpoints" / "1"):
        for name in (*names, "__init__.py", "conftest.py", "x.pth"):
            (folder / name).write_text(hostile)
    lines = [["fsck", "--workdir", "."], ["generate", "--workdir", "."]]
    code = f"from moejax.cli import main\nprint([main(line) for line in {lines!r}])"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        cwd=workdir,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.stdout.splitlines()[-1] == "[1, 2]", done.stderr
    assert "no prompt" in done.stderr
    assert not (tmp_path / "hacked").exists()


# What of the environment is read, and where. A new use belongs here once it was thought about.
READS = {
    "moejax/commands/common.py": {"os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')"},
    "moejax/cluster.py": {
        "find_cluster(os.environ)",
        "os.environ.get(BIND)",
        "_whole(os.environ, JOIN_SECONDS)",
        "JOIN_SECONDS in os.environ",
        "os.environ.get('GCE_METADATA_IP', 'metadata.google.internal')",
    },
    "moejax/eval_command.py": {
        "os.environ.setdefault('HF_HUB_OFFLINE', '1')",
        "os.environ.setdefault('HF_DATASETS_OFFLINE', '1')",
    },
    "moejax/environment.py": {"os.environ.get(name, '')"},  # for name in VARIABLES
    "moejax/lifeline.py": {"os.environ.get(BIND)"},
    "moejax/lm_eval_adapter.py": {"os.environ.setdefault('DISABLE_MULTIPROC', '1')"},
    "moejax/mesh.py": {"os.environ.get('JAX_PLATFORMS')"},
    "moejax/search.py": {"os.environ.get('XDG_CACHE_HOME')"},
    "moejax/sweep.py": {  # of its workers, and of a job of theirs
        "{**os.environ, STORAGE_VARIABLE: storage_url(study.workdir, options.storage)}",
        "{} if options.cpu_devices is not None else os.environ",
        "{**os.environ, STORAGE_VARIABLE: url}",
    },
    "moejax/sweep_study.py": {
        "os.environ.get(STORAGE_VARIABLE)",
        "STORAGE_VARIABLE in os.environ",
    },
    "moejax/sweep_worker.py": {"_environment(study.workdir, os.environ)"},  # of a trial
    "moejax/wandb_board.py": {"os.environ.get('WANDB_PROJECT', PROJECT)"},
    "moejax/supervisor.py": {"env=os.environ"},  # of the command that it starts
    "moejax/topology.py": {
        "os.environ.get(name)",
        "os.environ[name]",
        "os.environ |= ...",
        "os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')",
        "os.environ['XLA_FLAGS']",
        "os.environ.get('XLA_FLAGS', '')",
    },
}


def _uses(tree: ast.Module) -> set[str]:
    """Each use of `os.environ`, with what is right around it."""
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("os.environ", "os.getenv"):
            around = parents[node]
            while isinstance(around, ast.Attribute):
                around = parents[around]
            if isinstance(around, ast.AugAssign):
                found.add("os.environ |= ...")
            elif isinstance(around, ast.keyword):
                found.add(f"{around.arg}=os.environ")
            else:
                found.add(ast.unparse(around))
    return found


def test_the_environment_is_read_by_name():
    """And never shown or stored whole."""
    uses = {name: _uses(tree) for name, tree in SOURCES.items() if name.startswith("moejax/")}
    assert {name: found for name, found in uses.items() if found} == READS


def test_a_secret_of_the_environment_is_not_stored(monkeypatch):
    from moejax.config import MeshConfig
    from moejax.environment import VARIABLES, environment

    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "sesame")
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--known")
    stored = json.dumps(environment(Config(), MeshConfig(data=1)))
    assert "sesame" not in stored
    assert "--known" in stored
    assert VARIABLES == ("XLA_FLAGS", "LIBTPU_INIT_ARGS")


def test_a_name_of_a_domain_is_shown_as_text():
    name, out = "\x1b[2J[red]x[/nothing]", io.StringIO()
    domains = {name: {"loss": 1.0, "bits_per_byte": 1.0, "tokens": 3}}
    record = {"step": 1, "split": "eval", "loss": 1.0, "tokens": 3, "domains": domains}
    show_evaluation(record, Console(file=out, width=100))
    assert "\\x1b[2J[red]x[/nothing]" in out.getvalue()
    assert "\x1b" not in out.getvalue()
