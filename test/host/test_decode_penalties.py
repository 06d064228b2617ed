"""What SGLang's penalties are told before each step of a decode worker, with and without overlap scheduling.

The steps run in the order of SGLang's two loops, with its penalizers, its function that tells them, and our hook. The
loops themselves run in `test/e2e/test_overlap.py`.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("sglang", reason="waits for SGLang: run `make setup`")

from sglang.srt.managers.schedule_batch import ScheduleBatch
from sglang.srt.sampling import penaltylib
from sglang.srt.sampling.sampling_params import SamplingParams

from sglang_prefillshare.host.roles import decode

VOCABULARY = 32
STOP = 31
PROMPT = [7, 8, 9]  # the last one is xn
SPOKEN = [11, 12, 11, 13, 14, 12]  # y1..y6


@dataclass(eq=False)
class Request:
    """What of SGLang's `Req` penalties and our hooks read."""

    sampling_params: Any
    spoken: list[int]
    output_ids: array[int] = field(default_factory=lambda: array("q"))
    origin_input_ids: list[int] = field(default_factory=lambda: list(PROMPT))
    eos_token_ids: set[int] = field(default_factory=lambda: {STOP})
    tokenizer: Any = field(default_factory=lambda: SimpleNamespace(additional_stop_token_ids=None, eos_token_id=STOP))
    bootstrap_host: str = "127.0.0.1"
    already_computed: int = 0
    prefix_len: int = 0

    def learn(self, count: int = 1) -> None:
        """The results of `count` more steps are known."""
        self.output_ids.extend(self.spoken[len(self.output_ids) : len(self.output_ids) + count])


class Batch:
    """What of SGLang's `ScheduleBatch` penalties and our hooks read."""

    device = "cpu"

    def __init__(self, *reqs: Request) -> None:
        self.reqs = list(reqs)
        self.sampling_info = SimpleNamespace(penalizer_orchestrator=None)
        decode.prepare_for_prebuilt(Batch.build, self)

    def build(self) -> None:
        orchestrator = penaltylib.BatchedPenalizerOrchestrator(VOCABULARY, self, KINDS)  # type: ignore[arg-type]
        self.sampling_info.penalizer_orchestrator = orchestrator

    def merge(self, other: Batch) -> None:
        """As `ScheduleBatch.merge_batch`: the penalties first, then the requests."""
        self.sampling_info.penalizer_orchestrator.merge(other.sampling_info.penalizer_orchestrator)
        self.reqs.extend(other.reqs)

    def prepare_step(self) -> list[Told]:
        decode.cumulate_penalty_output_tokens(ScheduleBatch.cumulate_penalty_output_tokens, self)
        return [Told.of(self, row) for row in range(len(self.reqs))]


KINDS: set[Any] = {
    penaltylib.BatchedFrequencyPenalizer,
    penaltylib.BatchedPresencePenalizer,
    penaltylib.BatchedRepetitionPenalizer,
    penaltylib.BatchedMinNewTokensPenalizer,
}


@dataclass(frozen=True)
class Told:
    """What is in force for one request in one step: tokens by their count, and whether it may stop."""

    counts: dict[int, int]
    may_stop: bool

    @classmethod
    def of(cls, batch: Batch, row: int) -> Told:
        penalizers = batch.sampling_info.penalizer_orchestrator.penalizers
        effects = {}
        for kind in KINDS:
            logits = torch.ones(len(batch.reqs), VOCABULARY)
            if kind is penaltylib.BatchedRepetitionPenalizer:
                logits /= penalizers[kind].get_scaling_penalties()
            else:
                penalizers[kind].apply(logits)
            effects[kind] = logits[row]
        counts = (1 - effects[penaltylib.BatchedFrequencyPenalizer]).round().int()
        present = [int(token) for token in counts.nonzero()]
        for kind in (penaltylib.BatchedPresencePenalizer, penaltylib.BatchedRepetitionPenalizer):
            assert [int(token) for token in (effects[kind] != 1).nonzero()] == present, kind
        may_stop = bool(effects[penaltylib.BatchedMinNewTokensPenalizer][STOP] == 1)
        return cls({token: int(counts[token]) for token in present}, may_stop)


def request(min_new_tokens: int = 2) -> Request:
    params = SamplingParams(
        max_new_tokens=16,
        min_new_tokens=min_new_tokens,
        frequency_penalty=1.0,
        presence_penalty=0.5,
        repetition_penalty=2.0,
    )
    return Request(params, SPOKEN)


def counted(tokens: list[int]) -> dict[int, int]:
    return {token: tokens.count(token) for token in tokens}


def steps(batch: Batch, count: int, *, overlap: bool) -> list[list[Told]]:
    """Run `count` steps in the loop's order; without overlap each result is known before the next step is prepared."""
    seen = []
    in_flight: list[Request] = []
    for _ in range(count):
        seen.append(batch.prepare_step())
        if not overlap:
            in_flight = batch.reqs
        for req in in_flight:
            req.learn()
        in_flight = list(batch.reqs)
    return seen


@pytest.mark.parametrize("overlap", [False, True], ids=["each result at once", "overlap"])
class TestEachTokenCountsOnceAndTheLastOfThePromptNever:
    def test_of_one_request(self, overlap: bool) -> None:
        seen = [told for (told,) in steps(Batch(request(min_new_tokens=2)), 6, overlap=overlap)]
        known = [max(0, number - overlap) for number in range(6)]
        assert [told.counts for told in seen] == [counted(SPOKEN[:count]) for count in known]
        assert [told.may_stop for told in seen] == [False, False, True, True, True, True]

    def test_of_a_request_that_joins_others(self, overlap: bool) -> None:
        batch = Batch(request(min_new_tokens=4), Request(SamplingParams(max_new_tokens=9), SPOKEN))
        steps(batch, 3, overlap=overlap)
        if overlap:  # the result of the third step is not known when the fourth is prepared
            assert [len(req.output_ids) for req in batch.reqs] == [2, 2]
        late = request(min_new_tokens=2)
        batch.merge(Batch(late))
        old, _, new = batch.prepare_step()
        assert old == Told(counted(SPOKEN[: 3 - overlap]), may_stop=False)
        assert new == Told({}, may_stop=False)
        for req in batch.reqs[:2]:
            req.learn()
        if not overlap:
            late.learn()
        old, _, new = batch.prepare_step()
        assert old == Told(counted(SPOKEN[: 4 - overlap]), may_stop=True)
        assert new == Told(counted(SPOKEN[: 1 - overlap]), may_stop=False)

    @pytest.mark.parametrize("generated", [0, 1, 2, 4])
    def test_of_requests_that_were_retracted_and_resumed(self, overlap: bool, generated: int) -> None:
        """Under overlap the token that was being computed is lost, and computed again."""
        resumed, other = request(min_new_tokens=3), request(min_new_tokens=5)
        for batch in (Batch(resumed), Batch(other)):
            steps(batch, 3, overlap=overlap)
        resumed.output_ids = array("q", SPOKEN[:generated])
        other.output_ids = array("q", SPOKEN[:3])
        seen = steps(Batch(resumed, other), 3, overlap=overlap)
        for number, (mine, others) in enumerate(seen):
            lag = overlap and number > 0
            assert mine == Told(counted(SPOKEN[: generated + number - lag]), may_stop=generated + number >= 3)
            assert others == Told(counted(SPOKEN[: 3 + number - lag]), may_stop=3 + number >= 5)
