"""Prompts to token ids, through the chat template that the checkpoint's tokenizer brings along."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import numpy as np

from fluxbatch.models.family import TextInput
from fluxbatch.types import UserError

# What dev's encoder was told when the transformer learned from it.
DEV_SYSTEM = (
    "You are an AI that reasons about image descriptions. You give structured responses focusing on object "
    "relationships, object\nattribution and actions without speculation."
)


def klein_messages(prompt: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": prompt}]


def dev_messages(prompt: str) -> list[dict[str, Any]]:
    """Without ``[IMG]``, which the tokenizer would take for a picture."""
    parts = ("system", DEV_SYSTEM), ("user", prompt.replace("[IMG]", ""))
    return [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in parts]


@dataclasses.dataclass(frozen=True)
class Chat:
    """How a prompt becomes a conversation."""

    messages: Callable[[str], list[dict[str, Any]]]
    template: dict[str, Any]  # what the chat template is told
    special: bool  # whether the tokenizer adds its own start and end to what the template wrote
    size: int  # tokens, at most, that stand around the prompt
    padding_side: str | None = None  # None: the tokenizer's own


KLEIN = Chat(klein_messages, {"add_generation_prompt": True, "enable_thinking": False}, True, 40)
DEV = Chat(dev_messages, {"add_generation_prompt": False}, False, 40 + len(DEV_SYSTEM))


class ChatTokenizer:
    """Ids and masks are those of transformers; the side that is padded, and cut, is the tokenizer's."""

    here, unit = True, ""

    def __init__(self, folder: str, chat: Chat):
        """UserError if ``folder`` has none that can be read, or one without a chat template."""
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it would say that torch is missing
        from transformers import AutoTokenizer

        self.folder, self._chat = folder, chat
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            if not self._tokenizer.chat_template:
                raise ValueError(
                    "it has no chat template: expected chat_template.jinja, or chat_template in tokenizer_config.json"
                )
            if self._tokenizer.pad_token is None:
                raise ValueError("it has no pad_token")
            self.written("")
        except Exception as error:  # transformers, tokenizers and jinja2 raise whatever their parsers raise
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"{folder}: the tokenizer cannot be read: {reason}") from error
        self.max_length = self._tokenizer.model_max_length

    def written(self, prompt: str) -> str:
        """The whole text that is tokenized."""
        text = self._tokenizer.apply_chat_template(self._chat.messages(prompt), tokenize=False, **self._chat.template)
        return cast(str, text)

    def __call__(self, texts: Sequence[str], length: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids and mask ``[B, length]`` int32, padded and truncated; the mask is 0 where there is padding."""
        if not texts:
            return np.zeros((0, length), np.int32), np.zeros((0, length), np.int32)
        found = self._encoded(texts, padding="max_length", truncation=True, max_length=length)
        return np.array(found["input_ids"], np.int32), np.array(found["attention_mask"], np.int32)

    def count(self, texts: Sequence[str]) -> list[int]:
        """Their tokens, the template's included."""
        chunks = (texts[i : i + 4096] for i in range(0, len(texts), 4096))
        return [len(ids) for chunk in chunks for ids in self._encoded(chunk)["input_ids"]]

    def longer(self, texts: Iterable[str], limit: int) -> set[str]:
        """Those of ``texts`` that have more than ``limit`` tokens."""
        # a character of ASCII is a token at most; beside them stand starts and ends
        template = len(self.written("")) + 8
        doubtful = [text for text in dict.fromkeys(texts) if not text.isascii() or len(text) + template > limit]
        return {text for text, count in zip(doubtful, self.count(doubtful), strict=True) if count > limit}

    def doubtful(self, texts: Iterable[str], limit: int) -> set[str]:
        """None: of all ``longer`` says whether they have more tokens."""
        return set()

    def _encoded(self, prompts: Sequence[str], **how: Any) -> Any:
        side = {} if self._chat.padding_side is None else {"padding_side": self._chat.padding_side}
        return self._tokenizer(
            [self.written(prompt) for prompt in prompts],
            add_special_tokens=self._chat.special,
            verbose=False,
            **side,
            **how,
        )


@dataclasses.dataclass(frozen=True)
class ChatInput(TextInput):
    """A prompt in the words of a chat, with a mask. What is read is the template's as well."""

    template: int  # tokens that stand around a prompt, at most, for want of a tokenizer

    def __call__(self, texts: Sequence[str]) -> tuple[np.ndarray, ...]:
        """Ids and masks ``[B, length]`` int32, padded and truncated."""
        return self.tokenizer(texts, self.length)

    def shapes(self) -> tuple[tuple[int, ...], ...]:
        return (self.length,), (self.length,)

    def _counts(self, texts: Sequence[str]) -> list[int]:
        around = 0 if self.tokenizer.here else self.template  # what stands in for a tokenizer counts words
        return [count + around for count in self.tokenizer.count(texts)]

    def doubtful(self, texts: Iterable[str]) -> set[str]:
        texts = set(texts)
        return self.tokenizer.doubtful(texts, self.length - self.template) - self.truncated(texts)
