"""The demo's program in SGLang's frontend language, each agent on the endpoint of its own decode module.

A program of the language runs on one backend. The router, or the unified server, gives every decode module a URL that
looks like a server of its own, so the same program runs for each agent on another backend, over a context that grows
from one to the next.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import sglang as sgl

from examples.demo.program import Call, OnText, Script, Step, Stopwatch
from sglang_prefillshare.errors import PrefillShareError

CLIENT = "frontend"


@sgl.function
def speak(s: Any, context: str, message: str, max_new_tokens: int) -> None:
    """One agent's turn: the context so far, what the agent is told, its answer."""
    s += context
    s += sgl.user(message)
    # With log-probabilities come the ids of the chosen tokens, which the oracle needs. An agent has no use for them.
    s += sgl.assistant(sgl.gen("answer", max_tokens=max_new_tokens, temperature=0.0, return_logprob=True))


@sgl.function
def open_conversation(s: Any, system: str) -> None:
    s += sgl.system(system)


@sgl.function
def append(s: Any, context: str, message: str, kept: str) -> None:
    """The context with a turn whose answer is known."""
    s += context
    s += sgl.user(message)
    s += sgl.assistant(kept)


def run(script: Script, on_text: OnText, *, url: str, tokenize: Callable[[str], Sequence[int]]) -> Iterator[Call]:
    """Make the script's calls, one after another.

    The seams between the messages are ChatML's tags. A tag is one token whatever stands beside it, so appending a
    message never changes how the text before it is split into tokens, and the base finds all of it again.
    """
    # The language cannot read a model's chat template from its folder; ChatML is what this model was trained on.
    backends = {model: sgl.RuntimeEndpoint(f"{url}/m/{model}", chat_template_name="chatml") for model in script.models}
    first = next(iter(backends.values()))
    context = open_conversation.run(script.system, backend=first).text()
    calls: list[Call] = []
    for step in script.steps:
        watch = Stopwatch()
        state = speak.run(context, step.message, script.max_new_tokens, backend=backends[step.model], stream=True)
        for text in state.text_iter("answer"):
            watch.text_came()
            on_text(text)
        if state.error() is not None:
            raise PrefillShareError(f"{step.model} did not answer the frontend program: {state.error()}")
        call = _call(step, state, watch, context=context, tokenize=tokenize)
        yield call
        kept = script.kept(step, call.answer, calls)
        context = append.run(context, step.message, kept, backend=first).text()
        calls.append(call)


def _call(step: Step, state: Any, watch: Stopwatch, *, context: str, tokenize: Callable[[str], Sequence[int]]) -> Call:
    e2e_ms = watch.elapsed_ms
    meta = state.get_meta_info("answer")
    reason = meta["finish_reason"]
    if reason["type"] == "abort":  # a stream that has begun cannot fail in any other way
        raise PrefillShareError(f"{step.model} gave up its answer: {reason.get('message')}")
    template = state.stream_executor.chat_template
    opening, _ = template.get_prefix_and_suffix("assistant", [])
    begin, end = template.get_prefix_and_suffix("user", [])
    prompt_ids = tokenize(f"{context}{begin}{step.message}{end}{opening}")
    if len(prompt_ids) != meta["prompt_tokens"]:
        raise PrefillShareError(
            f"the worker read {meta['prompt_tokens']} prompt tokens, our tokenizer makes {len(prompt_ids)}: "
            "the oracle could not be given what the worker was given."
        )
    chosen = meta["output_token_logprobs"]
    return Call(
        client=CLIENT,
        turn=step.turn,
        model=step.model,
        rid=meta["id"],
        prompt_ids=tuple(prompt_ids),
        answer_ids=tuple(int(token) for _, token, *_ in chosen),
        answer=state["answer"],
        log_probs=tuple(float(value) for value, *_ in chosen),
        cached_tokens=meta["cached_tokens"],
        ttft_ms=watch.ttft_ms,
        e2e_ms=e2e_ms,
    )
