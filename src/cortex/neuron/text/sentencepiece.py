"""The tokenizers of SentencePiece's BPE, rebuilt from a GGUF file's vocabulary and scores.

Such a file lists no merges: two pieces merge wherever together they are a piece, the one with the best score
first. Knows no byte-level vocabularies and no chat template.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from tokenizers import Tokenizer, decoders, models, normalizers

from cortex.neuron.text.vocabulary import TokenType, add_whole, of_type, special_id, vocabulary
from cortex.wire.errors import LoadFailed

MODEL: Final = "llama"
"""How `tokenizer.ggml.model` calls these vocabularies, whatever the architecture."""
_SPACE: Final = "\u2581"


def sentencepiece_from_gguf(metadata: Mapping[str, Any]) -> Tokenizer:
    """Spaces become U+2581, with one more before the text unless the metadata say otherwise; characters that
    are no piece become bytes. Raises LoadFailed.
    """
    tokens, types = vocabulary(metadata)
    scores = metadata.get("tokenizer.ggml.scores")
    if (
        not isinstance(scores, list)
        or len(scores) != len(tokens)
        or not all(isinstance(score, int | float) for score in scores)
    ):
        raise LoadFailed(
            "The file's tokenizer is incomplete: tokenizer.ggml.scores are not one for each of "
            f"{len(tokens)} tokens."
        )
    unknown = special_id(metadata, "unknown", len(tokens)) or 0
    unused = set(of_type(types, TokenType.UNUSED))
    vocab = {token: id for id, token in enumerate(tokens) if id not in unused}
    try:
        model = models.BPE(
            vocab=vocab,
            merges=_merges(tokens, types, scores),
            unk_token=tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    except Exception as error:  # the Rust side raises bare Exceptions
        raise LoadFailed(f"The file's vocabulary cannot be used: {error}.") from None
    tokenizer = Tokenizer(model)
    to_marks: list[Any] = [normalizers.Replace(" ", _SPACE)]
    to_text: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if metadata.get("tokenizer.ggml.add_space_prefix", True):
        to_marks.insert(0, normalizers.Prepend(_SPACE))
        to_text.append(decoders.Strip(" ", 1, 0))
    tokenizer.normalizer = normalizers.Sequence(to_marks)
    tokenizer.decoder = decoders.Sequence(to_text)
    add_whole(tokenizer, tokens, types)
    return tokenizer


def _merges(tokens: Sequence[str], types: Sequence[int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """Best first. Of one piece's, those that cut it later come first, as in models' own tokenizer.json."""
    normal = {tokens[id]: scores[id] for id in of_type(types, TokenType.NORMAL)}
    found = []
    for piece, score in normal.items():
        for cut in range(len(piece) - 1, 0, -1):
            left = piece[:cut]
            if left in normal:
                right = piece[cut:]
                if right in normal:
                    found.append((score, left, right))
    found.sort(key=lambda merge: -merge[0])
    return [(left, right) for _, left, right in found]
