# SPDX-License-Identifier: Apache-2.0
"""The terminal that we print to: its width, whether it has colours, and which characters it can show."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, TextIO

from rich.console import Console
from rich.text import Text

# Narrower than this, lines are wrapped by the terminal anyhow; wider, the eye loses the row.
MIN_WIDTH: Final = 60
MAX_WIDTH: Final = 200
# A pipe has no width: wide enough that no name or sentence is cut on its way into grep.
PIPE_WIDTH: Final = 200


@dataclass(frozen=True)
class Glyphs:
    """Characters for bars and marks. Each pair of neighbours in a bar differs without colour."""

    resident: str
    evicted: str
    empty: str
    promotion: str
    bullet: str
    arrow: str
    ellipsis: str
    spark: str  # from lowest to highest


UNICODE: Final = Glyphs("█", "▒", "·", "■", "·", "→", "…", "▁▂▃▄▅▆▇█")
ASCII: Final = Glyphs("#", "+", ".", "=", "-", "->", "~", "._-=+*#@")


@dataclass(frozen=True)
class Screen:
    """stdout and stderr as rich consoles, and what may be drawn there."""

    out: Console
    err: Console
    glyphs: Glyphs

    @property
    def width(self) -> int:
        return self.out.width

    @property
    def is_terminal(self) -> bool:
        return self.out.is_terminal

    def text(self, content: str, style: str = "") -> Text:
        """Text that is never taken for markup."""
        return Text(content, style=style)


def make_screen(
    *,
    colours: bool = True,
    stdout: TextIO | None = None,
    stderr: TextIO | None = None,
    environ: Mapping[str, str] | None = None,
    width: int | None = None,
) -> Screen:
    """Consoles for the given streams (the process's own when None)."""
    environ = os.environ if environ is None else environ
    out, err = stdout or sys.stdout, stderr or sys.stderr
    for stream in (out, err):
        # A name that this locale cannot show must not end the command half-way through a table.
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="replace")
    plain = not colours or "NO_COLOR" in environ
    return Screen(
        out=_console(out, plain, environ, width),
        err=_console(err, plain, environ, width),
        glyphs=UNICODE if can_show_unicode(out, environ) else ASCII,
    )


def can_show_unicode(stream: TextIO, environ: Mapping[str, str]) -> bool:
    """Whether block characters reach the reader. An explicit C or POSIX locale counts as a no, although Python
    writes UTF-8 there: the terminal was told otherwise."""
    locale = environ.get("LC_ALL") or environ.get("LC_CTYPE") or environ.get("LANG") or ""
    if locale in ("C", "POSIX"):
        return False
    try:
        "█▒■→…".encode(getattr(stream, "encoding", None) or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def _console(stream: TextIO, plain: bool, environ: Mapping[str, str], width: int | None) -> Console:
    terminal = stream.isatty()
    asked = width
    if asked is None and environ.get("COLUMNS", "").isdigit():
        asked = int(environ["COLUMNS"])
    if asked is None and terminal:
        try:
            asked = os.get_terminal_size(stream.fileno()).columns or 80
        except OSError:
            asked = 80
    return Console(
        file=stream,
        width=min(MAX_WIDTH, max(MIN_WIDTH, asked if asked is not None else PIPE_WIDTH)),
        color_system=None if plain or not terminal or environ.get("TERM") == "dumb" else "auto",
        force_terminal=terminal,
        highlight=False,
        markup=False,
        emoji=False,
        soft_wrap=False,
    )
