"""A text that is on every machine with Python."""

from __future__ import annotations

import hashlib
import platform
from dataclasses import dataclass


@dataclass(frozen=True)
class Text:
    """A text and its fingerprint, so that a number measured on it can name what it was measured on.

    Attributes:
        name: where the text is from, with the version.
        sha256: hexadecimal digest of the text in UTF-8.
        text: the text.
    """

    name: str
    sha256: str
    text: str


def text_corpus() -> Text:
    """The language reference behind Python's ``help()``, about 460 kB of English and code.

    The text differs a little between Python versions; the digest tells them apart.
    """
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[title].strip() for title in sorted(topics))
    version = ".".join(platform.python_version_tuple()[:2])
    return Text(f"pydoc_data.topics of Python {version}", hashlib.sha256(text.encode()).hexdigest(), text)
