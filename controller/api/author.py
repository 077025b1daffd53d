# SPDX-License-Identifier: Apache-2.0
"""Who asked for a change, as far as that can be known without credentials."""

from __future__ import annotations

from urllib.parse import unquote

from frostline.controller.api.status import Context, bad_request

USER_KEY = "frostline-user"
MAX_AUTHOR = 64
MAX_TEXT = 1024


def author_of(context: Context) -> str:
    """The name that the caller gives itself in the metadata, with where it called from. A claim, not a proof."""
    metadata = dict(context.invocation_metadata() or ())
    claimed = metadata.get(USER_KEY, "")
    name = claimed.decode("utf-8", "replace") if isinstance(claimed, bytes) else claimed
    name = "".join(char for char in name if char.isprintable())[:MAX_AUTHOR]
    peer = unquote(context.peer() or "").strip(":") or "unknown"
    where = "unix" if peer.startswith("unix") else peer
    return f"{name} ({where})" if name else where


def checked_text(field: str, text: str) -> str:
    """A comment or reason given by an operator; INVALID_ARGUMENT when it would not fit a line of a log."""
    if len(text) > MAX_TEXT:
        raise bad_request(f"{field} is too long", [(field, f"{len(text)} characters; at most {MAX_TEXT}")])
    return "".join(char if char.isprintable() else " " for char in text)
