"""XLM-R's tokenizer: prompts -> ids."""

from flagai_altdiff.tokenizer.files import neighbour_tokenizers, own_tokenizer
from flagai_altdiff.tokenizer.text import trimmed
from flagai_altdiff.tokenizer.xlm_r import MAX_TOKENS, Encoded, Tokenizer, load_tokenizer

__all__ = ["MAX_TOKENS", "Encoded", "Tokenizer", "load_tokenizer", "neighbour_tokenizers", "own_tokenizer", "trimmed"]
