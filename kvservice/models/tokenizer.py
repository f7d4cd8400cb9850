"""From text to token ids and back. Knows nothing of weights or sessions.

Built on `tokenizers`: transformers is imported only when a chat template is first needed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import tokenizers

from kvservice.errors import InvalidRequest, ModelError
from kvservice.models.chat_template import read_chat_pieces
from kvservice.models.folder import FETCH_HINT, read_eos_token_ids, read_json, read_optional_json, read_text
from kvservice.models.streams import ByteStream, WindowStream, byte_level_bytes
from kvservice.types import ChatMessage, ChatRole, PromptFormat, TextRole


@dataclass(frozen=True, slots=True)
class _ChatTokens:
    """ChatPieces as token ids."""

    opening: list[int]
    turn_break: list[int]
    answer_opening: list[int]
    system: tuple[list[int], list[int]] | None


class Tokenizer:
    """A model's tokenizer. Safe to use from several threads.

    Texts of users never become control tokens: `<|im_end|>` in a document is tokenised as the characters it is made of,
    so no text can close its turn or forge another's.
    """

    def __init__(self, folder: Path, codec: tokenizers.Tokenizer, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        """Tokens that the model has logits for; it may have more than have a text."""
        self.eos_token_ids = _eos_token_ids(folder, codec)
        self._folder = folder
        self._codec = codec
        # Control words in texts are characters. The pieces of the chat template get a codec of their own.
        self._codec.encode_special_tokens = True
        added = codec.get_added_tokens_decoder()
        self._control_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self._is_byte_level = isinstance(codec.decoder, tokenizers.decoders.ByteLevel)
        self._known_bytes: dict[int, bytes] = {}
        unknown = getattr(codec.model, "unk_token", None)
        self._unknown_id = codec.token_to_id(unknown) if isinstance(unknown, str) else None

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """The tokenizer of a model folder. Takes 0.3 s for 49,152 tokens.

        Raises:
            ModelError: a file is missing or damaged, or has more tokens than the model.
        """
        vocab_size = read_json(folder, "config.json").get("vocab_size")
        codec = _build(read_text(folder, "tokenizer.json"), folder)
        # The service must see every token of a text: none cut off, none filled in.
        codec.no_truncation()
        codec.no_padding()
        highest = max(codec.get_vocab(with_added_tokens=True).values(), default=-1)
        if not isinstance(vocab_size, int) or highest >= vocab_size:
            raise ModelError(
                f"{folder / 'tokenizer.json'} has the token id {highest}, config.json has vocab_size={vocab_size!r}: "
                f"{FETCH_HINT}",
                reason="model_damaged",
            )
        return cls(folder, codec, vocab_size)

    def encode(self, text: str, role: TextRole, prompt_format: PromptFormat, *, first: bool) -> list[int]:
        """The tokens that a session gains by `text`.

        RAW: the text's own tokens, nothing else; `role` and `first` don't matter.

        CHAT: every text is a user turn. The first one of a session is opened as the template opens a conversation. A
        later one first closes the turn before it, be that a document's or an answer's. A document's turn is left open;
        a question's is closed and the assistant's is opened. So the end token of an answer must not be among the
        session's tokens: the next text closes the answer.

        Args:
            text: as the user gave it.
            role: what the text is to the session.
            prompt_format: how it becomes tokens.
            first: whether the session has no tokens yet.

        Raises:
            InvalidRequest: CHAT, and the model has no usable template; or the text holds control words that this
                tokenizer can't tokenise as text.
        """
        content = self._encode_text(text)
        if prompt_format is PromptFormat.RAW:
            return content
        chat = self._chat_tokens
        tokens = (chat.opening if first else chat.turn_break) + content
        return tokens + chat.answer_opening if role is TextRole.QUESTION else tokens

    def encode_chat(self, messages: Sequence[ChatMessage], *, first: bool) -> tuple[list[int], list[int]]:
        """The tokens that a session gains by turns of a conversation: of all but the last one, and of the last one.

        They are those that `encode` gives for the same user turns. The assistant's turn is opened at the end.

        Args:
            messages: the system's first, if any, and only if the session has no tokens yet; then users' and
                assistants', of which the first and the last are a user's.
            first: whether the session has no tokens yet.

        Raises:
            InvalidRequest: another order of roles, or see `encode`.
        """
        _check_order(messages, first=first)
        chat = self._chat_tokens
        tokens: list[int] = []
        last_start = 0
        before: ChatRole | None = None
        for message in messages:
            last_start = len(tokens)
            if message.role is ChatRole.SYSTEM:
                tokens += self._system_tokens[0]
            elif message.role is ChatRole.ASSISTANT:
                tokens += chat.answer_opening
            elif before is ChatRole.SYSTEM:
                tokens += self._system_tokens[1]
            else:
                tokens += chat.opening if first and before is None else chat.turn_break
            tokens += self._encode_text(message.content)
            before = message.role
        return tokens[:last_start], tokens[last_start:] + chat.answer_opening

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of `token_ids`. Control tokens have no text; bytes that are no UTF-8 become U+FFFD."""
        return self._codec.decode(list(token_ids), skip_special_tokens=True)

    def stream(self) -> ByteStream | WindowStream:
        """A decoder of one answer, token by token."""
        return ByteStream(self._bytes_of) if self._is_byte_level else WindowStream(self)

    def has_text(self, token_id: int) -> bool:
        """Whether the token is one of text: neither a control token nor beyond the vocabulary."""
        return token_id not in self._control_ids and self._codec.id_to_token(token_id) is not None

    def definition(self) -> str:
        """The tokenizer as the text of a tokenizer.json, for other libraries to read."""
        return self._codec.to_str()

    @cached_property
    def _chat_tokens(self) -> _ChatTokens:
        pieces = read_chat_pieces(self._folder)
        # A copy doesn't carry `encode_special_tokens` over, so it finds the control words of the pieces.
        codec = _build(self._codec.to_str(), self._folder)

        def encode(text: str) -> list[int]:
            return codec.encode(text, add_special_tokens=False).ids

        return _ChatTokens(
            opening=encode(pieces.opening),
            turn_break=encode(pieces.turn_break),
            answer_opening=encode(pieces.answer_opening),
            system=None if pieces.system is None else (encode(pieces.system[0]), encode(pieces.system[1])),
        )

    @property
    def _system_tokens(self) -> tuple[list[int], list[int]]:
        if self._chat_tokens.system is None:
            raise InvalidRequest(
                "the model's chat template takes no system message: put it into the first user's", field="messages"
            )
        return self._chat_tokens.system

    def _bytes_of(self, token_id: int) -> bytes:
        """What a byte-level token adds to the text: whole characters or not, the same wherever it stands."""
        found = self._known_bytes.get(token_id)
        if found is None:
            token = str(self._codec.id_to_token(token_id)) if self.has_text(token_id) else ""
            found = self._known_bytes[token_id] = byte_level_bytes(token)
        return found

    def _encode_text(self, text: str) -> list[int]:
        ids = self._codec.encode(text, add_special_tokens=False).ids
        forged = self._control_ids.intersection(ids) - {self._unknown_id}
        if forged:
            # Some tokenizers find control words in their vocabulary even when told not to look for them.
            words = ", ".join(str(self._codec.id_to_token(token_id)) for token_id in sorted(forged))
            raise InvalidRequest(f"the text holds control words of the model, take them out: {words}", field="text")
        return ids


def _check_order(messages: Sequence[ChatMessage], *, first: bool) -> None:
    roles = [message.role for message in messages]
    if ChatRole.SYSTEM in roles[0 if not first else 1 :]:
        raise InvalidRequest("messages: a system's can only be the first of a session", field="messages")
    turns = roles[1:] if roles[:1] == [ChatRole.SYSTEM] else roles
    if not turns or turns[0] is not ChatRole.USER or turns[-1] is not ChatRole.USER:
        raise InvalidRequest("messages: the first and the last must be a user's, but for a system's", field="messages")
    if any(pair == (ChatRole.ASSISTANT, ChatRole.ASSISTANT) for pair in pairwise(turns)):
        raise InvalidRequest("messages: an assistant's must follow a user's", field="messages")


def _build(definition: str, folder: Path) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_str(definition)
    except Exception as error:  # noqa: BLE001 (the library raises nothing narrower)
        raise ModelError(
            f"{folder / 'tokenizer.json'} isn't a tokenizer ({error}): {FETCH_HINT}", reason="model_damaged"
        ) from None


def _eos_token_ids(folder: Path, codec: tokenizers.Tokenizer) -> frozenset[int]:
    word = read_optional_json(folder, "tokenizer_config.json").get("eos_token")
    if isinstance(word, Mapping):
        word = word.get("content")
    token_id = codec.token_to_id(word) if isinstance(word, str) else None
    return read_eos_token_ids(folder) | ({token_id} if token_id is not None else set())
