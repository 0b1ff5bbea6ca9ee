"""Files of the package are read without pydantic, which is slow to load; here they pass the checks of a user's file."""

import subprocess
import sys
from importlib import resources
from pathlib import Path

import pytest

from planner import tomlfile
from planner.calibration import Calibrations, calibrations, shipped
from planner.engine import Engine, engine, versions
from planner.hardware import profile_path, system, systems
from planner.hardware.conversion import RATES
from planner.hardware.profile import Rates, read_profile


@pytest.mark.parametrize("name", systems())
def test_systems(name: str) -> None:
    assert repr(system(name)) == repr(read_profile(profile_path(name)))


def test_rates_have_the_formats_of_the_schema() -> None:
    assert tuple(Rates.model_fields) == RATES


@pytest.mark.parametrize("key", versions())
def test_engines(key: str) -> None:
    file = resources.files("planner.engines").joinpath(f"{key}.toml")
    tables, _ = tomlfile.split_sources(tomlfile.parse(file.read_text("utf-8"), key))
    assert repr(engine(key)) == repr(tomlfile.checked(Engine, tables, key))


def test_calibrations() -> None:
    file = resources.files("planner").joinpath("calibrations.toml")
    assert isinstance(shipped(), Calibrations)
    assert repr(shipped()) == repr(calibrations(str(file)))


def test_a_users_copy_is_checked(tmp_path: Path) -> None:
    text = profile_path("h200-sxm").read_text("utf-8").replace("[gpu]", "[gpu]\nwheels = 4", 1)
    (tmp_path / "mine.toml").write_text(text, "utf-8")
    with pytest.raises(tomlfile.InputError, match=r"gpu\.wheels: unknown key"):
        system(str(tmp_path / "mine.toml"))


@pytest.mark.parametrize("command", ["fit Qwen/Qwen3-8B --gpu h200-sxm", "describe Qwen/Qwen3-8B"])
def test_small_questions_do_not_load_pydantic(command: str) -> None:
    run = f"import sys\nfrom planner.cli import main\nsys.argv = {['moeplan', *command.split()]}\n"
    run += "try:\n    main()\nexcept SystemExit:\n    pass\nprint(sorted({m.split('.')[0] for m in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", run], capture_output=True, text=True, check=True)
    loaded = done.stdout.splitlines()[-1]
    assert "'numpy'" in loaded or command.startswith("describe")
    assert not [name for name in ("pydantic", "pandas", "matplotlib", "torch", "scipy") if f"'{name}'" in loaded]
