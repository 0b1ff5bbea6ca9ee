"""Scripts that write the pages of docs still load: a renamed function would break them unseen."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
EXTRAS = {"dashboard"}
"""Need playwright."""


def test_every_script_loads() -> None:
    names = [path.stem for path in sorted((ROOT / "benchmarks").glob("*.py")) if path.stem not in EXTRAS]
    load = f"import sys; sys.path.insert(0, {str(ROOT / 'benchmarks')!r}); import " + ", ".join(names)
    done = subprocess.run([sys.executable, "-c", load], capture_output=True, text=True, check=False)
    assert len(names) > 30 and done.returncode == 0, done.stderr


def test_pages_name_scripts_that_exist() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    words = [word.strip("`.,)") for page in pages for word in page.read_text("utf-8").split()]
    scripts = {word for word in words if word.startswith("benchmarks/") and word.endswith(".py")}
    assert len(scripts) > 10 and not [name for name in scripts if not (ROOT / name).is_file()]
