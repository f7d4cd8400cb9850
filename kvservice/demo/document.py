"""The document of the demonstration, and the sentence that is hidden in it. Pure text.

`document.txt` is real prose in the public domain; `document.license.txt` says where it comes from.
"""

from __future__ import annotations

from importlib.resources import files

OPENING = "There is important information hidden in the following text. Find it and memorize it."


def shipped_text() -> str:
    """The shipped prose as it lies in its file: wrapped lines, an empty line between paragraphs."""
    return (files("kvservice.demo") / "document.txt").read_text(encoding="utf-8")


def needle(pass_key: str) -> str:
    """The sentence that hides a pass key."""
    return f"The pass key is {pass_key}. Remember it. {pass_key} is the pass key."


def plant(text: str, pass_key: str, depth: float) -> str:
    """`text` with one paragraph more: the needle.

    Args:
        text: wrapped prose; lines of a paragraph are joined.
        pass_key: what is to be found again.
        depth: 0 to 1, share of the text before the needle; it goes to the next paragraph's border.
    """
    paragraphs = [" ".join(part.split()) for part in text.split("\n\n") if part.strip()]
    target = depth * sum(len(paragraph) for paragraph in paragraphs)
    before, place = 0, 0
    while place < len(paragraphs) and before < target:
        before += len(paragraphs[place])
        place += 1
    planted = [OPENING, *paragraphs[:place], needle(pass_key), *paragraphs[place:]]
    return "\n\n".join(planted) + "\n"
