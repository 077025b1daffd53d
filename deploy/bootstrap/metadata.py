# SPDX-License-Identifier: Apache-2.0
"""metadata.py PYPROJECT OUTPUT: writes what an editable install depends on, when it has changed.

The settings of linters and of pytest share the file with the metadata, and are no reason to install anew.
"""

import json
import sys
import tomllib
from pathlib import Path


def main() -> None:
    source, output = Path(sys.argv[1]), Path(sys.argv[2])
    with source.open("rb") as file:
        document = tomllib.load(file)
    relevant = {
        "build-system": document["build-system"],
        "project": document["project"],
        "scikit-build": document["tool"]["scikit-build"],
    }
    text = json.dumps(relevant, indent=1, sort_keys=True)
    if output.is_file() and output.read_text(encoding="utf-8") == text:
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
