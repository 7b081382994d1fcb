"""Byte-level byte-pair encoding: any bytes can be encoded, and decoding restores them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import pairwise

__all__ = ["Tokenizer", "split_words"]

_WORD = re.compile(rb" ?[A-Za-z\x80-\xff]+| ?[0-9]+| ?[^\sA-Za-z0-9\x80-\xff]+|\s+(?= \S)|\s+")


def split_words(data: bytes) -> list[bytes]:
    """Split text into pieces that no merge crosses; joined, they are the text again."""
    return _WORD.findall(data)


class Tokenizer:
    """Byte-pair encoding over the 256 bytes and a list of merges.

    Parameters
    ----------
    merges : sequence of (int, int)
        Pairs of token ids in order of priority; merge ``i`` joins two earlier tokens into token ``256 + i``.
    """

    def __init__(self, merges: Sequence[tuple[int, int]]) -> None:
        self.merges = [(int(left), int(right)) for left, right in merges]
        self.pieces = [bytes([value]) for value in range(256)]
        self._rank: dict[tuple[int, int], int] = {}
        for index, (left, right) in enumerate(self.merges):
            if not (0 <= left < 256 + index and 0 <= right < 256 + index):
                raise ValueError(f"merges: merge {index} must join two earlier tokens, got {(left, right)}")
            self._rank[left, right] = 256 + index
            self.pieces.append(self.pieces[left] + self.pieces[right])
        self._words: dict[bytes, list[int]] = {}

    def __len__(self) -> int:
        return len(self.pieces)

    def encode(self, text: str | bytes) -> list[int]:
        """Turn text into token ids."""
        data = text.encode("utf-8", "surrogateescape") if isinstance(text, str) else text
        tokens: list[int] = []
        for word in split_words(data):
            known = self._words.get(word)
            if known is None:
                known = self._words[word] = self._encode_word(word)
            tokens += known
        return tokens

    def decode(self, tokens: Iterable[int]) -> bytes:
        """Turn token ids back into bytes."""
        return b"".join(self.pieces[token] for token in tokens)

    def _encode_word(self, word: bytes) -> list[int]:
        tokens = list(word)
        while len(tokens) > 1:
            ranks = [self._rank.get(pair) for pair in pairwise(tokens)]
            found = [rank for rank in ranks if rank is not None]
            if not found:
                break
            best = min(found)
            merged: list[int] = []
            index = 0
            while index < len(tokens):
                if index < len(ranks) and ranks[index] == best:
                    merged.append(best)
                    index += 2
                else:
                    merged.append(tokens[index])
                    index += 1
            tokens = merged
        return tokens
