"""What a simulated output spells, and that it is told apart the same however it comes."""

import json

import pytest

from splitserve.cli.build import DEMO_MODEL
from splitserve.core.config import SimSettings
from splitserve.core.errors import InvalidRequest
from splitserve.core.model import ModelInfo
from splitserve.core.request import SamplingParams, StructuredOutput, Tool, ToolChoice, ToolMode
from splitserve.core.worker import DecodeJob, Parse
from splitserve.engine.sim.script import REASONING, THINK, THOUGHT, Script, Told, script_of, told_apart
from splitserve.engine.sim.text import load_tokenizer

TOKENIZER = load_tokenizer(ModelInfo.read(DEMO_MODEL))
PARSING = SimSettings(tool_parser="sim", reasoning_parser="sim")
SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"enum": ["Rome"]},
        "days": {"type": "array", "minItems": 2, "items": {"type": "integer"}},
        "unit": {"anyOf": [{"const": "C"}, {"type": "null"}]},
    },
}
INSTANCE = {"city": "Rome", "days": [0, 0], "unit": "C"}
WEATHER = Tool("weather", parameters=json.dumps(SCHEMA))
TOOLS = (Tool("clock"), WEATHER)
CALL = f"<tool_call>{json.dumps({'name': 'weather', 'arguments': INSTANCE})}</tool_call>"


def a_job(prompt: str = "Hello", structured: StructuredOutput | None = None, parse: Parse | None = None) -> DecodeJob:
    ids = tuple(TOKENIZER.encode(prompt, add_special_tokens=False).ids)
    return DecodeJob("job", "request", ids, SamplingParams(structured_output=structured), 1.0, parse=parse)


def spelt(job: DecodeJob, settings: SimSettings = PARSING) -> str:
    text: str = TOKENIZER.decode(list(script_of(job, TOKENIZER, settings).tokens))
    return text


def test_plain_output_has_no_script() -> None:
    assert script_of(a_job(), TOKENIZER, PARSING) == Script()


def test_a_structured_output_is_a_choice_or_the_least_instance_of_its_schema() -> None:
    choices = ("yes", "no")
    assert {spelt(a_job(f"prompt {n}", StructuredOutput(choice=choices))) for n in range(20)} == set(choices)
    assert json.loads(spelt(a_job(structured=StructuredOutput(json_schema=json.dumps(SCHEMA))))) == INSTANCE
    assert json.loads(spelt(a_job(structured=StructuredOutput(json_object=True)))) == {}


@pytest.mark.parametrize(
    "structured",
    [
        StructuredOutput(regex="a+"),
        StructuredOutput(grammar='root ::= "a"'),
        StructuredOutput(json_schema='{"type": "string", "pattern": "a+"}'),
        StructuredOutput(json_schema='{"type": "object", "properties": {"a": {"$ref": "#/b"}}}'),
        StructuredOutput(json_schema="[]"),
    ],
    ids=lambda structured: structured.json_schema or "other",
)
def test_what_it_can_not_keep_to_is_refused_by_name(structured: StructuredOutput) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        script_of(a_job(structured=structured), TOKENIZER, PARSING)
    assert refusal.value.field == "sampling.structured_output"


def test_a_chats_output_calls_the_tool_that_the_prompt_spells_or_that_is_chosen() -> None:
    assert spelt(a_job("Say weather(", parse=Parse(TOOLS))) == REASONING + CALL
    assert spelt(a_job("Say it", parse=Parse(TOOLS))) == REASONING
    assert spelt(a_job("weather(", parse=Parse(TOOLS, ToolChoice(ToolMode.NONE)))) == REASONING
    assert spelt(a_job(parse=Parse(TOOLS, ToolChoice(function="weather")))) == REASONING + CALL
    assert '{"name": "clock", "arguments": {}}' in spelt(a_job(parse=Parse(TOOLS, ToolChoice(ToolMode.REQUIRED))))
    assert spelt(a_job(parse=Parse()), SimSettings()) == ""


def test_without_a_parser_tools_are_refused_unless_a_call_is_forced() -> None:
    with pytest.raises(InvalidRequest, match=r"messages\.tools: .*tool_parser"):
        script_of(a_job(parse=Parse(TOOLS)), TOKENIZER, SimSettings())
    assert spelt(a_job(parse=Parse(TOOLS, ToolChoice(function="weather"))), SimSettings()) == CALL


def test_more_of_an_output_only_adds_to_what_was_told_apart() -> None:
    script, raw = Script(reasons=True, calls=True), f"{REASONING}Look: {CALL}"
    told = [told_apart(raw[:end], script, finished=end == len(raw)) for end in range(len(raw) + 1)]
    whole = Told(REASONING.removeprefix(THINK).removesuffix(THOUGHT), "Look: ", "weather", json.dumps(INSTANCE))
    assert told[-1] == whole
    for part in told:
        assert whole.reasoning.startswith(part.reasoning)
        assert whole.text.startswith(part.text)
        assert part.name in ("", "weather")
        assert whole.arguments.startswith(part.arguments)


def test_what_was_held_back_comes_at_the_end() -> None:
    script = Script(reasons=True, calls=True)
    assert told_apart("<thi", script, finished=False) == Told()
    assert told_apart("<thi", script, finished=True) == Told(text="<thi")
    assert told_apart("a <tool", script, finished=False) == Told(text="a ")
    assert told_apart("a <tool", script, finished=True) == Told(text="a <tool")
