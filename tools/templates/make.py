"""Writes what chat templates must render to, as Python's jinja2 renders them.

    pip install jinja2==3.1.6 && python tools/templates/make.py

Reads crates/text/testdata/templates/*.jinja, writes crates/text/testdata/chat_templates.json (whole conversations) and
crates/text/testdata/jinja_snippets.json (single features of the language). The environment is set up as
transformers 5.23 sets up its own: an ImmutableSandboxedEnvironment with trim_blocks, lstrip_blocks and loop controls,
a tojson that is json.dumps, raise_exception and strftime_now. `from_json`, which one template uses, is json.loads.
"""

import copy
import itertools
import json
import pathlib

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

assert jinja2.__version__ == "3.1.6", jinja2.__version__

DATA = pathlib.Path(__file__).resolve().parents[2] / "crates/text/testdata"
BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"

# The form in which each template needs a call's arguments.
ARGUMENTS = {
    "deepseek-ai-DeepSeek-R1-Distill-Llama-8B": "text",
    "deepseek-ai-DeepSeek-V3": "text",
    "deepseek-ai-DeepSeek-V3.1": "object",
    "deepseek-ai-DeepSeek-V3.2": "object",
    "tiny-r1": "text",
}


def environment():
    def raise_exception(message):
        raise jinja2.exceptions.TemplateError(message)

    def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols])
    env.filters["tojson"] = tojson
    env.filters["from_json"] = json.loads
    env.globals["raise_exception"] = raise_exception
    return env


def system(content):
    return {"role": "system", "content": content}


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **more):
    return {"role": "assistant", "content": content, **more}


def call(name, arguments, id="call_0"):
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


def tool(content, id="call_0"):
    return {"role": "tool", "tool_call_id": id, "content": content}


WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Current weather of a city, \"as it is\" <now> & later; café ☕",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "the city's name"},
                "unit": {"type": "string", "enum": ["celsius", "fahrenheit"], "default": None},
                "days": {"type": "integer", "minimum": 1, "maximum": 10.5},
            },
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
TIME = {"type": "function", "function": {"name": "get_time", "parameters": {"type": "object", "properties": {}}}}
ODD_ARGUMENTS = {
    "city": "Zürich \"<b>\" & 'x'\\\n\t\x01 東京 🙂",
    "n": 3,
    "x": -1.5,
    "big": 1e16,
    "small": 1e-5,
    "whole": 2.0,
    "yes": True,
    "no": False,
    "none": None,
    "list": [1, "two", [], {}],
    "nested": {"a": {"b": ["c"]}},
}

CONVERSATIONS = {
    "single": [user("Hello")],
    "system": [system("You are terse."), user("Hello")],
    "two systems": [system("One."), system("Two."), user("Hello")],
    "late system": [user("Hi"), assistant("Hello."), system("Be terse."), user("Why?")],
    "only system": [system("You are terse.")],
    "developer": [{"role": "developer", "content": "Be terse."}, user("Hello")],
    "empty": [],
    "empty content": [user("")],
    "multi turn": [user("1+1?"), assistant("2"), user("And 2+2?")],
    "assistant last": [user("1+1?"), assistant("2")],
    "assistant first": [assistant("Welcome."), user("Hi")],
    "two users": [user("a"), user("b")],
    "two assistants": [user("a"), assistant("b"), assistant("c")],
    "reasoning in content": [user("1+1?"), assistant("<think>\nOne and one.\n</think>\n\n2"), user("Sure?")],
    "two closing tags": [user("x"), assistant("<think>a</think>b</think>c"), user("y")],
    "closing tag only": [user("x"), assistant("why\n</think>\n\nbecause"), user("y")],
    "empty reasoning": [user("x"), assistant("<think>\n\n</think>\n\nok"), user("y")],
    "reasoning field": [user("1+1?"), assistant("2", reasoning_content="One and one."), user("Sure?")],
    "reasoning field last": [user("1+1?"), assistant("2", reasoning_content="One and one.")],
    "prefix": [user("1+1?"), assistant("It is", prefix=True)],
    "call": [user("Weather?"), assistant(None, tool_calls=[call("get_weather", {"city": "Paris"})])],
    "call with content": [user("Weather?"), assistant("Let me look.", tool_calls=[call("get_weather", {"city": "Paris"})])],
    "call with text arguments": [user("W?"), assistant(None, tool_calls=[call("f", '{"city":"Paris",  "n": 1}')])],
    "call without arguments": [user("Time?"), assistant(None, tool_calls=[call("get_time", {})])],
    "odd arguments": [user("W?"), assistant(None, tool_calls=[call("f", ODD_ARGUMENTS)])],
    "call and output": [
        user("Weather?"),
        assistant(None, tool_calls=[call("get_weather", {"city": "Paris"})]),
        tool('{"temperature": 21}'),
    ],
    "call, output, answer": [
        user("Weather?"),
        assistant(None, tool_calls=[call("get_weather", {"city": "Paris"})]),
        tool('{"temperature": 21}'),
        assistant("21 degrees."),
        user("And tomorrow?"),
    ],
    "parallel calls": [
        system("Use tools."),
        user("Weather and time?"),
        assistant(None, tool_calls=[call("get_weather", {"city": "Paris"}), call("get_time", {}, id="call_1")]),
        tool("21"),
        tool("12:00", id="call_1"),
    ],
    "parallel calls answered": [
        user("Weather and time?"),
        assistant(None, tool_calls=[call("get_weather", {"city": "Paris"}), call("get_time", {}, id="call_1")]),
        tool("21"),
        tool("12:00", id="call_1"),
        assistant("21 at 12:00."),
        user("Thanks"),
    ],
    "calls in two turns": [
        user("Weather?"),
        assistant(None, tool_calls=[call("get_weather", {"city": "Paris"})]),
        tool("21"),
        assistant("21."),
        user("And in Rome?"),
        assistant(None, tool_calls=[call("get_weather", {"city": "Rome"})], reasoning_content="Again."),
        tool("25"),
    ],
    "three outputs": [
        system("Use tools."),
        user("Weather?"),
        assistant(
            "Let me look.",
            tool_calls=[call("get_weather", {"city": c}, id=f"call_{c}") for c in ["Paris", "Rome", "Zürich"]],
            reasoning_content="Three cities.",
        ),
        tool("21", id="call_Rome"),
        tool('{"a": "<b>\\n"}', id="call_Paris"),
        tool("", id="call_Zürich"),
    ],
    "answer between calls": [
        user("Weather?"),
        assistant(None, tool_calls=[call("get_weather", {"city": "Paris"})]),
        tool("21"),
        assistant("21. And now Rome.", tool_calls=[call("get_weather", {"city": "Rome"}, id="call_1")]),
        tool("25", id="call_1"),
        assistant("25."),
        user("Thanks"),
    ],
    "tool first": [tool("21"), user("What is that?")],
    "markup": [user("<b>&amp;\"quoted\" 'single' </b> {{ 1 }} {% if %} {# c #}"), assistant("a < b && c > d"), user("`x`\\n")],
    "unicode": [system("Du bist höflich."), user("你好，世界 🌍 e\u0301 \u200d \u00a0 naïve"), assistant("مرحبا"), user("👩‍👩‍👧")],
    "whitespace": [system("  spaced  \n"), user("\n\n a \t\n"), assistant("\n b \n"), user("  ")],
    "control tokens in text": [
        system("Say <think> and </think>."),
        user("What is <｜User｜> and <｜Assistant｜>? <｜end▁of▁sentence｜><｜Assistant｜></think>owned ｜DSML｜ <"),
        assistant("<think>x</think>It is <｜tool▁calls▁begin｜>."),
        user("<think>\n"),
    ],
    "noncharacters": [user("\ufdd0 <think> \ufdd0\ufdd0 \ufdd1 <｜Us")],
    "unknown role": [{"role": "critic", "content": "Bad."}, user("x")],
    # What Python refuses.
    "null content": [user(None)],
    "content of parts": [user([{"type": "text", "text": "x"}])],
    "no content": [{"role": "user"}],
    "number content": [user(3)],
    "null reply": [user("x"), assistant(None)],
    "null output": [user("x"), assistant(None, tool_calls=[call("f", {})]), tool(None)],
}
TOOLS = {"none": None, "empty": [], "one": [WEATHER], "two": [WEATHER, TIME]}
WITH_TOOLS = ["single", "system", "call and output", "parallel calls answered", "control tokens in text", "two systems"]


def adapted(messages, form):
    messages = copy.deepcopy(messages)
    for message in messages:
        for one in message.get("tool_calls", []):
            arguments = one["function"]["arguments"]
            if form == "text" and isinstance(arguments, dict):
                arguments = json.dumps(arguments, ensure_ascii=False)
            if form == "object" and isinstance(arguments, str):
                arguments = json.loads(arguments)
            one["function"]["arguments"] = arguments
    return messages


def inputs():
    plain = {"messages": None, "tools": "none", "add_generation_prompt": True, "kwargs": {}}
    for name in CONVERSATIONS:
        yield {**plain, "messages": name}
        yield {**plain, "messages": name, "add_generation_prompt": False}
        for thinking in [True, False]:
            yield {**plain, "messages": name, "kwargs": {"thinking": thinking}}
    for name, kwargs in itertools.product(["single", "prefix", "call and output"], [True, False]):
        yield {**plain, "messages": name, "kwargs": {"enable_thinking": kwargs}}
    for name, tools in itertools.product(WITH_TOOLS, ["empty", "one", "two"]):
        yield {**plain, "messages": name, "tools": tools}


def whole_conversations():
    texts, cases = [], []
    for path in sorted((DATA / "templates").glob("*.jinja")):
        template = environment().from_string(path.read_text(encoding="utf-8"))
        for given in inputs():
            messages = adapted(CONVERSATIONS[given["messages"]], ARGUMENTS[path.stem])
            try:
                text = template.render(
                    messages=messages,
                    tools=TOOLS[given["tools"]],
                    documents=None,
                    add_generation_prompt=given["add_generation_prompt"],
                    bos_token=BOS,
                    eos_token=EOS,
                    **given["kwargs"],
                )
                if text not in texts:
                    texts.append(text)
                expected = texts.index(text)
            except Exception:
                expected = None
            cases.append({"template": path.stem, **given, "expected": expected})
    return {"bos": BOS, "eos": EOS, "conversations": CONVERSATIONS, "tools": TOOLS, "texts": texts, "cases": cases, "tools_blocks": tools_blocks()}


# Templates that ignore `tools`, and how the checkpoints that use them were trained to read tools in the system prompt.
TOOLS_BLOCKS = {
    "deepseek-ai-DeepSeek-R1-Distill-Llama-8B": "deepseek-v3",
    "deepseek-ai-DeepSeek-V3": "deepseek-v3",
    "deepseek-ai-DeepSeek-V3.1": "deepseek-v3.1",
}
V31_RULES = """
IMPORTANT: ALWAYS adhere to this exact format for tool use:
<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>tool_call_name<｜tool▁sep｜>tool_call_arguments<｜tool▁call▁end｜>{additional_tool_calls}<｜tool▁calls▁end｜>

Where:
- `tool_call_name` must be an exact match to one of the available tools
- `tool_call_arguments` must be valid JSON that strictly follows the tool's Parameters Schema
- For multiple tool calls, chain them directly without separators or spaces
"""


def with_tools(system_prompt, tools, block):
    def dumps(value):
        return json.dumps(value, ensure_ascii=False)

    if block == "deepseek-v3":
        parts = [f"\n- `{t['function']['name']}`:\n```json\n{dumps(t)}\n```\n" for t in tools]
        return (system_prompt or "You are a helpful assistant.") + "\n\n## Tools\n\n### Function\n" + "".join(parts)
    parts = [
        f"\n### {f['name']}\nDescription: {f.get('description', '')}\n\nParameters: {dumps(f['parameters'])}\n"
        for f in (t["function"] for t in tools)
    ]
    head = "## Tools\nYou have access to the following tools:\n"
    return (system_prompt + "\n\n" if system_prompt else "") + head + "".join(parts) + V31_RULES


def tools_blocks():
    cases = []
    for name, block in TOOLS_BLOCKS.items():
        path = DATA / "templates" / f"{name}.jinja"
        template = environment().from_string(path.read_text(encoding="utf-8"))
        for conversation, tools in itertools.product(WITH_TOOLS + ["late system"], ["one", "two"]):
            messages = adapted(CONVERSATIONS[conversation], ARGUMENTS[name])
            systems = [m for m in messages if m["role"] == "system"]
            if not systems:
                systems = [system("")]
                messages.insert(0, systems[0])
            systems[-1]["content"] = with_tools(systems[-1]["content"], TOOLS[tools], block)
            text = template.render(messages=messages, tools=None, add_generation_prompt=True, bos_token=BOS, eos_token=EOS)
            cases.append({"template": name, "block": block, "messages": conversation, "tools": tools, "expected": text})
    return cases


VALUES = {
    "s": "  a-b-c  ",
    "u": "Straße ☕ \"q\" 'q' \\ <tag> & \n\t\x7f",
    "n": 7,
    "neg": -3,
    "x": 1.0,
    "y": 0.1,
    "big": 1e16,
    "huge": 1.5e300,
    "small": 0.00001,
    "milli": 0.0001,
    "t": True,
    "f": False,
    "z": None,
    "l": [3, 1, 2],
    "e": [],
    "d": {"b": 1, "a": [1, 2.5, None, True, "x"], "c": {}},
    "rows": [{"k": "a", "v": 1}, {"k": "b", "v": 2}, {"k": "a", "v": 3}],
    "items": ["i"],
}
SNIPPETS = [
    # printing
    "{{ t }} {{ f }} {{ z }} {{ n }} {{ neg }} {{ x }} {{ y }}",
    "{{ big }} {{ huge }} {{ small }} {{ milli }} {{ 1e22 }} {{ 123456789012345680.0 }}",
    "{{ l }} {{ e }} {{ d }} {{ rows }}",
    "{{ u }}|{{ [u] }}",
    "{{ missing }}|{{ d.missing }}|{{ d['missing'] }}|{{ l[9] }}",
    "{{ (1, 2) }} {{ (1,) }} {{ [1, (2, 'x')] }}",
    "{{ s ~ n ~ z ~ t }}",
    "{{ n | string }} {{ l | string }} {{ d | string }}",
    # tojson
    "{{ d | tojson }} {{ u | tojson }} {{ z | tojson }} {{ t | tojson }} {{ x | tojson }} {{ big | tojson }} {{ e | tojson }}",
    "{{ d | tojson(indent=2) }}",
    "{{ rows | tojson(indent=4) }} {{ e | tojson(indent=4) }} {{ {} | tojson(indent=1) }}",
    "{{ d | tojson(sort_keys=true) }} {{ d | tojson(separators=(',', ':')) }}",
    "{{ u | tojson(ensure_ascii=true) }} {{ '🙂' | tojson(ensure_ascii=true) }}",
    "{{ {1: 'a', 'x': {}} | tojson }}",
    "{{ (1, 'a') | tojson }}",
    "{{ missing | tojson }}",
    "{{ '{\"a\": [1, 2.0, \"\\u00e9\"]}' | from_json }}",
    "{{ '{bad' | from_json }}",
    # strings
    "[{{ s.strip() }}] [{{ s.lstrip() }}] [{{ s.rstrip() }}] [{{ s | trim }}] [{{ s.strip(' a') }}] [{{ '\x1c\u2003x\x1f'.strip() }}]",
    "{{ s.split('-') }} {{ s.split() }} {{ 'a  b'.split(' ') }} {{ s.split('-', 1) }} {{ 'a-b-c'.split('-', 1)[1] }} {{ s.split('-')[-1] }}",
    "{{ 'a-b-c'.rsplit('-', 1) }} {{ 'a-b-c'.rsplit('-') }} {{ 'a-b'.partition('-') }} {{ 'a-b-c'.rpartition('-') }} {{ 'ab'.partition('-') }}",
    "{{ s.startswith('  a') }} {{ s.endswith(('x', ' ')) }} {{ 'b' in s }} {{ 'z' not in s }} {{ s.find('b') }} {{ s.find('z') }}",
    "{{ 'abc'.upper() }} {{ 'ABC'.lower() }} {{ 'a b'.title() }} {{ 'abc'.capitalize() }} {{ 'aXb'.replace('X', '-') }} {{ 'aaa'.replace('a', 'b', 2) }}",
    "{{ 'prefix-x'.removeprefix('prefix-') }} {{ 'x.txt'.removesuffix('.txt') }} {{ 'abc'[1:] }} {{ 'abc'[:-1] }} {{ 'abc'[::-1] }} {{ 'abc'[-1] }}",
    "{{ u | length }} {{ 'x' * 3 }} {{ '%s=%d' | format('a', 3) }} {{ 'a{}b'.format(1) }} {{ 'ab' | upper }} {{ '-'.join(['a', 'b']) }}",
    "{{ 'a\\nb'.splitlines() }} {{ 'abc'.count('b') }} {{ '12'.isdigit() }} {{ s | replace('a', 'b') }} {{ l | join(', ') }}",
    "{{ 'x'.nothing() }}",
    # dicts and lists
    "{% for k, v in d.items() %}{{ k }}={{ v }};{% endfor %} {{ d.get('b') }} {{ d.get('q') }} {{ d.get('q', 5) }} {{ d.keys() | list }} {{ d.values() | list }}",
    "{% for k in d %}{{ k }}{% endfor %} {{ 'b' in d }} {{ 'q' in d }} {{ d | length }} {{ d | items | list }} {{ d | dictsort }}",
    "{{ l[-1] }} {{ l[1:] }} {{ l | sort }} {{ l | first }} {{ l | last }} {{ l | max }} {{ l + [4] }} {{ l | length }} {{ 2 in l }} {{ l | reverse | list }}",
    "{{ rows | map(attribute='k') | list }} {{ rows | selectattr('k', 'equalto', 'a') | map(attribute='v') | list }} {{ rows | rejectattr('v', 'gt', 1) | list | length }}",
    "{{ l.append(4) }}",
    "{{ l | select('odd') | list }} {{ l | map('string') | list }} {{ rows | map(attribute='v') | sum }} {{ l | unique | list }}",
    # tests and operators
    "{{ missing is defined }} {{ missing is undefined }} {{ z is none }} {{ missing is none }} {{ s is string }} {{ d is mapping }} {{ l is sequence }} {{ l is iterable }} {{ n is number }} {{ t is boolean }} {{ n is odd }} {{ s is not string }}",
    "{{ 7 // 2 }} {{ 7 / 2 }} {{ 7 % 3 }} {{ -7 // 2 }} {{ 2 ** 3 }} {{ 4 / 2 }} {{ n + 1 - 2 * 3 }} {{ 1 == 1.0 }} {{ n > 3 and not f }} {{ z or 'x' }} {{ '' or 'y' }} {{ missing or 'm' }}",
    "{{ 'a' if t else 'b' }} {{ 'a' if f }} {{ missing | default('d') }} {{ '' | default('d', true) }} {{ z | default('d') }}",
    "{{ missing == none }} {{ missing == missing2 }} {{ none == none }} {{ [] == e }} {{ {} == {} }} {{ 'a' < 'b' }}",
    "{{ missing | length }} {{ z | length }}",
    "{{ missing | length }} {{ 'a🙂' | count }} {{ n | length }}",
    "{{ missing | length }} {{ d | length }} {{ (1, 2) | count }}",
    "{{ 'x' + missing }}",
    "{{ missing + 'x' }}",
    "{{ 'x' + 3 }}",
    "{{ 'x' + z }}",
    "{{ 'x' + d }}",
    "{{ missing.attribute }}",
    "{{ z.attribute }}|{{ z['k'] }}",
    "{{ missing() }}",
    "{{ s | nofilter }}",
    "{{ 'a' in z }}",
    "{{ 'a' in missing }}",
    # statements
    "{% for i in l %}{{ loop.index }}/{{ loop.index0 }}/{{ loop.revindex }}/{{ loop.first }}/{{ loop.last }}/{{ loop.length }}:{{ i }} {% endfor %}",
    "{% for i in l %}{{ loop.previtem }}<{{ i }}>{{ loop.nextitem }} {% endfor %}",
    "{% for i in e %}x{% else %}empty{% endfor %}{% for i in missing %}x{% endfor %}",
    "{% for i in l if i > 1 %}{{ loop.index }}{{ i }}{% endfor %}",
    "{% for i in range(5) %}{% if i == 1 %}{% continue %}{% endif %}{% if i == 3 %}{% break %}{% endif %}{{ i }}{% endfor %}",
    "{% for i in 7 %}{% endfor %}",
    "{% set ns = namespace(a=1, b='x') %}{% for i in l %}{% set ns.a = ns.a + i %}{% endfor %}{{ ns.a }}{{ ns.b }}",
    "{% set a = 1 %}{% for i in l %}{% set a = a + i %}{% endfor %}{{ a }}",
    "{% set a, b = 1, 2 %}{{ a }}{{ b }}{% set c %}block {{ a }}{% endset %}{{ c }}",
    "{% macro m(a, b=2) %}{{ a }}-{{ b }}{% endmacro %}{{ m(1) }} {{ m(1, b=3) }}",
    "{% if n > 5 %}\n  big\n{% elif n > 3 %}\n  mid\n{% else %}\n  small\n{% endif %}\nend\n",
    "  {% if t %}\n    x\n  {% endif %}  \n  {{- n -}}  \n y {#- c -#} z\n\n",
    "{%- for i in l %}\n    {{ i }}\n{%- endfor %}\n  {%+ if t %}a{% endif +%}\nb",
    "{% raw %}{{ x }}{% endraw %}",
    "{{ raise_exception('No way: ' + s) }}",
    "{% if f %}{{ raise_exception('no') }}{% endif %}ok",
    "{% filter upper %}abc{% endfilter %}",
    "{% if %}",
    "{{ 'unclosed }}",
    "{% for i in l %}",
    "{% set x = [1, 2] %}{{ x[0] }}{{ dict(a=1)['a'] }}{{ dict(a=1) }}",
    "{% with q = 5 %}{{ q }}{% endwith %}{{ q }}",
    "{{ items[0] }}{{ d.c.x is defined }}{{ (d.a)[0] }}{{ d['a'][-1] }}",
    "{{ \"it's\" }}{{ 'a\\tb' }}{{ 'é' }}{{ '\\u00e9' }}",
]


def snippets():
    cases = []
    for source in SNIPPETS:
        case = {"source": source}
        try:
            case["expected"] = environment().from_string(source).render(
                messages=[], tools=None, documents=None, add_generation_prompt=False, **VALUES
            )
        except jinja2.exceptions.TemplateError as error:
            case["error"] = str(error)
        except Exception as error:
            case["error"] = f"{type(error).__name__}: {error}"
        cases.append(case)
    return {"values": VALUES, "cases": cases}


def write(name, data):
    text = json.dumps({"generator": "tools/templates/make.py, jinja2 " + jinja2.__version__, **data}, ensure_ascii=False, indent=1)
    (DATA / name).write_text(text + "\n", encoding="utf-8")


write("chat_templates.json", whole_conversations())
write("jinja_snippets.json", snippets())
