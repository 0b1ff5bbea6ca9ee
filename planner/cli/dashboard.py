"""The `dashboard` command: the what-if page in a browser, served from this machine."""

from __future__ import annotations

import importlib.util
import runpy
import sys
import tomllib
from pathlib import Path
from threading import Thread
from typing import Any

from planner.errors import InputError

_PACKAGE = Path(__file__).parents[1]
_MISSING = "the dashboard needs Streamlit, which is not installed: pip install 'moeplan[dashboard]'"


def dashboard(*, port: int = 8501, address: str = "127.0.0.1", no_browser: bool = False) -> None:
    """Open the what-if dashboard in a browser; stop it with Ctrl-C.

    Parameters
    ----------
    port
        Port to serve on.
    address
        Address to serve on; only this machine reaches the default. 0.0.0.0 lets others in: there is no login.
    no_browser
        Print the address only.
    """
    if importlib.util.find_spec("streamlit") is None:
        raise InputError(_MISSING)
    if not 1 <= port <= 65535:
        raise InputError(f"--port {port}: use 1 to 65535, such as 8501")
    settings = tomllib.loads(_shipped("config.toml").read_text(encoding="utf-8"))
    settings["server"] |= {"port": port, "address": address, "headless": no_browser}
    sys.argv = ["streamlit", "run", str(_shipped("app.py")), *_flags(settings)]
    Thread(target=_warm_up, daemon=True).start()
    runpy.run_module("streamlit", run_name="__main__", alter_sys=True)


def _shipped(name: str) -> Path:
    """A file of the dashboard, of the wheel or of the checkout."""
    installed = _PACKAGE / "whatif" / "page" / name
    checkout = _PACKAGE.parent / ("app.py" if name == "app.py" else f".streamlit/{name}")
    found = next((path for path in (installed, checkout) if path.is_file()), None)
    if found is None:
        raise InputError(f"{name} of the dashboard is missing from this installation. Install moeplan again.")
    return found


def _flags(settings: dict[str, dict[str, Any]]) -> list[str]:
    """Settings of a config.toml as options of `streamlit run`: they hold wherever the command is started."""
    return [
        f"--{section}.{name}={str(value).lower() if isinstance(value, bool) else value}"
        for section, values in settings.items()
        for name, value in values.items()
    ]


def _warm_up() -> None:
    """Answer the first screen while the browser starts."""
    from planner.whatif.analytic import answer
    from planner.whatif.scenario import Scenario

    answer(Scenario())
