from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from sglang_prefillshare.errors import ConfigError
from sglang_prefillshare.training.data import ExampleSet, Prepared, base_token_count, draw_share, prepare
from sglang_prefillshare.training.recipe import Columns, Data, RandomShare, Source
from test.support.models import make_tokenizer
from test.training.toys import write_jsonl

CHAT: list[dict[str, Any]] = [
    {"role": "system", "content": "Answer in one short sentence."},
    {"role": "user", "content": "What is the capital of France?"},
    {"role": "assistant", "content": "Paris."},
    {"role": "user", "content": "Which numbers are prime?"},
    {"role": "assistant", "content": "2, 3 and 5."},
]
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {"name": "add", "parameters": {"type": "object", "properties": {"first": {"type": "integer"}}}},
}


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


def prepared(folder: Path, records: Sequence[Any], tokenizer: Any, **settings: Any) -> Prepared:
    source = Source(path=str(write_jsonl(folder / "data.jsonl", records)))
    return prepare([source], Data(train=(source,), **settings), tokenizer)


def texts(part: Prepared, tokenizer: Any) -> list[tuple[str, str]]:
    return [(tokenizer.decode(example.prompt), tokenizer.decode(example.response)) for example in part.examples]


def test_prompt_and_completion_are_tokenised_apart_and_end_with_eos(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    # "Please ans" + "wer in" tokenised together would join over the boundary.
    part = prepared(tmp_path, [{"prompt": "Please ans", "completion": "wer in"}], tokenizer)
    (example,) = part.examples
    assert example.prompt.tolist() == tokenizer("Please ans")["input_ids"]
    wanted = [*tokenizer("wer in", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    assert example.response.tolist() == wanted
    joined = tokenizer("Please answer in")["input_ids"]
    assert [*example.prompt, *example.response[:-1]] != joined


def test_plain_prompts_get_the_tokenizers_own_special_tokens(tmp_path: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer().__class__(
        tokenizer_object=make_tokenizer().backend_tokenizer.__class__.from_str(
            make_tokenizer().backend_tokenizer.to_str()
        ),
        bos_token="<|bos|>",
        eos_token="<|im_end|>",
    )
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", bos)]
    )
    (example,) = prepared(tmp_path, [{"prompt": "add", "completion": "add"}], tokenizer).examples
    assert example.prompt[0] == bos and bos not in example.response


def test_eos_is_not_doubled_and_can_be_left_out(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    record = {"prompt": "two words", "completion": "yes<|im_end|>"}
    (example,) = prepared(tmp_path, [record], tokenizer).examples
    assert example.response.tolist().count(tokenizer.eos_token_id) == 1
    record = {"prompt": "two words", "completion": "yes"}
    (example,) = prepared(tmp_path, [record], tokenizer, append_eos=False).examples
    assert tokenizer.eos_token_id not in example.response


def test_every_assistant_turn_is_an_example_whose_prompt_holds_the_earlier_answers(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    part = prepared(tmp_path, [{"messages": CHAT}], tokenizer)
    found = texts(part, tokenizer)
    assert [response for _, response in found] == ["Paris.<|im_end|>", "2, 3 and 5.<|im_end|>"]
    for (prompt, _), count in zip(found, (2, 4), strict=True):
        assert prompt == tokenizer.apply_chat_template(CHAT[:count], add_generation_prompt=True, tokenize=False)
    assert "Paris.<|im_end|>" in found[1][0]


def test_conversational_prompt_and_completion_learn_the_completion_only(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    part = prepared(tmp_path, [{"prompt": CHAT[:4], "completion": CHAT[4:]}], tokenizer)
    assert texts(part, tokenizer) == [texts(prepared(tmp_path, [{"messages": CHAT}], tokenizer), tokenizer)[1]]
    part = prepared(tmp_path, [{"prompt": CHAT[:4], "completion": "2, 3 and 5."}], tokenizer)
    assert texts(part, tokenizer)[0][1] == "2, 3 and 5.<|im_end|>"


def test_other_column_names_and_other_sources(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    record = {"question": "two words", "answer": "yes"}
    columns = Columns(prompt="question", completion="answer")
    assert len(prepared(tmp_path, [record], tokenizer, columns=columns).examples) == 1

    import datasets

    datasets.Dataset.from_list([record] * 3).save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "list.json").write_text(json.dumps([record, record]))
    for path, count in (("saved", 3), ("list.json", 2)):
        source = Source(path=str(tmp_path / path))
        assert len(prepare([source], Data(train=(source,), columns=columns), tokenizer).examples) == count


def test_a_template_that_rewrites_past_answers_teaches_the_plain_content(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    template = tokenizer.chat_template
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m['role'][0] }}]{{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    try:
        part = prepared(tmp_path, [{"messages": CHAT[:3]}], tokenizer)
        assert texts(part, tokenizer)[0][1] == "Paris.<|im_end|>"
        calls = [{"function": {"name": "add", "arguments": {}}}]
        asked = [*CHAT[:2], {"role": "assistant", "content": "", "tool_calls": calls}]
        with pytest.raises(ConfigError, match="1 with tool calls elsewhere than behind the generation prompt"):
            prepared(tmp_path, [{"messages": asked}], tokenizer)
        thought = [*CHAT[:2], CHAT[2] | {"reasoning_content": "Hm."}]
        with pytest.raises(ConfigError, match="1 with reasoning elsewhere than behind the generation prompt"):
            prepared(tmp_path, [{"messages": thought}], tokenizer)
    finally:
        tokenizer.chat_template = template


BAD = {
    "an empty response": {"prompt": "two words", "completion": "  "},
    "an empty prompt": {"prompt": "", "completion": "yes"},
    "a prompt of one token": {"prompt": "a", "completion": "yes"},
    "a prompt that leaves no room": {"prompt": "word " * 60, "completion": "yes"},
    "more tokens than max_length": {"prompt": "two words", "completion": "yes " * 60},
    "no assistant turn": {"messages": CHAT[:2]},
}
GOOD = {"prompt": "two words", "completion": "yes"}


def test_what_cannot_be_learned_from_is_counted_and_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ConfigError) as refused:
        prepared(tmp_path, [GOOD, *BAD.values(), BAD["an empty response"]], tokenizer, max_length=40)
    message = str(refused.value)
    assert "7 of 8 examples cannot be learned from" in message
    assert f"2 with an empty response (first {tmp_path / 'data.jsonl'}:2)" in message
    assert all(reason in message for reason in BAD)
    assert "drop_invalid: true" in message


def test_what_cannot_be_learned_from_is_dropped_on_request(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    part = prepared(tmp_path, [GOOD, *BAD.values()], tokenizer, max_length=40, drop_invalid=True)
    assert len(part.examples) == 1 and part.dropped.total == len(BAD)
    with pytest.raises(ConfigError, match="no example to learn from, all 1 dropped"):
        prepared(tmp_path, [BAD["an empty prompt"]], tokenizer, drop_invalid=True)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "data.jsonl:2: not valid JSON"),
        ("[1]", "data.jsonl:2: a record is list, wanted an object"),
        ('{"question": "a"}', "data.jsonl:2: keys question, not prompt; wanted prompt and completion"),
        ('{"prompt": "a", "completion": 3}', "data.jsonl:2: completion is int; wanted"),
        ('{"prompt": "a", "completion": []}', "completion is messages. Give both in the same form"),
        ('{"messages": "a"}', "messages is str, wanted a list of messages"),
        ('{"messages": [{"role": "user"}, 3]}', r"messages\[1\] is 3, wanted an object with role and content"),
        ('{"messages": [{"role": "user", "content": [{"type": "image"}]}]}', "content is list, wanted text"),
        (
            '{"messages": [{"role": "assistant", "tool_calls": [{"function": {"arguments": {}}}]}]}',
            "wanted an object with function: {name, arguments}",
        ),
        (
            '{"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": [1]}}]}]}',
            "arguments of f are .1., wanted an object",
        ),
        ('{"messages": [{"role": "user", "content": "a"}], "tools": [3]}', r"tools\[0\] is 3, wanted a function"),
    ],
)
def test_records_of_another_form_are_named(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, line: str, message: str
) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + line + "\n")
    source = Source(path=str(path))
    with pytest.raises(ConfigError, match=message):
        prepare([source], Data(train=(source,)), tokenizer)


def test_a_dataset_that_cannot_be_loaded_is_named(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    source = Source(path=str(tmp_path / "empty"))
    with pytest.raises(ConfigError, match="cannot load dataset"):
        prepare([source], Data(train=(source,)), tokenizer)


# What a chat template leaves out


def template(answer: str, opening: str = "") -> str:
    """A chat template that writes answers as `answer` does, of `m`, behind a generation prompt with `opening`."""
    return (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
        + answer
        + "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
        + "{% if add_generation_prompt %}<|im_start|>assistant\n"
        + opening
        + "{% endif %}"
    )


def call(name: str, arguments: dict[str, Any] | str) -> dict[str, Any]:
    return {"id": "1", "type": "function", "function": {"name": name, "arguments": arguments}}


def answered(tokenizer: Any, folder: Path, style: str, answer: dict[str, Any], opening: str = "") -> str:
    """What is learned of `answer` under a template of this style; `ConfigError` where it is refused."""
    own = make_tokenizer().__class__(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|im_end|>")
    own.chat_template = template(style, opening)
    said = {"role": "assistant", "content": ""} | answer
    (example,) = prepared(folder, [{"messages": [*CHAT[:2], said], "tools": [TOOL]}], own).examples
    return str(own.decode(example.response)).removesuffix("<|im_end|>")


AS_JSON = (
    "{{ m.content }}{% for c in m.tool_calls %}"
    '<call>{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}</call>{% endfor %}'
)
AS_TAGS = (
    "{{ m.content }}{% for c in m.tool_calls %}<{{ c.function.name }}>"
    "{% for k, v in c.function.arguments.items() %}<{{ k }}>{{ v if v is string else v | tojson }}</{{ k }}>"
    "{% endfor %}</{{ c.function.name }}>{% endfor %}"
)
AS_PYTHON = (
    "{{ m.content }}[{% for c in m.tool_calls %}{{ c.function.name }}({% for k, v in c.function.arguments.items() %}"
    "{{ k }}={% if v is boolean %}{{ 'True' if v else 'False' }}{% else %}{{ v }}{% endif %}, {% endfor %})"
    "{% endfor %}]"
)
IN_A_FENCE = (
    "{% for c in m.tool_calls %}```{{ {'parameters': c.function.arguments, 'function': c.function.name} | "
    "tojson(indent=2) }}```{% endfor %}{{ m.content | trim }}"
)
AS_JSON_OF_ALL = "{{ {'c': m.content, 't': m.tool_calls} | tojson }}"
ONE_TOOL = (
    "{{ m.content }}{% for c in m.tool_calls %}{% if c.function.name != 'add' %}{{ raise_exception('unknown') }}"
    "{% endif %}{{ c.function.name }} {{ c.function.arguments | tojson }}{% endfor %}"
)
THINKING = (
    "{% set r = m.reasoning_content or '' %}{% set c = m.content %}{% if '</think>' in c %}"
    "{% set r = c.split('</think>')[0].split('<think>')[-1] %}{% set c = c.split('</think>')[-1] %}{% endif %}"
    "<think>\n{{ r | trim }}\n</think>\n\n{{ c | trim }}"
)
CALLS = {
    "two": [call("add", {"first": 1, "second": 11}), call("add", {"first": 1})],
    "twice the same": [call("add", {"first": 1}), call("add", {"first": 1})],
    "text": [call("add", {"why": ' "so" <b>\n it’s é ', "none": None, "empty": ""})],
    "JSON text": [call("add", '{"second" : 2.50, "first": 1e-05}')],
    "switches": [call("add", {"is_exact": False, "is_loud": True})],
    "parts": [call("add", {"first": [1, {"a": []}, {}], "second": {"b": [True, None]}})],
    "none": [call("add", {})],
}


@pytest.mark.parametrize(
    "style",
    [AS_JSON, AS_TAGS, AS_PYTHON, IN_A_FENCE, AS_JSON_OF_ALL, ONE_TOOL],
    ids=["JSON", "tags", "Python", "fence", "JSON of all", "one tool"],
)
@pytest.mark.parametrize("calls", CALLS.values(), ids=CALLS.keys())
@pytest.mark.parametrize("content", ["", " I'll  add “it”.\n\nNow. \n"], ids=["alone", "with content"])
def test_tool_calls_may_be_written_in_any_way(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, style: str, calls: list[dict[str, Any]], content: str
) -> None:
    response = answered(tokenizer, tmp_path, style, {"content": content, "tool_calls": calls})
    assert response.count("add") - content.count("add") >= len(calls)


@pytest.mark.parametrize(
    ("answer", "opening", "response"),
    [
        ({"content": "So.", "reasoning_content": " Hm,\n is it? "}, "", "<think>\nHm,\n is it?\n</think>\n\nSo."),
        ({"content": "<think>Hm.</think>So."}, "", "<think>\nHm.\n</think>\n\nSo."),
        ({"content": "<think>Hm.</think>So."}, "<think>\n", "Hm.\n</think>\n\nSo."),
        ({"content": " So. \n"}, "<think>\n\n</think>\n\n", "So."),
        ({"content": "So.<|im_end|>"}, "", "<think>\n\n</think>\n\nSo."),
    ],
)
def test_reasoning_and_content_may_be_set_apart_and_trimmed(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, answer: dict[str, Any], opening: str, response: str
) -> None:
    assert answered(tokenizer, tmp_path, THINKING, answer, opening) == response


ADDING = {"content": "I add.", "tool_calls": [call("add", {"first": 1, "second": {"name": "b", "is_exact": True}})]}
TWICE = {"content": "", "tool_calls": [call("add", {"first": 1}), call("add", {"first": 1})]}
LOSSY: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "no calls": ("{{ m.content }}", ADDING, "tool calls", "tool_calls[0].function.name"),
    "no calls, no content": ("{{ m.content }}", TWICE, "tool calls", "tool_calls[0].function.name"),
    "how many calls": ("{{ m.tool_calls | length }} calls", TWICE, "tool calls", "tool_calls[0].function.name"),
    "the first call": (
        "{{ m.tool_calls[0].function.name }}{{ m.tool_calls[0].function.arguments }}",
        TWICE,
        "tool calls",
        "tool_calls[1].function.name",
    ),
    "names": (
        "{{ m.content }}{% for c in m.tool_calls %}{{ c.function.name }}{% endfor %}",
        ADDING,
        "tool calls",
        "tool_calls[0].function.arguments.first",
    ),
    "numbers": (
        "{{ m.content }}{% for c in m.tool_calls %}{{ c.function.name }}"
        "{% for v in c.function.arguments.values() if v is number %}{{ v }}{% endfor %}{% endfor %}",
        ADDING,
        "tool calls",
        "tool_calls[0].function.arguments.second.name",
    ),
    "no switches": (
        "{{ m.content }}{% for c in m.tool_calls %}{{ c.function.name }}{{ c.function.arguments.first }}"
        "{{ c.function.arguments.second.name }}{% endfor %}",
        ADDING,
        "tool calls",
        "tool_calls[0].function.arguments.second.is_exact",
    ),
    "calls behind the end": (AS_JSON.replace("{% for", "<|im_end|>{% for"), ADDING, "tool calls", "tool_calls[0]"),
    "calls or content": (
        "{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% else %}{{ m.content }}{% endif %}",
        ADDING,
        "content",
        "content",
    ),
    "half of the content": ("{{ m.content[:9] }}", {"content": "I cannot do that."}, "content", "content"),
    "content behind the end": ("{{ m.content }}", {"content": "Yes.<|im_end|>Or no."}, "content", "content"),
    "content with reasoning": (
        "{{ m.content.split('</think>')[-1] }}",
        {"content": "<think>Hm.</think>So."},
        "content",
        "content",
    ),
    "no reasoning": (
        "{{ m.content }}",
        {"content": "So.", "reasoning_content": "Hm."},
        "reasoning",
        "reasoning_content",
    ),
    "another name": (THINKING, {"content": "So.", "reasoning": "Hm."}, "reasoning", "reasoning"),
    "a third name": (THINKING, {"content": "So.", "thinking": "Hm."}, "reasoning", "thinking"),
    "a call of old": (
        AS_JSON,
        {"content": "So.", "function_call": {"name": "add", "arguments": "{}"}},
        "tool calls",
        "function_call",
    ),
}


@pytest.mark.parametrize(("style", "answer", "kind", "place"), LOSSY.values(), ids=LOSSY.keys())
def test_an_answer_that_the_template_renders_in_part_is_refused(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, style: str, answer: dict[str, Any], kind: str, place: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        answered(tokenizer, tmp_path, style, answer)
    message = str(refused.value)
    assert f"1 with {kind} that the rendered answer lacks (first {tmp_path / 'data.jsonl'}:1, {place}" in message
    assert "give a template that renders it (chat_template), or remove the field" in message


def test_answers_that_lost_something_are_counted_by_kind_and_dropped_on_request(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    calling = {"role": "assistant", "content": "", "tool_calls": TWICE["tool_calls"]}
    told = {"role": "tool", "content": "2", "tool_call_id": "1"}
    thinking = CHAT[4] | {"reasoning_content": "Hm."}
    records = [{"messages": [*CHAT[:2], calling, told, CHAT[2], *CHAT[3:]]}, {"messages": [*CHAT[:4], thinking]}]
    with pytest.raises(ConfigError) as refused:
        prepared(tmp_path, records, tokenizer)
    assert "2 of 5 examples cannot be learned from: 1 with tool calls" in str(refused.value)
    assert f"{tmp_path / 'data.jsonl'}:1, message 3, tool_calls[0].function.name); 1 with reason" in str(refused.value)
    part = prepared(tmp_path, records, tokenizer, drop_invalid=True)
    responses = [response for _, response in texts(part, tokenizer)]
    assert responses == ["Paris.<|im_end|>", "2, 3 and 5.<|im_end|>", "Paris.<|im_end|>"]
    # An earlier answer that the template does not show whole is what serving shows, too.
    assert part.dropped.total == 2


def test_a_byte_order_mark_is_no_part_of_the_data(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    lines, listed = tmp_path / "marked.jsonl", tmp_path / "marked.json"
    lines.write_text(json.dumps(GOOD) + "\n" + json.dumps(GOOD) + "\n", encoding="utf-8-sig")
    listed.write_text(json.dumps([GOOD]), encoding="utf-8-sig")
    assert lines.read_bytes().startswith(b"\xef\xbb\xbf")
    for path, count in ((lines, 2), (listed, 1)):
        source = Source(path=str(path))
        part = prepare([source], Data(train=(source,)), tokenizer)
        assert texts(part, tokenizer) == [("two words", "yes<|im_end|>")] * count


def test_shares_are_cut_to_whole_tokens_below_the_last() -> None:
    assert [base_token_count(9, share) for share in (0.0, 0.25, 0.5, 0.99, 1.0)] == [0, 2, 4, 7, 8]
    assert base_token_count(2, 0.99) == 0


def test_a_random_share_depends_on_seed_epoch_and_example_alone() -> None:
    share = RandomShare(random=0.5)

    def drawn(seed: int, epoch: int) -> list[float]:
        return [draw_share(share, seed=seed, epoch=epoch, index=index) for index in range(400)]

    first = drawn(1, 0)
    assert first == drawn(1, 0)
    assert first != drawn(2, 0) and first != drawn(1, 1)
    assert 0.4 < sum(value == 1.0 for value in first) / 400 < 0.6
    below = sorted(value for value in first if value < 1)
    assert below[0] < 0.05 and below[-1] > 0.95 and 0.4 < sum(below) / len(below) < 0.6
    assert draw_share(0.25, seed=1, epoch=0, index=0) == 0.25


def test_an_example_sets_shares_follow_its_epoch(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    part = prepared(tmp_path, [{"prompt": "word " * 30, "completion": "yes"}] * 20, tokenizer)
    examples = ExampleSet(part.examples, share=RandomShare(random=1.0), seed=1)
    first = [examples[index].base_tokens for index in range(20)]
    examples.set_epoch(1)
    assert [examples[index].base_tokens for index in range(20)] != first
    examples.set_epoch(0)
    assert [examples[index].base_tokens for index in range(20)] == first


# Against SGLang's own code


@pytest.mark.parametrize(
    ("messages", "tools"),
    [
        (CHAT[:2], None),
        (CHAT[:4], None),
        (CHAT[:2], [TOOL]),
        (
            [
                *CHAT[:2],
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [
                        {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
                    ],
                },
                {"role": "tool", "content": "3", "tool_call_id": "1", "name": None},
            ],
            [TOOL | {"function": {"description": "Adds.", "strict": True, **TOOL["function"]}}],
        ),
    ],
    ids=["question", "history", "tool", "tool call"],
)
def test_prompts_are_the_token_ids_that_sglang_makes_of_the_request(
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerFast,
    messages: list[dict[str, Any]],
    tools: list[dict[str, Any]] | None,
) -> None:
    template = tokenizer.chat_template
    # A template that shows everything it is given.
    tokenizer.chat_template = (
        "{{ bos_token }}{% if tools %}{{ tools | tojson }}{% endif %}{% for message in messages %}"
        "{{ '<|im_start|>' + message | tojson + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    try:
        served = prompt_ids_of_sglang(tokenizer, messages, tools)
        record: Mapping[str, Any] = {"prompt": messages, "completion": "yes", "tools": tools}
        (example,) = prepared(tmp_path, [record], tokenizer).examples
        as_text: Mapping[str, Any] = {**record, "tools": json.dumps(tools)}
        (from_text,) = prepared(tmp_path, [as_text], tokenizer).examples
    finally:
        tokenizer.chat_template = template
    assert tokenizer.decode(example.prompt) == tokenizer.decode(served)
    assert example.prompt.tolist() == served == from_text.prompt.tolist()


def prompt_ids_of_sglang(
    tokenizer: Any, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None
) -> list[int]:
    pytest.importorskip("sglang", reason="compares with the installed SGLang")
    from sglang.srt.entrypoints.openai.protocol import ChatCompletionRequest
    from sglang.srt.entrypoints.openai.serving_chat import OpenAIServingChat

    request = ChatCompletionRequest(model="m", messages=messages, tools=tools)
    chat = object.__new__(OpenAIServingChat)
    chat.template_manager = SimpleNamespace(
        jinja_template_content_format="string",
        jinja_template_may_reorder_tool_results=False,
        python_chat_template=None,
        reasoning_config=None,
    )
    chat.tokenizer_manager = SimpleNamespace(tokenizer=tokenizer, served_model_name="m")
    chat.chat_encoding_spec = None
    chat._encoding_adapter = None
    chat.is_minimax_m3 = False
    chat.reasoning_parser = None
    chat._prompt_text_round_trip_is_lossy = False
    chat._tokenizer_auto_adds_specials = True
    chat._thinking_requested = lambda request: False
    chat._encode_messages = lambda *args, **kwargs: None
    dumped = [tool.model_dump() for tool in request.tools] if request.tools else None
    ids: list[int] = chat._apply_jinja_template(request, dumped, False).prompt_ids
    return ids
