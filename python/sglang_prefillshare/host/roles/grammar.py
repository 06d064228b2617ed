"""Grammars that leave no token: such a request gets an error, and the others of its batch what they asked for.

Only decode workers have any: prefill samples without (`prefill.create_generation_req`).

A grammar can be empty (`root ::= root`), can ask for what the vocabulary cannot spell, or can end while
`min_new_tokens` forbids every end. Each logit of such a row is then -inf, its probabilities are NaN, and sampling from
NaN ends the process on a CPU and is undefined on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from http import HTTPStatus
from typing import Any, Final

_REJECTED: Final = "Grammar accept_token failed"
"""How SGLang's message begins where a sampled token is not one that the grammar allows."""
NO_TOKEN: Final = (
    "No token of the vocabulary fits what the request asks for: its grammar (regex, ebnf, json_schema, "
    "response_format, structural_tag) allows none here, or only the end, which min_new_tokens forbids. Mend the "
    "grammar or leave min_new_tokens out."
)


def sample(
    original: Callable[..., Any], self: Any, logits_output: Any, sampling_info: Any, *args: Any, **kw: Any
) -> Any:
    """Give rows without a possible token even chances, for their grammar to reject what comes out.

    Logits are float [requests, vocabulary], changed in place, on their device and without waiting for it. Only batches
    with a grammar are looked at.
    """
    logits = logits_output.next_token_logits
    if sampling_info.grammars and logits is not None:
        has_none = ~logits.amax(dim=-1, keepdim=True).isfinite()
        logits.masked_fill_(has_none, 0.0)
    return original(self, logits_output, sampling_info, *args, **kw)


def accept_tokens(original: Callable[..., Any], self: Any, req: Any, tokens: Any) -> Any:
    """A decode step's tokens."""
    retained = original(self, req, tokens)
    blame_request(req)
    return retained


def apply_prefill(original: Callable[..., None], self: Any, *, req: Any, **more: Any) -> None:
    """The token after a prompt, where prompts are computed."""
    original(self, req=req, **more)
    blame_request(req)


def blame_request(req: Any) -> None:
    """Turn SGLang's 500 for a token that the grammar rejects into a 400 that says what to change."""
    ended = req.to_finish
    if ended is not None and str(getattr(ended, "message", "")).startswith(_REJECTED):
        req.to_finish = type(ended)(NO_TOKEN, HTTPStatus.BAD_REQUEST, "BadRequestError")
