"""The house has floors: imports only go down, and the core starts without the heavy libraries."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import planner

FLOORS = [
    {"units", "errors", "cores"},
    {"textfile"},
    {"tomlfile", "arrayfile"},
    {"calibration"},
    {"model", "hardware", "workload", "engine", "engines"},
    {"layout", "choices"},
    {"speculation", "overlap"},
    {"tactics"},
    {"routing"},
    {"placement", "capacity", "residency"},
    {"loads"},
    {"experts"},
    {"memory", "enumeration"},
    {"inventory"},
    {"measurements"},
    {"offload"},
    {"profiles"},
    {"steptime"},
    {"routedcost"},
    {"cost"},
    {"tacticcost"},
    {"enginespec"},
    {"hostlink", "frontend", "failures", "clock", "decodebatch"},
    {"prefixcache", "affinity", "scheduler", "records"},
    {"pipeline", "prefixhits", "routers", "coasting", "decodeattention"},
    {"coverage", "timer", "steady", "small", "steplog"},
    {"ubatch", "balancer", "lockstep", "retraction"},
    {"epochs", "expertsteps", "tactictimer", "speculativerank"},
    {"ranks", "sharing", "group"},
    {"metrics", "engineprocess"},
    {"simulation"},
    {"incidents"},
    {"outages"},
    {"economics"},
    {"deployment", "variants"},
    {"balance", "outside", "reliability", "validation", "launch", "sensitivity"},
    {"fleet"},
    {"search"},
    {"fit"},
    {"sizing"},
    {"remedies"},
    {"recommend"},
    {"disaggregation"},
    {"facts", "figures", "decisionfigures", "compare"},
    {"tables"},
    {"experttext", "failuretext", "fleettext", "afdtext", "comparetext", "launchtext", "moneytext"},
    {"report", "options", "text"},
    {"pooltext"},
    {"runfolder", "sweep"},
    {"whatif"},
    {"cli", "__main__"},
]
LEVEL = {module: level for level, modules in enumerate(FLOORS) for module in modules}
ROOT = Path(planner.__file__).parent


def _noun(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def _imported(tree: ast.AST) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "planner":
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("planner.")}
    return found - {"__version__"}


def test_every_module_has_a_floor() -> None:
    assert {_noun(p) for p in ROOT.rglob("*.py")} - {"__init__"} == set(LEVEL)


def test_imports_only_go_down() -> None:
    wrong = []
    for path in ROOT.rglob("*.py"):
        noun = _noun(path)
        if noun == "__init__":
            continue
        for target in _imported(ast.parse(path.read_text())) - {noun}:
            if LEVEL[target] >= LEVEL[noun] and not LEVEL[target] == LEVEL[noun] > 10:
                wrong.append(f"{path.relative_to(ROOT)} imports {target}")
    assert not wrong, wrong


def test_no_module_is_too_long() -> None:
    long = {str(p.relative_to(ROOT)): n for p in ROOT.rglob("*.py") if (n := len(p.read_text().splitlines())) > 400}
    assert not long, long


def test_planner_never_imports_torch_or_streamlit() -> None:
    for path in ROOT.rglob("*.py"):
        names = {
            name.split(".")[0]
            for node in ast.walk(ast.parse(path.read_text()))
            for name in (
                [a.name for a in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else []
            )
        }
        assert not names & {"torch", "streamlit"}, path


def test_importing_planner_and_its_command_line_is_light() -> None:
    code = "import sys, planner, planner.cli; print(*sys.modules)"
    modules = set(
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    )
    heavy = {"numpy", "pandas", "matplotlib", "simpy", "pydantic", "torch", "streamlit", "pyarrow"}
    assert not modules & heavy, modules & heavy
