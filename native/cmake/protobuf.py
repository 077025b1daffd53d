# SPDX-License-Identifier: Apache-2.0
"""Generate the typed package frostline.v1 from the .proto files."""

from __future__ import annotations

import argparse
import os
import sys
from importlib.resources import files
from pathlib import Path

from grpc_tools import protoc


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path, required=True, help="the folder that imports are relative to")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("protos", type=Path, nargs="*")
    arguments = parser.parse_args()
    root, output = arguments.root.resolve(), arguments.output
    package = output / "frostline" / "v1"
    package.mkdir(parents=True, exist_ok=True)
    (package / "__init__.py").write_text('"""Generated from proto/frostline/v1."""\n', encoding="utf-8")
    (package / "py.typed").touch()
    if not arguments.protos:
        return
    # protoc finds its mypy plug-ins beside this interpreter, whether or not its venv is activated.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    command = [
        "protoc",
        f"--proto_path={root}",
        f"--proto_path={files('grpc_tools') / '_proto'}",
        f"--python_out={output}",
        f"--mypy_out={output}",
        f"--grpc_python_out={output}",
        f"--mypy_grpc_out={output}",
        *(str(path.resolve().relative_to(root)) for path in arguments.protos),
    ]
    status = protoc.main(command)
    if status != 0:
        sys.exit(f"protoc failed with {status} on {len(arguments.protos)} files in {root}; its message is above")


if __name__ == "__main__":
    main()
