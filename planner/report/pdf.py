"""A report on paper: the HTML printed by WeasyPrint where it is installed, else by a Chromium on the PATH."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from planner.errors import InputError

_BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
_TIMEOUT_S = 120.0


def print_pdf(page: Path, path: Path) -> Path:
    """Print the HTML file `page` to `path`, whole or not at all.

    Raises InputError where nothing that prints is installed, or where it fails.
    """
    browser = next((found for name in _BROWSERS if (found := shutil.which(name))), None)
    with tempfile.TemporaryDirectory(prefix="moeplan-pdf-") as folder:
        part = Path(folder) / "report.pdf"
        if importlib.util.find_spec("weasyprint") is not None:
            _weasyprint(page, part)
        elif browser is not None:
            _chromium(browser, page, part, Path(folder) / "profile")
        else:
            raise InputError(
                f"--pdf: neither WeasyPrint nor Chromium is installed. `pip install weasyprint`, install chromium, or "
                f"print {page} from a browser."
            )
        try:
            shutil.move(part, path)
        except OSError as error:
            raise InputError(f"{path}: cannot be written ({error.strerror}). Choose another place.") from error
    return path


def _weasyprint(page: Path, path: Path) -> None:
    from weasyprint import HTML

    HTML(filename=str(page)).write_pdf(str(path))


def _chromium(browser: str, page: Path, path: Path, profile: Path) -> None:
    # The sandbox of Chromium refuses to run as root, as in most containers.
    rights = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
    flags = ["--headless=new", "--disable-gpu", "--disable-dev-shm-usage", "--no-pdf-header-footer"]
    where = [f"--user-data-dir={profile}", f"--print-to-pdf={path}", page.resolve().as_uri()]
    try:
        done = subprocess.run(
            [browser, *flags, *rights, *where], capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise InputError(f"--pdf: {browser} did not answer in {_TIMEOUT_S:.0f} s. Print {page} yourself.") from error
    if done.returncode or not path.is_file():
        said = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise InputError(f"--pdf: {browser} failed ({said[0]}). Print {page} from a browser.")
