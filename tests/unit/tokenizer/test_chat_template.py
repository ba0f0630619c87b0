"""Chat templates, against transformers as the judge."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sglang_hicache.config import ModelConfig
from sglang_hicache.errors import UserError
from sglang_hicache.tokenizer.chat_template import ChatTemplate, load_chat_template
from sglang_hicache.tokenizer.text import LONG_PROMPT_CHARACTERS, TextCodec
from tests.contract.fake_server import make_model

#: Shapes of templates that are found on model hubs, each with what it needs of the language.
TEMPLATES = {
    "chatml": (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] | trim"
        " + '<|im_end|>\n' }}{% endfor %}\n"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}\n"
    ),
    "llama": (
        "{{- bos_token }}\n{%- set ns = namespace(system='') %}\n"
        "{%- for message in messages %}\n    {%- if message.role == 'system' %}\n"
        "        {%- set ns.system = message.content %}\n    {%- continue %}\n    {%- endif %}\n"
        "    {{- '[' ~ loop.index0 ~ '] ' ~ message.content ~ eos_token }}\n{%- endfor %}\n{{- ns.system }}"
    ),
    "tojson": "{{ messages | tojson }}{{ messages[0] | tojson(indent=2) }}{{ '<&>' | tojson }}",
    "generation": (
        "{% for message in messages %}\n  {% if message.role == 'assistant' %}\n"
        "    {% generation %}{{ message.content }}{% endgeneration %}\n"
        "  {% else %}\n    {{ message.content }}\n  {% endif %}\n{% endfor %}"
    ),
    "variables": (
        "{% if enable_thinking is defined and enable_thinking is false %}plain{% else %}think{% endif %}"
        "{{ tools is none }}{{ documents is none }}{% if tools %}tools{% endif %}"
    ),
    "break": "{% for message in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ message.role }}{% endfor %}",
}
CONVERSATIONS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": 'Hello <there> & "you"'}],
    [
        {"role": "system", "content": " be brief "},
        {"role": "user", "content": "ünï"},
        {"role": "assistant", "content": "yes\n"},
        {"role": "user", "content": "go on"},
    ],
]


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """transformers' tokenizer on the same folder."""
    from transformers import AutoTokenizer  # lazy door: three seconds that the other tests need not wait

    return AutoTokenizer.from_pretrained(str(make_model(tmp_path_factory.mktemp("judged"))))


@pytest.mark.parametrize("conversation", CONVERSATIONS, ids=["short", "long"])
@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("variables", [{}, {"enable_thinking": False}], ids=["plain", "thinking"])
def test_same_text_as_transformers(judge: Any, name: str, conversation: Any, variables: dict[str, Any]) -> None:
    expected = judge.apply_chat_template(
        conversation, chat_template=TEMPLATES[name], tokenize=False, add_generation_prompt=True, **variables
    )
    ours = ChatTemplate(TEMPLATES[name], {"eos_token": "<|end|>"}).render(conversation, variables)
    assert ours == expected


def test_same_ids_as_transformers_on_the_model_folder(judge: Any, tmp_path: Path) -> None:
    codec = make_codec(make_model(tmp_path / "model"))
    for conversation in CONVERSATIONS:
        expected = judge.apply_chat_template(conversation, add_generation_prompt=True, return_dict=False)
        assert asyncio.run(codec.encode_chat(conversation, {})) == expected
        text = conversation[0]["content"]
        assert asyncio.run(codec.encode(text)) == judge(text)["input_ids"]


def make_codec(folder: Path) -> TextCodec:
    return TextCodec(
        ModelConfig(path=str(folder), tokenizer_path=str(folder), served_name="x", dtype="float32", context_length=64)
    )


def edit(folder: Path, **changes: Any) -> None:
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))


def render(folder: Path) -> str:
    template = load_chat_template(str(folder))
    assert template is not None
    return template.render(CONVERSATIONS[0], {})


def test_where_a_template_comes_from(tmp_path: Path) -> None:
    """A file of its own wins over the entry, of several named ones "default" counts, and none is allowed."""
    folder = make_model(tmp_path / "model")
    edit(folder, chat_template=[{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}])
    assert render(folder) == "d"
    (folder / "chat_template.jinja").write_text("file {{ eos_token }}")
    assert render(folder) == "file <|end|>"
    (folder / "chat_template.jinja").unlink()
    edit(folder, chat_template=None)
    assert load_chat_template(str(folder)) is None
    with pytest.raises(UserError, match="no chat template"):
        asyncio.run(make_codec(folder).encode_chat(CONVERSATIONS[0], {}))


def test_special_tokens_as_objects_and_from_their_own_file(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model")
    (folder / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "wrong"}))
    edit(folder, eos_token={"content": "</s>"}, chat_template="{{ bos_token }}{{ eos_token }}")
    assert render(folder) in ("</s>", "<s></s>")


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{{ raise_exception('only two roles') }}", "only two roles"),
        ("{{ messages[7].content }}", "refuses"),
        ("{{ 1 / 0 }}", "refuses"),
        ("{{ messages.append(1) }}", "refuses"),
        ("{{ ''.__class__.__mro__ }}", "refuses"),
    ],
)
def test_a_template_that_refuses_is_the_client_s_mistake(source: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        ChatTemplate(source, {}).render(CONVERSATIONS[0], {})


def test_malformed_template() -> None:
    with pytest.raises(UserError, match="malformed"):
        ChatTemplate("{% for %}", {})


def test_a_long_prompt_is_encoded_off_the_event_loop_with_the_same_result(tmp_path: Path) -> None:
    codec = make_codec(make_model(tmp_path / "model"))
    short = asyncio.run(codec.encode("ab"))
    long = asyncio.run(codec.encode("ab" * LONG_PROMPT_CHARACTERS))
    assert long == short * LONG_PROMPT_CHARACTERS


def test_vocabulary_is_the_model_s(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model")
    assert make_codec(folder).vocab_size == 257
    (folder / "config.json").write_text('{"vocab_size": 512}')
    assert make_codec(folder).vocab_size == 512
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match="config.json"):
        make_codec(folder)


def test_the_process_imports_neither_torch_nor_transformers() -> None:
    """Start-up time: both together cost more than everything else of this process."""
    code = (
        "import sys, sglang_hicache.tokenizer.process\n"
        "print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"
