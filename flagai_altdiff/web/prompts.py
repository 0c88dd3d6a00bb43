"""How long prompts are, counted as the models read them, and how long they may be."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Mapping, Sequence

from flagai_altdiff.chunks import ROOM, chunks
from flagai_altdiff.errors import FlagAIAltDiffError, InvalidRequestError
from flagai_altdiff.registry import locate
from flagai_altdiff.request import ResolvedRequest
from flagai_altdiff.tokenizer import Tokenizer, load_tokenizer, own_tokenizer
from flagai_altdiff.web.settings import Drawing

logger = logging.getLogger(__name__)

_LONGEST_TOKEN = 16
"""Characters of the longest pieces of the vocabularies."""
_PROMPTS = 10
"""So many of the longest prompts may all prompts of a request be together."""


class PromptReader:
    """The tokenizers of a server's models, each read when it is first needed.

    Args:
        settings: Which models there are.
        most_chunks: Of 75 tokens, that a prompt with weights may have.
    """

    def __init__(self, settings: Drawing, most_chunks: int) -> None:
        self._settings, self._most = settings, most_chunks
        self._tokenizers: dict[str, Tokenizer | None] = {}
        self._lock = threading.Lock()

    def tokenizer(self, model: str) -> Tokenizer | None:
        """A model's; ``None`` for one that has none that can be read."""
        with self._lock:
            if model not in self._tokenizers:
                self._tokenizers[model] = self._read(model)
            return self._tokenizers[model]

    def _read(self, model: str) -> Tokenizer | None:
        try:
            path = own_tokenizer(locate(self._settings.names[model], self._settings.model_dir)[1])
            return load_tokenizer(path) if path else None
        except FlagAIAltDiffError as error:
            logger.warning("%s: its tokens are not counted: %s", model, error)
            return None

    async def chunks(self, request: ResolvedRequest, model: str) -> int:
        """What the text encoder reads of the longest prompt, in chunks of 75 tokens; counted beside the event loop.

        Args:
            request: Whose prompts.
            model: Which reads them.

        Raises:
            InvalidRequestError: A prompt, or all of them together, are longer than a request's may be.
        """
        longest = self._most * ROOM * _LONGEST_TOKEN
        texts = {"prompts": request.prompts, "negative_prompt": (request.negative_prompt,)}
        for field, prompts in texts.items():
            for prompt in prompts:
                if len(prompt) > longest:
                    raise InvalidRequestError(field, prompt, f"a prompt may have {longest:,} characters here")
        if sum(len(prompt) for prompts in texts.values() for prompt in prompts) > _PROMPTS * longest:
            expected = f"all prompts together may have {_PROMPTS * longest:,} characters here"
            raise InvalidRequestError("prompts", request.prompts[0], expected)
        if request.prompt_syntax == "plain":
            return 1
        return await asyncio.to_thread(self._most_chunks, texts, model)

    def _most_chunks(self, texts: Mapping[str, Sequence[str]], model: str) -> int:
        counted = (self._counted(field, prompt, model) for field in texts for prompt in dict.fromkeys(texts[field]))
        return max(counted)

    def _counted(self, field: str, prompt: str, model: str) -> int:
        tokenizer = self.tokenizer(model)
        count = len(chunks(tokenizer, prompt)) if tokenizer else 1 + len(prompt) // ROOM
        if count > self._most:
            expected = f"a prompt with weights may have {self._most} chunks of {ROOM} tokens here, and this has {count}"
            raise InvalidRequestError(field, prompt, f"{expected}; shorten it, or leave out some BREAK")
        return count
