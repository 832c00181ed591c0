"""Who imports whom, who knows a task by name, and what an installed package holds: read from the sources."""

import ast
import re
import sys
from collections import Counter
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from wan.tasks import TASKS

ROOT = Path(__file__).parent.parent

# From the bottom up. A module may import from its own layer and from those before it.
LAYERS = [
    ["leanwan.errors", "leanwan.lazy", "leanwan.methods"],
    [
        "leanwan.accelerator",
        "leanwan.encoder_layers",
        "leanwan.flags",
        "leanwan.read_ahead",
        "leanwan.record",
    ],
    ["leanwan.budget"],
    ["leanwan.streaming", "leanwan.vae"],
    ["leanwan.residency"],
    ["leanwan.dit"],
    ["leanwan.activations", "leanwan.options"],
    ["leanwan.placement"],
    ["leanwan.foreign"],
    ["leanwan"],
    ["wan.configs"],
    ["wan.tasks"],
    ["wan.utils"],
    ["wan.weights"],
    ["wan.modules", "wan.sampling"],
    ["wan.planning"],
    ["wan.distributed"],
    ["wan.random_models", "wan.kernels"],
    ["wan.denoising"],
    ["wan.pipeline"],
    ["wan.text2video", "wan.image2video", "wan.first_last_frame2video", "wan.vace"],
    ["wan.trained_toys"],
    ["wan"],  # names the pipelines
    ["wan.run"],
    ["wan.cli", "wan.__main__", "wan.web"],
    ["toys"],
    ["generate", "benchmarks"],
]
KINDS = sorted({name.split("-")[0] for name in TASKS})
# Who may name a kind: the tables, the toys, the networks, whose config.json says of which kind they are, and the
# package itself, for its module of that name.
NAMING = [
    "wan/__init__.py",
    "wan/configs/",
    "wan/modules/model.py",
    "wan/modules/vace_model.py",
    "wan/tasks.py",
    "wan/random_models.py",
    "wan/trained_toys/",
]


def sources(*folders):
    files = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    return {name_of(path): path for path in files}


def name_of(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports_of(name, tree, modules, is_package):
    """The modules that a syntax tree imports anywhere, also in functions, under their full names."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = name.split(".")[: len(name.split(".")) - node.level + is_package] if node.level else []
            base = ".".join([*package, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                found.add(inner if inner in modules else base)
    return found - {name}


def graph(*folders):
    modules = sources(*folders)
    return {
        name: imports_of(name, ast.parse(path.read_text("utf-8")), modules, path.name == "__init__.py")
        for name, path in modules.items()
    }


def layer_of(module):
    """The number of a module's layer: the longest name that it is, or is inside of, decides."""
    owners = [
        (len(name), number)
        for number, names in enumerate(LAYERS)
        for name in names
        if module == name or (name not in ("leanwan", "wan") and module.startswith(f"{name}."))
    ]
    return max(owners)[1] if owners else None


def upward(edges):
    return [
        (name, target)
        for name, targets in edges.items()
        for target in targets
        if layer_of(target) is not None and layer_of(name) < layer_of(target)
    ]


def test_every_module_has_a_layer():
    assert [name for name in sources("leanwan", "wan", "toys", "benchmarks") if layer_of(name) is None] == []


def check_no_circle(edges):
    """Raises CycleError, which names the modules, if some import each other."""
    TopologicalSorter({name: targets & edges.keys() for name, targets in edges.items()}).prepare()


def test_no_circle():
    edges = graph("leanwan", "wan", "toys", "upstream_driver", "virtual_gpu")
    check_no_circle(edges)
    edges["wan.modules.attention"] |= {"wan.modules.model"}
    with pytest.raises(CycleError, match="wan.modules.attention"):
        check_no_circle(edges)


def test_every_name_is_of_one_thing():
    files = sources("leanwan", "wan", "toys", "benchmarks", "upstream_driver", "virtual_gpu")
    modules = Counter(path.stem for path in files.values())
    classes = Counter(
        node.name
        for path in files.values()
        for node in ast.parse(path.read_text("utf-8")).body
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    )
    for name in ("__init__", "__main__"):
        del modules[name]
    assert [name for name, count in (modules + classes).items() if count > 1] == []


def test_no_upward_import():
    edges = graph("leanwan", "wan", "toys", "benchmarks")
    edges["generate"] = imports_of("generate", ast.parse((ROOT / "generate.py").read_text()), edges, False)
    assert upward(edges) == []


def test_the_simulator_and_the_drivers_stand_alone():
    theirs = {"tests", "benchmarks", "generate", "goldens", "conftest"}
    apart = {"virtual_gpu", "stand_in_driver"}
    for name, targets in graph("virtual_gpu", "upstream_driver", "stand_in_driver").items():
        own = name.split(".")[0]
        forbidden = theirs | (
            (apart | {"wan", "upstream_driver"}) - {own} if own in apart else {"stand_in_driver"}
        )
        assert {target.split(".")[0] for target in targets} & forbidden == set(), name


def test_the_library_needs_torch_einops_and_psutil_alone():
    allowed = {"leanwan", "torch", "einops", "psutil", *sys.stdlib_module_names}
    for name, targets in graph("leanwan").items():
        assert {target.split(".")[0] for target in targets} <= allowed, name


def test_nothing_imports_the_stand_in_driver():
    for name, targets in graph(
        "leanwan", "wan", "toys", "benchmarks", "virtual_gpu", "upstream_driver"
    ).items():
        assert "stand_in_driver" not in {target.split(".")[0] for target in targets}, name


@pytest.mark.parametrize(
    "name, text, expected",
    [
        ("wan.planning.plan", "from ..run import run", [("wan.planning.plan", "wan.run")]),
        (
            "wan.utils.x",
            "def f():\n    from wan.modules.vae import VAE",
            [("wan.utils.x", "wan.modules.vae")],
        ),
        ("wan.pipeline", "from .vace import WanVace", [("wan.pipeline", "wan.vace")]),
        ("wan.pipeline", "from .modules import model", []),
    ],
)
def test_an_upward_import_is_seen(name, text, expected):
    modules = sources("wan")
    assert upward({name: imports_of(name, ast.parse(text), modules, False)}) == expected


def literals(tree):
    """Lines and texts of the strings of a syntax tree, docstrings apart."""
    docs = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
            yield node.lineno, node.value


@pytest.mark.parametrize("kind", KINDS)
def test_a_task_is_named_in_the_table_alone(kind):
    pipelines = {
        f"wan/{task.pipeline.split(':')[0]}.py" for name, task in TASKS.items() if name.split("-")[0] == kind
    }
    found = []
    for path in [*sources("wan").values(), ROOT / "generate.py"]:
        file = path.relative_to(ROOT).as_posix()
        if file in pipelines or file.startswith(tuple(NAMING)):
            continue
        for line, text in literals(ast.parse(path.read_text("utf-8"))):
            if re.search(rf"\b{kind}\b", text):
                found.append(f"{file}:{line}: {text}")
    assert found == []


def test_the_package_list_is_whole():
    tomllib = pytest.importorskip("tomllib")
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    there = {name_of(path) for top in ("leanwan", "wan") for path in (ROOT / top).rglob("__init__.py")}
    assert sorted(listed) == sorted(there | {"wan.examples"})
