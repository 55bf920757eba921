"""The files in a run's folder that others read: their names, and CSV files that survive a killed writer."""

import csv
import io
import json
from pathlib import Path

from common.files import written_whole

ENCODING = {"encoding": "utf-8", "errors": "surrogateescape"}  # folders' names are any bytes
# Numbers beside the trackers' files: the lines of the log, held-out losses, and scores of every validation video.
RUN_FILES = HISTORY_FILE, HELD_OUT_FILE, SCORES_FILE = "history.csv", "held_out.csv", "scores.csv"
CONTACT_SHEET = "contact_sheet.png"
AS_DEPLOYED = "-as-deployed"  # in the names of what a validation as deployed writes
CONFIG_FILE = "config.json"  # a list with command, settings and versions of every start, in the run's folder


def of_form(name, form):
    """A file's name with AS_DEPLOYED, or nothing, before its extension."""
    stem, dot, extension = name.partition(".")
    return f"{stem}{form}{dot}{extension}"


def validation_form(settings, deployed_first=False):
    """The form of validation to show, by the settings of a run's newest start: as trained ("") where it has both."""
    deployed = bool(settings.get("pcm_weights"))
    return AS_DEPLOYED if deployed and (deployed_first or not settings.get("validate_as_trained")) else ""


def read_starts(run_dir):
    """[{"command", "settings", "versions"}] of a run's starts, oldest first; [] where no config.json of ours lies.

    Other programs, the original scripts among them, have files of that name too.
    """
    path = Path(run_dir, CONFIG_FILE)
    try:
        starts = json.loads(path.read_bytes()) if path.is_file() else []
    except ValueError:
        return []
    ours = isinstance(starts, list) and all(is_start(start) for start in starts)
    return starts if ours else []


def is_start(entry):
    return isinstance(entry, dict) and "command" in entry and "logging_dir" in (entry.get("settings") or ())


def append_row(path, row):
    """Add a {column: value} to a CSV file, which gets its header with the first one; None is an empty field.

    A last row without a newline, of a process that was killed or a disk that was full, is dropped. A file that lacks a
    column, of an older version, gets it, empty in the rows that it has.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    content = path.read_bytes() if path.is_file() else b""
    content = content[: content.rfind(b"\n") + 1]
    columns = next(csv.reader(io.StringIO(content.decode(**ENCODING))), list(row))
    if not row.keys() <= set(columns):
        write_rows(path, [*read_table(path), row])
        return
    with open(path, "a", newline="", **ENCODING) as file:
        file.truncate(len(content))
        writer = csv.DictWriter(file, columns)
        if not content:
            writer.writeheader()
        writer.writerow(row)


def write_rows(path, rows):
    """A new CSV file of {column: value} rows, whole or not there; without rows there is none."""
    if not rows:
        path.unlink(missing_ok=True)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as partial, open(partial, "w", newline="", **ENCODING) as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows(rows)


def read_table(path):
    """[{column: text}] of such a file, [] where there is none.

    Rows that are not whole are left out: one is being written, or its process was killed.
    """
    content = Path(path).read_bytes().decode(**ENCODING) if Path(path).is_file() else ""
    rows = csv.DictReader(io.StringIO(content[: content.rfind("\n") + 1]))
    return [row for row in rows if None not in row and None not in row.values()]


def read_rows(path):
    """`read_table` of a run, in order of steps and, within a step, of videos' numbers; what a resumed run did again
    replaces what was done before."""
    rows = []
    for row in read_table(path):
        while rows and place(rows[-1]) >= place(row):
            rows.pop()
        rows.append(row)
    return rows


def place(row):
    return int(row["step"]), int(row.get("number", 0))
