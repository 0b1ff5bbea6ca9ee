"""The file of predictions: the columns of the points and what was predicted for them."""

from __future__ import annotations

import csv
import io
import math
import os
import tempfile
from pathlib import Path

from planner.errors import InputError
from planner.validation.harness import Validation
from planner.validation.intervals import bounds
from planner.validation.points import METRICS
from planner.validation.replay import Prediction


def check_out(out: Path, points: Path) -> None:
    """InputError unless `out` can be written and is not the points file itself: better now than after the work."""
    if out.is_dir():
        raise InputError(f"--out {out}: is a folder. Give a file such as {out / 'predictions.csv'}.")
    if out.exists() and points.exists() and out.samefile(points):
        raise InputError(f"--out {out}: is the points file. Give another one.")
    if not out.resolve().parent.is_dir():
        raise InputError(f"--out {out}: {out.resolve().parent} does not exist. Create it first.")
    try:
        tempfile.TemporaryFile(dir=out.resolve().parent).close()
    except OSError as error:
        raise InputError(f"--out {out}: cannot be written ({error.strerror}). Choose another place.") from error


def predictions_csv(validation: Validation) -> str:
    """CSV of the input columns, `pred_<metric>` with `_low` and `_high`, `status` and `measured_share`.

    Columns of the input that have one of these names are replaced.
    """
    names = [name for metric in METRICS for name in _names(metric)]
    added = [*(f"pred_{metric}" for metric in METRICS), *names, "status", "measured_share"]
    kept = [column for column in validation.source.columns if column not in added]
    text = io.StringIO()
    writer = csv.DictWriter(text, [*kept, *added], lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    for row, prediction in validation.pairs:
        writer.writerow(row.fields | _predicted(prediction))
    return text.getvalue()


def _names(metric: str) -> tuple[str, str]:
    return f"pred_{metric}_low", f"pred_{metric}_high"


def _predicted(prediction: Prediction) -> dict[str, str]:
    fields = {"status": prediction.status}
    fields["measured_share"] = f"{prediction.measured_share:.4f}" if prediction.is_ok else ""
    for metric, value in zip(METRICS, prediction.values, strict=True):
        low, high = bounds(metric, prediction)
        fields[f"pred_{metric}"] = _shown(value)
        fields |= dict(zip(_names(metric), map(_shown, (low, high)), strict=True))
    return fields


def _shown(value: float) -> str:
    return f"{value:.6g}" if math.isfinite(value) else ""


def write_predictions(validation: Validation, out: Path) -> None:
    """Write `predictions_csv` to `out`, whole or not at all. InputError when it cannot be written."""
    target = out.resolve()
    temporary = None
    try:
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", newline="", dir=target.parent, prefix=f".{target.name}-", delete=False
        ) as file:
            temporary = Path(file.name)
            file.write(predictions_csv(validation))
        # Temporary files are private; predictions are for others to read. The mask can only be read by setting it.
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)
        temporary.replace(target)
    except OSError as error:
        raise InputError(f"--out {out}: cannot be written ({error.strerror}). Choose another place.") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
