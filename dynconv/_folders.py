"""Where dynconv keeps what it has measured and compiled."""

from __future__ import annotations

import os
from pathlib import Path


def user_cache() -> Path | None:
    """`dynconv` in the user's cache folder; None for a user without a home."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dynconv"
    except RuntimeError:
        return None
