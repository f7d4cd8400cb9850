"""What a model's chat template puts around texts. Knows nothing of tokens.

A template renders whole conversations, but a session grows by pieces. So a conversation of marker words is rendered
once, and what lies between the markers is what goes between texts:

    {opening}DOCUMENT{turn_break}QUESTION{answer_opening}answer{turn_break}QUESTION{answer_opening}answer…
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from kvservice.errors import InvalidRequest
from kvservice.models.folder import read_optional_json

_MARKERS = ("kvserviceFirst", "kvserviceSecond", "kvserviceThird")


@dataclass(frozen=True, slots=True)
class ChatPieces:
    """Texts with the model's control words, to be put around a user's texts."""

    opening: str
    """Before the first text of a session: the system turn, if the template has one, and the opening of a user turn."""
    turn_break: str
    """Closes the turn that is open, the user's or the assistant's, and opens a user turn."""
    answer_opening: str
    """Closes the user turn and opens the assistant's."""
    system: tuple[str, str] | None
    """Before and after a caller's own system text, instead of `opening`; None: the template takes none."""


def read_chat_pieces(folder: Path) -> ChatPieces:
    """The pieces of the template in `folder`. Imports transformers' renderer: 0.7 s the first time.

    Raises:
        InvalidRequest: there is no template, or it can't be taken to pieces; the raw form does without.
    """
    template, special_words = _read_template(folder)
    if template is None:
        raise InvalidRequest(
            "the model has no chat template: use the prompt format `raw`",
            reason="no_chat_template",
            field="prompt_format",
        )
    question = _render(template, ["user"], special_words, add_generation_prompt=True)
    closed = _render(template, ["user"], special_words, add_generation_prompt=False)
    talk = _render(template, ["user", "assistant", "user"], special_words, add_generation_prompt=True)
    answered = _render(template, ["user", "assistant"], special_words, add_generation_prompt=False)
    user_close, assistant_close = closed[-1], answered[-1]
    if user_close != assistant_close:
        raise _unusable(f"it closes a user turn with {user_close!r} and an assistant turn with {assistant_close!r}")
    return ChatPieces(
        opening=question[0],
        turn_break=talk[2],
        answer_opening=question[1],
        system=_system_pieces(template, special_words),
    )


def _system_pieces(template: str, special_words: Mapping[str, str]) -> tuple[str, str] | None:
    try:
        before, after, _ = _render(template, ["system", "user"], special_words, add_generation_prompt=True)
    except InvalidRequest:
        return None
    return before, after


def _read_template(folder: Path) -> tuple[str | None, dict[str, str]]:
    config = read_optional_json(folder, "tokenizer_config.json")
    special_words: dict[str, str] = {}
    for key in ("bos_token", "eos_token", "unk_token", "pad_token"):
        value = config.get(key)
        if isinstance(value, Mapping):
            value = value.get("content")
        if isinstance(value, str):
            special_words[key] = value
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8"), special_words
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {item["name"]: item["template"] for item in template if isinstance(item, dict)}
        template = named.get("default")
    return (template if isinstance(template, str) else None), special_words


def _render(
    template: str, roles: list[str], special_words: Mapping[str, str], *, add_generation_prompt: bool
) -> list[str]:
    """The rendered conversation, cut at the markers: one string more than roles."""
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    messages = [{"role": role, "content": marker} for role, marker in zip(roles, _MARKERS, strict=False)]
    # transformers annotates the result as str; it is the rendered conversations and their spans.
    render = cast("Callable[..., tuple[list[str], object]]", render_jinja_template)
    try:
        rendered, _ = render(
            [messages], chat_template=template, add_generation_prompt=add_generation_prompt, **special_words
        )
    except TemplateError as error:
        raise _unusable(f"it fails: {error}") from None
    pieces: list[str] = []
    rest = rendered[0]
    for marker in _MARKERS[: len(roles)]:
        if rest.count(marker) != 1:
            raise _unusable(f"it shows a message {rest.count(marker)} times")
        before, _, rest = rest.partition(marker)
        pieces.append(before)
    return [*pieces, rest]


def _unusable(why: str) -> InvalidRequest:
    return InvalidRequest(
        f"the model's chat template can't be used for sessions, {why}: use the prompt format `raw`",
        reason="no_chat_template",
        field="prompt_format",
    )
