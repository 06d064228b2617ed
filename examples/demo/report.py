"""From calls to figures: joins what the clients saw with what the router counted. Pure; `run.py` prints and writes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prometheus_client.parser import text_string_to_metric_families
from rich.table import Table

from examples.demo.oracle import common_prefix
from examples.demo.program import Call
from sglang_prefillshare.errors import PrefillShareError


@dataclass(frozen=True, slots=True)
class CallFigures:
    """One call's line of the table and of the report.

    `prefill_tokens` are those that the base had to hold: the prompt without its last token, which the decode module
    takes. `cross_model_cached_tokens` of them were found, and had been computed for another decode module.
    """

    client: str
    turn: int
    model: str
    prompt_tokens: int
    prefill_tokens: int
    cached_tokens: int
    cross_model_cached_tokens: int
    answer_tokens: int
    ttft_ms: float
    e2e_ms: float

    @property
    def computed_tokens(self) -> int:
        return self.prefill_tokens - self.cached_tokens

    def to_json(self) -> dict[str, Any]:
        return {
            "client": self.client,
            "turn": self.turn,
            "model": self.model,
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached_tokens,
            "cross_model_cached_tokens": self.cross_model_cached_tokens,
            "answer_tokens": self.answer_tokens,
            "ttft_ms": round(self.ttft_ms, 1),
            "e2e_ms": round(self.e2e_ms, 1),
        }


@dataclass(frozen=True, slots=True)
class HandoffFigures:
    """Bytes of the base's KV that decode workers needed: fetched from prefill, or held since an earlier call."""

    moved_bytes: int = 0
    held_bytes: int = 0


def handoff_figures(metrics: str) -> HandoffFigures:
    """From the router's /metrics page, which sums its workers' handoffs up."""
    samples = [sample for family in text_string_to_metric_families(metrics) for sample in family.samples]

    def total(source: str) -> int:
        labels = {"side": "decode", "source": source, "outcome": "ok"}
        name = "prefillshare_handoff_bytes_total"
        return int(sum(s.value for s in samples if s.name == name and labels.items() <= s.labels.items()))

    return HandoffFigures(moved_bytes=total("moved"), held_bytes=total("held"))


def figures(call: Call, record: Mapping[str, Any]) -> CallFigures:
    """`record` is the router's, from GET /calls. Raises `PrefillShareError` where it lacks a count or contradicts."""
    counts = {
        name: record[name] for name in ("prefill_tokens", "cached_tokens", "cross_model_cached_tokens", "ttft_ms")
    }
    missing = [name for name, value in counts.items() if value is None]
    if missing or record["model"] != call.model or counts["prefill_tokens"] != len(call.prompt_ids) - 1:
        raise PrefillShareError(
            f"the router's record of {call.rid} does not fit {call.model} and {len(call.prompt_ids)} prompt tokens: "
            f"it says {record['model']}, {counts}."
        )
    return CallFigures(
        client=call.client,
        turn=call.turn,
        model=call.model,
        prompt_tokens=len(call.prompt_ids),
        answer_tokens=len(call.answer_ids),
        e2e_ms=record["e2e_ms"],
        **counts,
    )


def own_figures(calls: Sequence[Call]) -> list[CallFigures]:
    """The figures of calls that one server answered: it says what it found, and times are the clients'.

    Whose the found tokens were follows from the calls before: the first whose prompt had them, in its place, made the
    base compute them.
    """
    first_of: dict[int, Any] = {}
    found = []
    for call in calls:
        if call.cached_tokens is None or call.ttft_ms is None or call.e2e_ms is None:
            raise PrefillShareError(f"the server's answer to {call.rid} does not say what it found, or had no text.")
        node, foreign = first_of, 0
        for index, token in enumerate(call.prompt_ids[:-1]):
            model, below = node.setdefault(token, (call.model, {}))
            foreign += index < call.cached_tokens and model != call.model
            node = below
        found.append(
            CallFigures(
                client=call.client,
                turn=call.turn,
                model=call.model,
                prompt_tokens=len(call.prompt_ids),
                prefill_tokens=len(call.prompt_ids) - 1,
                cached_tokens=call.cached_tokens,
                cross_model_cached_tokens=foreign,
                answer_tokens=len(call.answer_ids),
                ttft_ms=call.ttft_ms,
                e2e_ms=call.e2e_ms,
            )
        )
    return found


@dataclass(frozen=True, slots=True)
class SessionFigures:
    """One session's cost: what prefill computed for it, and how long its context is at the last call."""

    client: str
    computed_prompt_tokens: int
    final_context_tokens: int


def sessions(calls: Iterable[CallFigures]) -> list[SessionFigures]:
    by_client: dict[str, list[CallFigures]] = {}
    for call in calls:
        by_client.setdefault(call.client, []).append(call)
    return [
        SessionFigures(client, sum(call.computed_tokens for call in own), own[-1].prompt_tokens)
        for client, own in by_client.items()
    ]


def computed_without_sharing(calls: Sequence[Call]) -> int:
    """Prompt tokens that the models would have computed if each had served itself, with a cache of its own.

    To its credit, such a model also finds the KV of its own answers again: of all but an answer's last token, which
    was never read. As on any server, a prompt's last token is computed in any case.
    """
    seen: dict[str, list[tuple[int, ...]]] = {}
    computed = 0
    for call in calls:
        own = seen.setdefault(call.model, [])
        cached = max((common_prefix(context, call.prompt_ids) for context in own), default=0)
        computed += len(call.prompt_ids) - min(cached, len(call.prompt_ids) - 1)
        own.append((*call.prompt_ids, *call.answer_ids[:-1]))
    return computed


def table(calls: Iterable[CallFigures]) -> Table:
    view = Table(box=None, pad_edge=False, header_style="bold")
    view.add_column("client")
    view.add_column("turn", justify="right")
    view.add_column("model")
    for heading in ("prompt\ntokens", "of them\nreused", "computed for\nanother model", "TTFT\nms", "total\nms"):
        view.add_column(heading, justify="right")
    for call in calls:
        counts = (call.prompt_tokens, call.cached_tokens, call.cross_model_cached_tokens)
        view.add_row(
            call.client,
            str(call.turn),
            call.model,
            *(f"{count:,}" for count in counts),
            f"{call.ttft_ms:,.0f}",
            f"{call.e2e_ms:,.0f}",
        )
    return view
