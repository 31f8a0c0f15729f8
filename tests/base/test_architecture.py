"""The house stands as designed: floors, forbidden doors, one owner for clocks, hardware and randomness.

Every test lists all violations as file:line, so that one run shows everything there is to mend.
"""

import ast
import functools
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
FLOORS = {  # the longest prefix of a module's name decides; a module may import any lower floor and its own
    "kernels": 0,
    "modules": 0,
    **dict.fromkeys(
        ("modules.config", "modules.errors", "modules.quiet", "modules.ranges", "modules.rules", "modules.runtime"), 1
    ),
    **dict.fromkeys(
        ("modules.settings", "modules.records", "modules.probes", "modules.termination", "modules.phases"), 1
    ),
    **dict.fromkeys(("modules.state", "modules.optim", "modules.ema", "modules.meter", "modules.memory"), 2),
    **dict.fromkeys(("modules.workdir", "modules.console"), 2),
    "modules.data": 3,
    "modules.diffusion": 4,
    "modules.learning": 4,
    "modules.evaluation": 5,
    "modules.training": 6,
    "modules.commands": 7,
    "trainer": 8,
}
FORBIDDEN = (  # importer, imported
    ("modules.diffusion", "modules.learning"),
    ("modules.learning", "modules.diffusion"),
    ("modules.evaluation", "modules.diffusion"),
    ("modules.evaluation", "modules.learning"),
)
MAY_PRINT = ("trainer", "modules.commands", "modules.training")
CLOCKS = {f"time.{name}{ns}" for name in ("time", "perf_counter", "monotonic", "process_time") for ns in ("", "_ns")}
CLOCKS |= {"datetime.datetime.now", "datetime.datetime.utcnow", "datetime.datetime.today", "datetime.date.today"}
HARDWARE = {
    *(f"torch.cuda.{name}" for name in ("is_available", "device_count", "get_device_name", "get_device_capability")),
    *(f"torch.cuda.{name}" for name in ("get_device_properties", "is_bf16_supported", "get_arch_list")),
    *("torch.backends.mps.is_available", "torch.version.cuda", "torch.version.hip", "os.cpu_count", "platform.system"),
    *(
        "importlib.util.find_spec",
        "importlib.metadata.version",
        "shutil.which",
        "torch.ops.mkldnn._is_mkldnn_bf16_supported",
        "torch.cpu._init_amx",
    ),
}
ASKS_HARDWARE = ("kernels.backend", "modules.runtime", "modules.probes")
DRAWS = {f"torch.{name}" for name in ("rand", "randn", "randint", "randperm", "bernoulli", "normal", "multinomial")}
UNSEEDABLE = {"torch.rand_like", "torch.randn_like", "torch.randint_like", "torch.poisson"}
DRAWS_IN_PLACE = {"normal_", "uniform_", "random_", "bernoulli_", "exponential_", "log_normal_", "cauchy_"}
GLOBAL_STATE = {"torch.manual_seed", "torch.seed", "torch.set_rng_state", "torch.random.manual_seed"}
GLOBAL_STATE |= {"torch.cuda.manual_seed", "torch.cuda.manual_seed_all", "torch.random.seed", "torch.default_generator"}
SEEDS = (
    "modules.runtime"  # sets torch's generator to a named stream where a library initializes weights, and puts it back
)
IN_THE_LOOP = {  # what generates and mixes in every step: tensors on the device, no way through the host's libraries
    *(f"modules.diffusion.{name}" for name in ("slots", "tick", "gate", "generator")),
    *(f"modules.data.{name}" for name in ("reservoir", "mixer")),
}
HOST_IMAGES = {"PIL", "numpy"}
UNPICKLE = {"torch.load", "torch.save", "yaml.load", "yaml.full_load", "yaml.unsafe_load", "yaml.load_all"}
PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
LONGEST_FILE = 400


class Source:
    """A parsed file: its module name, tree, and what each local name stands for."""

    def __init__(self, path: Path):
        self.path = path.relative_to(ROOT)
        parts = self.path.with_suffix("").parts
        self.name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        self.text = path.read_text()
        self.tree = ast.parse(self.text)
        self.imports: list[tuple[int, str]] = []  # (line, module or module.name) anywhere in the file
        self.names: dict[str, str] = {}  # local name -> full dotted name
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    self.imports.append((node.lineno, alias.name))
                    full = alias.name if alias.asname else alias.name.split(".")[0]
                    self.names[alias.asname or full] = full
            elif isinstance(node, ast.ImportFrom):
                base = self._base(node)
                for alias in node.names:
                    self.imports.append((node.lineno, f"{base}.{alias.name}"))
                    self.names[alias.asname or alias.name] = f"{base}.{alias.name}"

    def dotted(self, node: ast.AST) -> str:
        """The full name of an expression such as torch.cuda.is_available, imports resolved; "" for any other."""
        if isinstance(node, ast.Name):
            return self.names.get(node.id, node.id)
        if isinstance(node, ast.Attribute):
            base = self.dotted(node.value)
            return f"{base}.{node.attr}" if base else ""
        return ""

    def uses(self, names: set[str]) -> list[str]:
        """file:line of every mention of one of these full names."""
        found = {
            (node.lineno, self.dotted(node))
            for node in ast.walk(self.tree)
            if isinstance(node, ast.Attribute | ast.Name) and self.dotted(node) in names
        }
        return [f"{self.path}:{line} {name}" for line, name in sorted(found)]

    def at(self, node: ast.AST, text: str) -> str:
        return f"{self.path}:{node.lineno} {text}"

    def is_below(self, *prefixes: str) -> bool:
        return any(self.name == prefix or self.name.startswith(prefix + ".") for prefix in prefixes)

    def _base(self, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        package = self.name.split(".") if self.path.name == "__init__.py" else self.name.split(".")[:-1]
        return ".".join([*package[: len(package) - node.level + 1], *filter(None, [node.module])])


@functools.cache
def sources(*folders: str) -> tuple[Source, ...]:
    """Every Python file of the program, or of the folders named."""
    paths = [p for name in folders or ("kernels", "modules") for p in sorted((ROOT / name).rglob("*.py"))]
    return tuple(Source(path) for path in (paths if folders else [ROOT / "trainer.py", *paths]))


def floor_of(module: str) -> int | None:
    """The floor of a module or of a name in it; None outside this project."""
    parts = module.split(".")
    for end in range(len(parts), 0, -1):
        if (prefix := ".".join(parts[:end])) in FLOORS:
            return FLOORS[prefix]
    return None


def imports_of(source: Source, packages: set[str]) -> list[tuple[int, str]]:
    """(line, name) of every import from one of these packages."""
    return [(line, name) for line, name in source.imports if name.split(".")[0] in packages]


def report(violations: list[str]) -> None:
    assert not violations, "\n" + "\n".join(violations)


def test_every_module_has_a_floor():
    stray = [str(s.path) for s in sources() if s.name.startswith("modules.") and floor_of(s.name) == 0]
    report([f"{path}: on no floor; name it in FLOORS" for path in stray])


def test_imports_go_down():
    report([
        f"{s.path}:{line} floor {floor_of(s.name)} imports {name} of floor {floor_of(name)}"
        for s in sources()
        for line, name in s.imports
        if (floor_of(name) or 0) > floor_of(s.name)
    ])  # fmt: skip


def test_rooms_that_must_not_know_each_other():
    report([
        f"{s.path}:{line} {importer} imports {name}"
        for s in sources()
        for importer, imported in FORBIDDEN
        if s.is_below(importer)
        for line, name in s.imports
        if name == imported or name.startswith(imported + ".")
    ])  # fmt: skip


def test_only_trainer_commands_and_training_know_the_console():
    report([
        f"{s.path}:{line} imports the console; take a progress callback"
        for s in sources()
        if not s.is_below(*MAY_PRINT)
        for line, name in s.imports
        if name.startswith("modules.console")
    ])  # fmt: skip


def test_only_trainer_and_console_print():
    report([use for s in sources() if not s.is_below("trainer", "modules.console") for use in s.uses({"print"})])


def test_nothing_imports_tests_or_benchmarks():
    report([
        f"{s.path}:{line} imports {name}"
        for s in sources()
        for line, name in s.imports
        if name.split(".")[0] in ("tests", "benchmarks")
    ])  # fmt: skip


def test_only_the_meter_reads_clocks():
    report([use for s in sources() if not s.is_below("modules.meter") for use in s.uses(CLOCKS)])


def test_only_backend_and_runtime_ask_what_there_is():
    report([use for s in sources() if not s.is_below(*ASKS_HARDWARE) for use in s.uses(HARDWARE)])


def test_nothing_draws_from_a_global_generator():
    """Draws name their generator; nothing but initialization touches torch's own, and nothing uses random or numpy's."""
    found = []
    for s in sources():
        found += s.uses(UNSEEDABLE) + ([] if s.name == SEEDS else s.uses(GLOBAL_STATE))
        found += [f"{s.path}:{line} imports {n}" for line, n in s.imports if n.split(".")[0] == "random"]
        for node in ast.walk(s.tree):
            if isinstance(node, ast.Attribute) and s.dotted(node).startswith(("numpy.random", "np.random")):
                found.append(s.at(node, "numpy.random"))
            if not isinstance(node, ast.Call):
                continue
            in_place = isinstance(node.func, ast.Attribute) and node.func.attr in DRAWS_IN_PLACE
            if (s.dotted(node.func) in DRAWS or in_place) and not any(k.arg == "generator" for k in node.keywords):
                found.append(s.at(node, f"{ast.unparse(node.func)} without a generator"))
    report(found)


def test_the_loop_takes_no_image_through_the_host():
    loop = [s for s in sources() if s.name in IN_THE_LOOP]
    assert {s.name for s in loop} == IN_THE_LOOP, "a module of the loop has moved; name it in IN_THE_LOOP"
    report([f"{s.path}:{line} imports {name}" for s in loop for line, name in imports_of(s, HOST_IMAGES)])


def test_nothing_is_unpickled():
    found = []
    for s in sources() + sources("benchmarks"):
        found += s.uses(UNPICKLE)
        found += [f"{s.path}:{line} imports {n}" for line, n in s.imports if n.split(".")[0] in PICKLES]
    report(found)


def test_nothing_is_swallowed():
    """No bare except, and a broad one hands its exception on (a reason, a message), never pass or continue."""
    found = []
    for s in sources() + sources("benchmarks", "tests"):
        for node in ast.walk(s.tree):
            if isinstance(node, ast.Call) and s.dotted(node.func) == "contextlib.suppress":
                broad = {"Exception", "BaseException"} & {s.dotted(argument) for argument in node.args}
                found += [s.at(node, f"suppress({', '.join(broad)})")] if broad else []
            if not isinstance(node, ast.ExceptHandler):
                continue
            if node.type is None:
                found.append(s.at(node, "bare except"))
                continue
            caught = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
            broad = {"Exception", "BaseException"} & {s.dotted(kind) for kind in caught}
            used = node.name and any(
                isinstance(n, ast.Name) and n.id == node.name for b in node.body for n in ast.walk(b)
            )
            if broad and not used and not any(isinstance(n, ast.Raise) for b in node.body for n in ast.walk(b)):
                found.append(s.at(node, "a broad except that drops its exception"))
    report(found)


def test_nothing_is_left_undone():
    found = []
    for s in sources() + sources("benchmarks"):
        lines = enumerate(s.text.splitlines(), 1)
        found += [
            f"{s.path}:{n} {word}" for n, line in lines for word in ("TODO", "FIXME", "breakpoint(") if word in line
        ]
        raised = [node.exc for node in ast.walk(s.tree) if isinstance(node, ast.Raise) and node.exc]
        kinds = [(exc, s.dotted(exc.func if isinstance(exc, ast.Call) else exc)) for exc in raised]
        found += [s.at(exc, "raises NotImplementedError") for exc, kind in kinds if kind == "NotImplementedError"]
    report(found)


def test_files_are_short():
    report([
        f"{s.path}: {len(lines)} lines, at most {LONGEST_FILE}"
        for s in sources() + sources("benchmarks", "tests")
        if len(lines := s.text.splitlines()) > LONGEST_FILE
    ])  # fmt: skip


def test_public_names_say_what_they_are():
    """A docstring for every module, public class, public function, and public method that its class does not explain.

    Exempt are overridden protocols (state_dict, forward, ...) and methods of at most 3 statements, whose name is it.
    """
    found = []
    for s in sources() + sources("benchmarks"):
        if s.path.name != "__init__.py" and not ast.get_docstring(s.tree):
            found.append(f"{s.path}:1 module without docstring")
        for node in s.tree.body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
                if not ast.get_docstring(node):
                    found.append(s.at(node, f"{node.name} without docstring"))
                if isinstance(node, ast.ClassDef):
                    found += [s.at(m, f"{node.name}.{m.name} without docstring") for m in node.body if _unexplained(m)]
    report(found)


def _unexplained(node: ast.AST) -> bool:
    if not isinstance(node, ast.FunctionDef) or node.name.startswith("_") or ast.get_docstring(node):
        return False
    return node.name not in ("state_dict", "load_state_dict", "forward", "backward") and len(node.body) > 3


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_config_loads(path):
    from modules.config import Config, PipelineConfig
    from modules.settings import load_config

    schema = PipelineConfig if "training" in yaml.safe_load(path.read_text()) else Config
    config, _ = load_config(path, schema=schema)
    assert config.run.name == path.stem


def test_the_checks_see_what_they_are_for(tmp_path, monkeypatch):
    """Each rule finds a planted violation: a check that cannot fail would hold nothing."""
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    path = tmp_path / "modules" / "data" / "planted.py"
    path.parent.mkdir(parents=True)
    path.write_text(
        "import time\nfrom time import perf_counter as now\nfrom .. import console\nimport torch as t\n"
        "from modules.diffusion.slots import Slots\nimport numpy.linalg\nfrom PIL import Image\nnow()\nt.cuda.is_available()\nt.randn(3)\nt.load('x')\n"
    )
    planted = Source(path)
    assert planted.name == "modules.data.planted"
    assert [name for _, name in planted.imports] == [
        "time", "time.perf_counter", "modules.console", "torch", "modules.diffusion.slots.Slots",
        "numpy.linalg", "PIL.Image",
    ]  # fmt: skip
    assert planted.uses(CLOCKS) == ["modules/data/planted.py:8 time.perf_counter"]
    assert planted.uses(HARDWARE) == ["modules/data/planted.py:9 torch.cuda.is_available"]
    assert planted.uses(UNPICKLE) == ["modules/data/planted.py:11 torch.load"]
    assert planted.uses(DRAWS) == ["modules/data/planted.py:10 torch.randn"]
    assert imports_of(planted, HOST_IMAGES) == [(6, "numpy.linalg"), (7, "PIL.Image")]
    assert floor_of("modules.diffusion.slots.Slots") == 4 > floor_of(planted.name) == 3
