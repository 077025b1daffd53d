# SPDX-License-Identifier: Apache-2.0
"""Print every pinned Python requirement of pyproject.toml, one a line: to build, to run and to develop."""

import sys
import tomllib
from pathlib import Path


def main() -> None:
    with Path(sys.argv[1]).open("rb") as file:
        document = tomllib.load(file)
    requirements = set(document["build-system"]["requires"])
    requirements.update(document["project"]["dependencies"])
    for extra in document["project"]["optional-dependencies"].values():
        requirements.update(extra)
    print("\n".join(sorted(requirements, key=str.lower)))


if __name__ == "__main__":
    main()
