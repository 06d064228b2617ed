"""`handoff/receipt.py`: decode takes KV of exactly its own tokens, by exactly its own base."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from sglang_prefillshare.errors import HandoffError
from sglang_prefillshare.handoff.receipt import WORD_COUNT, Receipt

TOKENS = st.lists(st.integers(0, 2**31 - 1), max_size=50)
FINGERPRINT = "psk1-0123456789abcdef"


def receipt(tokens: Sequence[int], *, fingerprint: str = FINGERPRINT, cross_model_tokens: int = 0) -> Receipt:
    return Receipt.of(array("q", tokens), fingerprint=fingerprint, cross_model_tokens=cross_model_tokens)


@given(tokens=TOKENS, fingerprint=st.text(), cross_model_tokens=st.integers(0, 2**31 - 1))
def test_a_receipt_travels_in_eight_31_bit_words(tokens: list[int], fingerprint: str, cross_model_tokens: int) -> None:
    sent = receipt(tokens, fingerprint=fingerprint, cross_model_tokens=cross_model_tokens)
    words = sent.to_words()
    assert len(words) == WORD_COUNT == 8
    assert all(0 <= word < 2**31 for word in words)
    got = Receipt.from_words(words)
    assert got == sent
    assert (got.token_count, got.cross_model_tokens) == (len(tokens), cross_model_tokens)


@given(tokens=TOKENS, cross_model_tokens=st.integers(0, 100))
def test_what_decode_computes_itself_is_accepted(tokens: list[int], cross_model_tokens: int) -> None:
    # How much was shared is prefill's to know: decode expects nothing of it.
    receipt(tokens, cross_model_tokens=cross_model_tokens).check(receipt(tokens))


def test_another_base_is_refused() -> None:
    with pytest.raises(HandoffError, match="another base, or in another KV dtype"):
        receipt([1, 2]).check(receipt([1, 2], fingerprint=FINGERPRINT + "0"))


def test_another_count_is_refused() -> None:
    with pytest.raises(HandoffError, match="holds 2 tokens of this prompt, decode expects 3"):
        receipt([1, 2]).check(receipt([1, 2, 3]))


def test_other_ids_of_equal_count_are_refused() -> None:
    with pytest.raises(HandoffError, match="disagree about the 3 prompt tokens"):
        receipt([1, 2, 3]).check(receipt([1, 3, 2]))


@given(tokens=st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=50), data=st.data())
def test_any_single_changed_token_changes_the_digest(tokens: list[int], data: st.DataObject) -> None:
    index = data.draw(st.integers(0, len(tokens) - 1))
    token = data.draw(st.integers(0, 2**31 - 1))
    assume(token != tokens[index])
    changed = [*tokens[:index], token, *tokens[index + 1 :]]
    assert receipt(changed).digest != receipt(tokens).digest
    with pytest.raises(HandoffError, match="disagree"):
        receipt(changed).check(receipt(tokens))


@given(word=st.integers(1, 5), bit=st.integers(0, 30))
def test_a_flipped_bit_of_what_is_compared_is_refused(word: int, bit: int) -> None:
    expected = receipt(range(20))
    words = expected.to_words()
    words[word] ^= 1 << bit
    with pytest.raises(HandoffError):
        Receipt.from_words(words).check(expected)


@pytest.mark.parametrize(
    "words",
    [
        [0] * 8,  # a prefill worker without our role
        [],
        receipt([1]).to_words()[:7],
        [*receipt([1]).to_words(), 0],
        [receipt([1]).to_words()[0] ^ 1, *receipt([1]).to_words()[1:]],
    ],
)
def test_words_that_are_no_receipt_are_refused(words: list[int]) -> None:
    with pytest.raises(HandoffError, match="sent no PrefillShare receipt"):
        Receipt.from_words(words)


def test_ids_of_another_width_are_refused_since_they_would_have_another_digest() -> None:
    with pytest.raises(HandoffError, match="4 bytes each, wanted 8"):
        Receipt.of(array("i", [1, 2]), fingerprint=FINGERPRINT)
