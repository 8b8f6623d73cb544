"""What somebody probably meant who wrote a name that there is not."""

from __future__ import annotations

import difflib
from collections.abc import Collection


def nearest(word: str, known: Collection[str]) -> str:
    """The one of `known`, of which there is at least one, that `word` begins, else the most similar."""
    begun = [name for name in known if word and name.startswith(word)]
    return difflib.get_close_matches(word, begun or list(known), n=1, cutoff=0.0)[0]
