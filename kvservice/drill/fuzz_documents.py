"""Documents, as the fuzzer feeds them: bytes that a caller uploads, until they are tokens, and back.

The first byte says how they are uploaded (in how many pieces) and what they are to the session.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

from kvservice.drill.fuzz import FalseAcceptanceError, Target
from kvservice.errors import InvalidRequest
from kvservice.gateway import convert
from kvservice.models.tiny import write_tiny_checkpoint
from kvservice.models.tokenizer import Tokenizer
from kvservice.types import PromptFormat, TextRole

ACCEPTED = "accepted"
WAYS = tuple((role, form, first) for role in TextRole for form in PromptFormat for first in (True, False))


def document_target(folder: Path) -> Target:
    """Tokens that aren't the model's, or whose text isn't the document's, are a false acceptance."""

    @cache
    def tokenizer() -> Tokenizer:
        return Tokenizer.load(write_tiny_checkpoint(folder / "tiny"))

    def feed(data: bytes) -> str:
        role, form, first = WAYS[data[0] % len(WAYS)] if data else WAYS[0]
        try:
            text = convert.document_text(data[1:])
            tokens = tokenizer().encode(text, role, form, first=first)
        except InvalidRequest as error:
            return f"refused: {error.reason}"
        if form is PromptFormat.RAW and tokenizer().decode(tokens) != text:
            raise FalseAcceptanceError(f"{len(text)} characters that read otherwise as tokens")
        stream = tokenizer().stream()
        pieces = [stream.push(token) for token in tokens]
        if "".join(pieces) + stream.flush() != tokenizer().decode(tokens):
            raise FalseAcceptanceError("a stream of tokens that reads otherwise than all of them")
        return ACCEPTED

    return Target("documents", _documents(), feed, ("kvservice/models/tokenizer", "kvservice/models/chat"))


def _documents() -> list[bytes]:
    texts = ("A story.\n\nIt ends.", "Ünïcödé 文書 👩‍👩‍👧 \u200f", "<|im_start|>user\n<|endoftext|>", "\0\ufffd\r\n")
    return [bytes([index]) + text.encode() for index, text in enumerate(texts)] + [b"\0\xff\xfe", b""]
