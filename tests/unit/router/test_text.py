"""Prompts to token ids, as Hugging Face would."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from splitserve.core.errors import ConfigError, InvalidRequest
from splitserve.core.request import Chat, ChatMessage, Tool, ToolCall
from splitserve.router.text import Text
from tests.unit.router.scripted import DEMO_MODEL

MOST = 2048  # tokens
SAID = (ChatMessage("system", "Be brief."), ChatMessage("user", "Grüße & <tags>"))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of the demo model's tokenizer, to be changed."""
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(DEMO_MODEL / name, tmp_path / name)
    return tmp_path


@pytest.fixture
def opened() -> Iterator[list[Text]]:
    """Texts put in here are closed."""
    texts: list[Text] = []
    yield texts
    for text in texts:
        text.close()


async def rendered(opened: list[Text], model: Path, template: str, messages: tuple[ChatMessage, ...] = SAID) -> str:
    (model / "chat_template.jinja").write_text(template)
    opened.append(Text(model))
    return decoded(await opened[-1].token_ids(Chat(messages), MOST))


def decoded(token_ids: tuple[int, ...]) -> str:
    return str(Tokenizer.from_file(str(DEMO_MODEL / "tokenizer.json")).decode(token_ids, skip_special_tokens=False))


def configure(model: Path, **settings: Any) -> None:
    file = model / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


async def test_text_begins_with_the_tokenizers_own_bos(opened: list[Text], model: Path) -> None:
    opened.append(Text(model))
    token_ids = await opened[0].token_ids("Once upon a time", MOST)
    assert token_ids[0] == 0
    assert decoded(token_ids) == "<|bos|>Once upon a time"


async def test_a_chat_gets_its_bos_from_the_template_alone(opened: list[Text], model: Path) -> None:
    opened.append(Text(model))
    token_ids = await opened[0].token_ids(Chat(SAID), MOST)
    assert token_ids.count(0) == 1
    assert decoded(token_ids) == ("<|bos|><|system|>\nBe brief.\n<|user|>\nGrüße & <tags>\n<|assistant|>\n")


async def test_a_tokenizer_file_that_truncates_or_pads_does_neither_here(opened: list[Text], model: Path) -> None:
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=8)
    tokenizer.save(str(model / "tokenizer.json"))
    opened.append(Text(model))
    assert len(await opened[0].token_ids("one two three four five six seven eight nine ten", MOST)) > 8
    assert len(await opened[0].token_ids("one", MOST)) < 8


async def test_special_tokens_may_be_text_or_objects(opened: list[Text], model: Path) -> None:
    configure(model, bos_token={"content": "<|bos|>", "special": True})
    assert await rendered(opened, model, "{{ bos_token }}x{{ eos_token }}") == "<|bos|>x<|eos|>"


async def test_a_template_may_be_in_the_settings_alone_or_among_named_ones(opened: list[Text], model: Path) -> None:
    (model / "chat_template.jinja").unlink()
    configure(model, chat_template=[{"name": "rag", "template": "no"}, {"name": "default", "template": "yes"}])
    opened.append(Text(model))
    assert decoded(await opened[0].token_ids(Chat(SAID), MOST)) == "yes"


async def test_what_hugging_face_templates_use_is_there(opened: list[Text], model: Path) -> None:
    template = (
        "{%- for m in messages %}{%- if m.role == 'system' %}{%- continue %}{%- endif %}"
        "{% generation %}{{ m.content | tojson }}{% endgeneration %}{%- endfor %}"
    )
    assert await rendered(opened, model, template) == '"Grüße & <tags>"'


async def test_messages_that_the_template_refuses_are_the_requests_fault(opened: list[Text], model: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"^messages: .*roles must alternate"):
        await rendered(opened, model, "{{ raise_exception('roles must alternate') }}")


async def test_tools_and_calls_reach_the_template_as_hugging_face_has_them(opened: list[Text], model: Path) -> None:
    template = "{{ tools[0].function.name }} {{ messages[0].tool_calls[0].function.arguments.city }} " + (
        "{{ messages[1].tool_call_id }} {{ messages[1].tool_calls is defined }}"
    )
    call = ToolCall(0, "call-1", "weather", '{"city": "Bath"}')
    said = (ChatMessage("assistant", "", (call,)), ChatMessage("tool", "rain", tool_call_id="call-1"))
    (model / "chat_template.jinja").write_text(template)
    opened.append(Text(model))
    token_ids = await opened[0].token_ids(Chat(said, (Tool("weather"),)), MOST)
    assert decoded(token_ids) == "weather Bath call-1 False"


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        ("{", "is not JSON"),
        ("[" * 9999, "is not JSON"),
        ("[]", "must be a JSON object"),
        ('{"messages": []}', "'messages' is the request's own"),
    ],
)
async def test_template_arguments_that_can_not_be_are_refused(
    opened: list[Text], model: Path, args: str, sentence: str
) -> None:
    opened.append(Text(model))
    with pytest.raises(InvalidRequest, match=rf"^messages\.template_args: .*{sentence}"):
        await opened[0].token_ids(Chat(SAID, template_args=args), MOST)


async def test_template_arguments_reach_the_template(opened: list[Text], model: Path) -> None:
    (model / "chat_template.jinja").write_text("{{ enable_thinking }} {{ add_generation_prompt }}")
    opened.append(Text(model))
    args = '{"enable_thinking": false, "add_generation_prompt": false}'
    assert decoded(await opened[0].token_ids(Chat(SAID, template_args=args), MOST)) == "False False"


async def test_a_last_message_that_is_to_go_on_is_left_open(opened: list[Text], model: Path) -> None:
    (model / "chat_template.jinja").write_text("{% for m in messages %}<{{ m.content }}>{% endfor %}")
    opened.append(Text(model))
    said = (ChatMessage("user", "go"), ChatMessage("assistant", "Once upon "))
    assert decoded(await opened[0].token_ids(Chat(said, continue_final_message=True), MOST)) == "<go><Once upon"


async def test_a_text_that_can_not_fit_is_refused_before_it_is_tokenised(opened: list[Text], model: Path) -> None:
    opened.append(Text(model))
    with pytest.raises(InvalidRequest, match=r"^text: \d+ characters make more than the 3 tokens"):
        await opened[0].token_ids("a" * 100_000, 3)
    assert len(await opened[0].token_ids("a b c", 3)) > 0


@pytest.mark.parametrize("template", ["{{ messages[0].nothing.at.all }}", "{{ 1 / 0 }}", "{{ messages[7].role.x }}"])
async def test_a_template_that_stumbles_over_the_messages_says_so(
    opened: list[Text], model: Path, template: str
) -> None:
    with pytest.raises(InvalidRequest, match=r"^messages:"):
        await rendered(opened, model, template)


async def test_a_template_can_not_reach_out_of_its_sandbox(opened: list[Text], model: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"^messages:"):
        await rendered(opened, model, "{{ ''.__class__.__mro__[1].__subclasses__() }}")


async def test_chat_with_a_model_that_has_no_template_is_refused(opened: list[Text], model: Path) -> None:
    (model / "chat_template.jinja").unlink()
    opened.append(Text(model))
    with pytest.raises(InvalidRequest, match="no chat template"):
        await opened[0].token_ids(Chat(SAID), MOST)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", None),
        ("tokenizer.json", "{}"),
        ("tokenizer_config.json", "not json"),
        ("tokenizer_config.json", "[]"),
        ("chat_template.jinja", "{% if %}"),
    ],
)
def test_a_broken_file_is_named(model: Path, name: str, content: str | None) -> None:
    if content is None:
        (model / name).unlink()
    else:
        (model / name).write_text(content)
    with pytest.raises(ConfigError, match=name):
        Text(model)
