"""Chat templates render as their authors meant, and cannot reach out or eat the machine."""

from __future__ import annotations

import threading

import pytest

from octavo_engine.errors import InvalidRequestError
from octavo_engine.tokenizer import sandbox
from octavo_engine.tokenizer.chat_template import ChatTemplates

USER = [{"role": "user", "content": "hi"}]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def render(
    source: str | None, messages=USER, *, named=None, tools=None, generate=True, final=False, **variables
) -> str:
    return ChatTemplates(named or {}).render(
        messages,
        tools=tools,
        chat_template=source,
        add_generation_prompt=generate,
        continue_final_message=final,
        variables=variables,
    )


def test_messages_and_generation_prompt_are_written() -> None:
    assert render(CHATML) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert render(CHATML, generate=False) == "<|im_start|>user\nhi<|im_end|>\n"


def test_blocks_leave_no_blank_lines() -> None:
    assert render("a\n  {% if true %}\nb\n  {% endif %}\nc") == "a\nb\nc"


def test_the_variables_templates_know_from_transformers_are_there() -> None:
    source = (
        "{{ bos_token }}{{ strftime_now('%Y') | length }}{{ thinking }}{% for x in [1, 2] %}{% break %}{% endfor %}"
    )
    assert render(source, bos_token="<s>", thinking=False) == "<s>4False"


def test_json_is_written_without_html_escapes() -> None:
    assert render("{{ messages[0] | tojson }}", [{"a": "<é>&'"}]) == '{"a": "<é>&\'"}'
    assert render("{{ {'b': [1]} | tojson(indent=1) }}") == '{\n "b": [\n  1\n ]\n}'


def test_loop_variables_work_as_in_plain_jinja() -> None:
    source = "{% for m in messages %}{{ loop.index }}/{{ loop.length }}{{ loop.first }}{{ loop.last }} {% endfor %}"
    assert render(source, USER * 2) == "1/2TrueFalse 2/2FalseTrue "
    assert render("{% for k, v in {'a': 1}.items() %}{{ k ~ v ~ [none, 'x'] }}{{ loop.last }}{% endfor %}") == (
        "a1[None, 'x']True"
    )


def test_text_is_formatted_as_in_python() -> None:
    assert render("{{ '%s-%03d' % ('a', 7) }}{{ '%s' | format('b') }}{{ 7 % 4 }}") == "a-007b3"


def test_generation_blocks_render_as_their_content() -> None:
    assert render("{% generation %}{{ messages[0].content }}{% endgeneration %}!") == "hi!"


def test_tools_choose_the_tool_template() -> None:
    named = {"default": "plain", "tool_use": "{{ tools[0].name }}"}
    assert render(None, named=named) == "plain"
    assert render(None, named=named, tools=[{"name": "f"}]) == "f"


def test_a_model_without_template_says_what_to_do() -> None:
    with pytest.raises(InvalidRequestError, match="/v1/completions") as caught:
        render(None)
    assert caught.value.param == "messages"


def test_a_template_that_refuses_is_quoted() -> None:
    with pytest.raises(InvalidRequestError, match="roles must alternate") as caught:
        render("{{ raise_exception('roles must alternate') }}")
    assert caught.value.param == "messages"


@pytest.mark.parametrize(
    "source", ["{% if %}", "{{ }", "{% for %}", "{% nosuch %}", "{{ 1 | nosuch }}", "(" * 50 + "{{"]
)
def test_a_template_that_cannot_be_compiled_is_the_template_s_fault(source: str) -> None:
    with pytest.raises(InvalidRequestError, match="cannot be compiled") as caught:
        render(source + "{% if %}")
    assert caught.value.param == "chat_template"


def test_text_parts_are_joined_for_templates_that_want_strings() -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    assert render(CHATML, parts, generate=False) == "<|im_start|>user\na\nb<|im_end|>\n"


def test_parts_reach_templates_that_look_into_them() -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}]}]
    source = "{% for p in messages[0].content %}[{{ p.text }}]{% endfor %}"
    assert render(source.replace("messages[0].content", "messages[0]['content']"), parts) == "[a]"
    assert render("{% if messages[0].content is string %}s{% else %}l{% endif %}", parts) == "l"


def test_a_part_that_is_no_text_names_its_place() -> None:
    parts = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]
    with pytest.raises(InvalidRequestError, match=r"messages\[0\].content\[0\]"):
        render(CHATML, parts)


def test_arguments_of_tool_calls_come_as_objects() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    messages = [{"role": "assistant", "content": None, "tool_calls": [call]}]
    assert render("{{ messages[0].tool_calls[0].function.arguments.x }}", messages) == "1"
    call["function"]["arguments"] = "{"
    with pytest.raises(InvalidRequestError, match=r"messages\[0\].tool_calls\[0\].function.arguments"):
        render("x", messages)


def test_the_last_message_can_be_continued() -> None:
    messages = [*USER, {"role": "assistant", "content": "Once upon "}]
    assert render(CHATML, messages, generate=False, final=True).endswith("<|im_start|>assistant\nOnce upon ")
    with pytest.raises(InvalidRequestError, match="cannot be combined"):
        render(CHATML, messages, generate=True, final=True)
    with pytest.raises(InvalidRequestError, match="no text to go on with"):
        render(CHATML, [{"role": "assistant", "content": ""}], generate=False, final=True)


@pytest.mark.parametrize("name", ["messages", "tools", "add_generation_prompt"])
def test_reserved_variables_cannot_be_set(name: str) -> None:
    with pytest.raises(InvalidRequestError, match="cannot be set"):
        ChatTemplates({"default": CHATML}).render(
            USER,
            tools=None,
            chat_template=None,
            add_generation_prompt=True,
            continue_final_message=False,
            variables={name: 1},
        )


ESCAPES = [
    "{{ ''.__class__ }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__init__.__globals__ }}",
    "{{ raise_exception.__globals__ }}",
    "{{ strftime_now.__globals__['os'].system('id') }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ self.__init__.__globals__ }}",
    "{{ self._TemplateReference__context }}",
    "{{ cycler.__init__.__globals__.os }}",
    "{{ lipsum.__globals__ }}",
    "{{ joiner.__init__.__globals__ }}",
    "{{ ''|attr('__class__') }}",
    "{{ ''|attr('\\x5f\\x5fclass\\x5f\\x5f') }}",
    "{{ messages|map(attribute='__class__')|list }}",
    "{{ [messages]|map('attr', '__class__')|list }}",
    "{{ (messages|groupby('__class__'))[0] }}",
    "{{ '{0.__class__}'.format('') }}",
    "{{ '%s'.__mod__ }}",
    "{{ range.__self__ }}",
    "{{ dict.fromkeys.__self__.__mro__ }}",
    "{{ dict.mro() }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update({'a': 1}) }}",
    "{{ messages[0].__setitem__('a', 1) }}",
    "{{ ().__reduce__() }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}{{ os }}",
    "{% extends 'x' %}",
    "{{ loop.__class__ }}",
    "{% for x in [1] %}{{ loop.__init__.__globals__ }}{% endfor %}",
    "{% macro m() %}{% endmacro %}{{ m.__globals__ }}",
    "{% macro m() %}{% endmacro %}{{ m._func.__globals__ }}",
    "{% macro m() %}{{ caller.__class__ }}{% endmacro %}{% call m() %}{% endcall %}",
    "{{ request.application.__globals__ }}",
    "{{ config.__class__ }}",
    "{{ get_flashed_messages.__globals__ }}",
    "{{ environment.__class__ }}",
    "{{ messages|tojson.__class__ }}",
    "{{ messages|xmlattr }}",
]


@pytest.mark.parametrize("source", ESCAPES)
def test_templates_cannot_reach_python(source: str) -> None:
    try:
        written = render(source)
    except InvalidRequestError:
        return
    assert not any(word in written for word in ("class", "module", "function", "root:", "<built-in", "object at"))
    assert USER == [{"role": "user", "content": "hi"}]


DOUBLING = "{% set n = namespace(x='x' * 1000) %}{% for i in range(60) %}{% set n.x = EXPR %}{% endfor %}{{ n.x }}"
BOMBS = [
    "{{ 'x' * 10**9 }}",
    "{{ 10**9 * 'x' }}",
    "{{ [0] * 10**9 }}",
    "{{ 9 ** 9 ** 9 }}",
    "{{ range(10**10) | list }}",
    "{% for a in range(10**6) %}{% for b in range(10**6) %}{% endfor %}{% endfor %}",
    "{% for a in range(10**6) %}{{ messages }}{{ 'x' * 1000 }}{% endfor %}",
    DOUBLING.replace("EXPR", "n.x + n.x"),
    DOUBLING.replace("EXPR", "n.x ~ n.x"),
    DOUBLING.replace("EXPR", "n.x * 2"),
    DOUBLING.replace("EXPR", "[n.x, n.x] | join"),
    DOUBLING.replace("EXPR", "''.join([n.x, n.x])"),
    DOUBLING.replace("EXPR", "n.x.replace('x', 'xx')"),
    DOUBLING.replace("EXPR", "n.x | replace('x', 'xx')"),
    DOUBLING.replace("EXPR", "[n.x, n.x]"),
    DOUBLING.replace("EXPR", "{'a': n.x, 'b': n.x}").replace("{{ n.x }}", "{{ n.x | tojson }}"),
    DOUBLING.replace("EXPR", "[n.x, n.x]").replace("{{ n.x }}", "{{ n.x | string | length }}"),
    "{% set n = namespace(x='x') %}{% for i in range(60) %}{% set y %}{{ n.x }}{{ n.x }}{% endset %}"
    "{% set n.x = y %}{% endfor %}",
    "{{ '%999999999d' % 1 }}",
    "{{ '%999999999d' | format(1) }}",
    "{{ '%*d' % (999999999, 1) }}",
    "{{ '{:>999999999}'.format(1) }}",
    "{{ 'x'.ljust(10**9) }}",
    "{{ 'x'.center(10**9) }}",
    "{{ 'x' | center(10**9) }}",
    "{{ '1'.zfill(10**9) }}",
    "{{ '\t'.expandtabs(10**9) }}",
    "{{ 'a\na' | indent(10**9) }}",
    "{{ 'a\na' | indent('x' * 10**6) }}",
    "{{ [1] | tojson(indent=10**9) }}",
    "{% macro m(d) %}{{ m(d + 1) }}{{ m(d + 1) }}{% endmacro %}{{ m(0) }}",
    "{% macro m(d) %}{% if d < 40 %}{{ m(d + 1) }}{{ m(d + 1) }}{% endif %}{% endmacro %}{{ m(0) }}",
    "{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "{{ lipsum(n=10**6) }}",
    "{{ 'x' | wordwrap(1, wrapstring='x' * 10**7) }}",
    "{{ messages | batch(10**9, 'x') | list }}",
    "{{ messages | slice(10**9, 'x') | list }}",
    "{{ " + "(" * 5_000 + "1" + ")" * 5_000 + " }}",
    "{% for a in messages %}" * 300 + "{% endfor %}" * 300,
    "x" * (2 << 20),
]


@pytest.mark.parametrize("source", BOMBS, ids=range(len(BOMBS)))
def test_templates_cannot_eat_the_machine(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, limit in (("MAX_OUTPUT_CHARS", 200_000), ("MAX_VALUE_CHARS", 200_000), ("MAX_STEPS", 20_000)):
        monkeypatch.setattr(sandbox, name, limit)
    with pytest.raises(InvalidRequestError):
        render(source)


def test_a_template_that_only_runs_long_is_ended_by_the_clock() -> None:
    times = iter(range(0, 10**9, 1))
    budget = sandbox.Budget(clock=lambda: float(next(times)))
    environment = sandbox.ChatEnvironment()
    template = environment.from_string("{% for i in range(100000) %}{% endfor %}")
    with pytest.raises(Exception, match="too long"):
        environment.render_bounded(template, {}, budget)


def test_rendering_in_many_threads_at_once_does_not_mix() -> None:
    templates = ChatTemplates({"default": CHATML})
    failures: list[str] = []

    def work(number: int) -> None:
        messages = [{"role": "user", "content": f"m{number}"}]
        for _ in range(20):
            text = templates.render(
                messages,
                tools=None,
                chat_template=None,
                add_generation_prompt=False,
                continue_final_message=False,
                variables={},
            )
            if text != f"<|im_start|>user\nm{number}<|im_end|>\n":
                failures.append(text)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
