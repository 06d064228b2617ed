"""How planner, coder and reviewer take turns over one conversation: what each is told, and what it should answer.

One request is one round: the planner names the steps, the coder writes the expression, the reviewer says what should
stand there. The conversation keeps of that a verdict: a small model can write what is right, and comparing needs no
model. All read the whole conversation, earlier rounds too. The demo asks and training teaches by the same messages.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any, Final, Literal

from examples.demo.exercises import Request, Split, draw_request, wrong_code

Role = Literal["planner", "coder", "reviewer"]
ROLES: Final[tuple[Role, ...]] = ("planner", "coder", "reviewer")

SYSTEM: Final = "A planner, a coder and a reviewer answer requests in Python. xs is a list of numbers, ws of words."
TOLD: Final[dict[Role, str]] = {
    "planner": "{request}\nPlanner, name the steps.",
    "coder": "Coder, write the expression.",
    "reviewer": "Reviewer, is it right?",
}
RIGHT: Final = "right"
WRONG: Final = "wrong: {code}"

_EARLIER_ROUNDS: Final = (0, 0, 0, 0, 0, 0, 0, 0, 1, 2)
"""How many rounds an example's conversation has before the one that it asks about; each as often as it stands here."""

Messages = list[dict[str, str]]


def answer_to(role: Role, request: Request) -> str:
    """What a role should say to a request."""
    return request.plan if role == "planner" else request.code


def kept_of(role: str, answer: str, *, code: str) -> str:
    """What the conversation keeps of an `answer`: of a reviewer's, whether it is what the coder wrote, `code`."""
    if role != "reviewer":
        return answer
    return RIGHT if answer.strip() == code.strip() else WRONG.format(code=answer.strip())


def messages_of(request: Request, *, code: str, until: Role | None = None) -> Messages:
    """One round in which the coder wrote `code`; up to the question to `until`, or whole."""
    messages: Messages = []
    for role in ROLES:
        messages.append({"role": "user", "content": TOLD[role].format(request=request.text)})
        if role == until:
            break
        said = code if role == "coder" else kept_of(role, answer_to(role, request), code=code)
        messages.append({"role": "assistant", "content": said})
    return messages


def examples(role: Role, split: Split, *, count: int, seed: int) -> Iterator[dict[str, Any]]:
    """Records for `prefillshare train` and for `eval sharing-curve`: a conversation, and this role's answer.

    Of the requests to be answered none occurs twice, and in a test all combinations are held out. In every second
    example of the reviewer the code is wrong, as it is in one of five earlier rounds.
    """
    generator = random.Random(f"{role}/{split}/{seed}")
    seen: set[str] = set()
    while len(seen) < count:
        request = draw_request(generator, split)
        if request.text in seen:
            continue
        seen.add(request.text)
        messages: Messages = [{"role": "system", "content": SYSTEM}]
        for _ in range(generator.choice(_EARLIER_ROUNDS)):
            earlier = draw_request(generator, "train")
            code = wrong_code(earlier, generator) if generator.random() < 0.2 else earlier.code
            messages += messages_of(earlier, code=code)
        code = wrong_code(request, generator) if role == "reviewer" and generator.random() < 0.5 else request.code
        messages += messages_of(request, code=code, until=role)
        answered = "completion" if split == "train" else "answer"
        yield {"prompt": messages, answered: answer_to(role, request)}
