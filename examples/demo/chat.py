"""The demo's program through the `openai` client, streaming: agents that know nothing of SGLang."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai

from examples.demo.program import Call, OnText, Script, Stopwatch
from sglang_prefillshare.errors import PrefillShareError

CLIENT = "openai"
REQUEST_TIMEOUT_S = 600.0


def run(script: Script, on_text: OnText, *, url: str) -> Iterator[Call]:
    """Make the script's calls, one after another. An agent is the `model` of a request, all at one URL."""
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="unused", timeout=REQUEST_TIMEOUT_S, max_retries=0)
    messages: list[Any] = [{"role": "system", "content": script.system}]
    calls: list[Call] = []
    with client:
        for step in script.steps:
            messages.append({"role": "user", "content": step.message})
            watch = Stopwatch()
            stream = client.chat.completions.create(
                model=step.model,
                messages=messages,
                max_tokens=script.max_new_tokens,
                temperature=0.0,
                stream=True,
                stream_options={"include_usage": True},
                # SGLang's extension: at the end of the stream, the ids of all tokens, for the oracle.
                extra_body={"return_input_ids_in_sglext": True, "return_output_ids_in_sglext": True},
            )
            answer, rid, ids, cached = "", "", None, 0
            for chunk in stream:
                rid = chunk.id
                ids = getattr(chunk, "sglext", None) or ids
                if chunk.usage is not None and chunk.usage.prompt_tokens_details is not None:
                    cached = chunk.usage.prompt_tokens_details.cached_tokens or 0
                if not chunk.choices:
                    continue
                choice = chunk.choices[0]
                if choice.finish_reason == "abort":
                    raise PrefillShareError(f"{step.model} gave up its answer after {answer!r}.")
                if text := choice.delta.content:
                    watch.text_came()
                    answer += text
                    on_text(text)
            if ids is None:
                raise PrefillShareError(f"{step.model} ended its stream without token ids, after {answer!r}.")
            call = Call(
                client=CLIENT,
                turn=step.turn,
                model=step.model,
                rid=rid,
                prompt_ids=tuple(ids["input_ids"]),
                answer_ids=tuple(ids["output_ids"][0]),
                answer=answer,
                cached_tokens=cached,
                ttft_ms=watch.ttft_ms,
                e2e_ms=watch.elapsed_ms,
            )
            yield call
            messages.append({"role": "assistant", "content": script.kept(step, answer, calls)})
            calls.append(call)
