"""What prefill states about the KV it hands over, and how decode checks it, over any transport.

SGLang ships a row of spare integers beside every handoff. The receipt travels there as eight 31-bit words: whose KV
it is, of which tokens, how many, and how much of it was computed for another decode module. Decode compares before it
samples anything, so that a prefill restarted with another base, or a prompt that the two sides tokenized differently,
ends in an error and never in an answer (contracts 4 and 8).
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import xxhash

from sglang_prefillshare.errors import HandoffError

WORD_COUNT: Final = 8
FIRST_SLOT: Final = 8
"""SGLang uses slots 0-6 of the 16 in `MetadataBuffers.cached_tokens`; the receipt takes 8-15, on both sides."""

_WORD_BITS: Final = 31
_WORD_MASK: Final = (1 << _WORD_BITS) - 1
_MAGIC: Final = 0x5053_4831 & _WORD_MASK  # "PSH1": a peer without our role leaves zero here

ROOM_MASK: Final = 0x5053_5053_5053
"""Prefill XORs the room number it writes back with this. A decode worker without our role then refuses the handoff as
corrupt, instead of taking the base's sample as its first token."""


@dataclass(frozen=True, slots=True)
class Receipt:
    """Identity (62 bits of the runtime fingerprint's hash), digest (62 bits over the token ids) and counts."""

    identity: int
    digest: int
    token_count: int
    cross_model_tokens: int

    @classmethod
    def of(cls, token_ids: array[int], *, fingerprint: str, cross_model_tokens: int = 0) -> Receipt:
        """The receipt for the KV of `token_ids` (64-bit integers, x1..x(n-1)) computed by base `fingerprint`."""
        if token_ids.itemsize != 8:
            raise HandoffError(f"token ids have {token_ids.itemsize} bytes each, wanted 8.")
        return cls(
            identity=xxhash.xxh3_64_intdigest(fingerprint.encode()) >> 2,
            digest=xxhash.xxh3_64_intdigest(memoryview(token_ids).cast("B")) >> 2,
            token_count=len(token_ids),
            cross_model_tokens=cross_model_tokens,
        )

    def to_words(self) -> list[int]:
        """Eight integers in [0, 2^31)."""
        return [
            _MAGIC,
            self.identity >> _WORD_BITS,
            self.identity & _WORD_MASK,
            self.digest >> _WORD_BITS,
            self.digest & _WORD_MASK,
            self.token_count,
            self.cross_model_tokens,
            0,
        ]

    @classmethod
    def from_words(cls, words: Sequence[int]) -> Receipt:
        """Parse what a prefill wrote; raises `HandoffError` if it wrote no receipt."""
        if len(words) != WORD_COUNT or words[0] != _MAGIC:
            raise HandoffError(
                "the prefill worker sent no PrefillShare receipt with its KV. "
                "Start it with --prefill-share-role prefill, in the same version as decode."
            )
        return cls(
            identity=words[1] << _WORD_BITS | words[2],
            digest=words[3] << _WORD_BITS | words[4],
            token_count=words[5],
            cross_model_tokens=words[6],
        )

    def check(self, expected: Receipt) -> None:
        """Refuse KV that is not what decode asked for; `expected` is what decode computes from its own prompt."""
        if self.identity != expected.identity:
            raise HandoffError(
                "the prefill worker computed this KV with another base, or in another KV dtype, than this decode "
                "module was fine-tuned on. Compare /prefill_share of both workers and restart the wrong one."
            )
        if self.token_count != expected.token_count:
            raise HandoffError(
                f"prefill holds {self.token_count} tokens of this prompt, decode expects {expected.token_count}: "
                "the two sides tokenized it differently. Send input_ids, or give both the same tokenizer and template."
            )
        if self.digest != expected.digest:
            raise HandoffError(
                f"prefill and decode disagree about the {self.token_count} prompt tokens (equal count, other ids). "
                "Send input_ids, or give both workers the same tokenizer and chat template."
            )
