"""Files that are whole or not there, also when the program is killed or the machine goes down while writing."""

import json
import os
from pathlib import Path


def write_json(path, content):
    """Write beside the file's name, flush, then rename: whoever reads it finds the old content or the new one."""
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=1))
    flush(partial)
    partial.replace(path)


def flush(path):
    """Wait until a file's, or a folder's, content is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
