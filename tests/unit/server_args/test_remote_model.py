"""--model-path as a URL: what the launcher makes of it, what it warns of, and what of it is secret."""

from __future__ import annotations

import json
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from sglang_hicache.child import secrets_of
from sglang_hicache.connectors import source
from sglang_hicache.connectors.create import create_remote_connector
from sglang_hicache.connectors.file import FileConnector
from sglang_hicache.connectors.upload import Upload
from sglang_hicache.connectors.upload_source import FolderSource
from sglang_hicache.connectors.url import StoreUrl, parse_url
from sglang_hicache.errors import StorageError, UserError
from sglang_hicache.launch_server import main
from sglang_hicache.resolve import Resolution
from sglang_hicache.weights_digest import weights_digest

Resolve = Callable[..., Resolution]


@pytest.fixture
def url(model_dir: Path, tmp_path: Path) -> str:
    """The model, saved."""
    (model_dir / "tokenizer.json").write_text("{}")
    found = f"file://{tmp_path}/store/some-model"
    with create_remote_connector(found) as place:
        Upload(FolderSource(str(model_dir)), place, lambda *told: None, overwrite=False).run_blocking()
    return found


def test_small_files_are_in_the_run_and_weights_where_they_are(
    resolved: Resolve, url: str, model_dir: Path, tmp_path: Path
) -> None:
    model = resolved("--model-path", url).config.model
    assert (model.path, model.tokenizer_path) == (str(tmp_path / "model"), str(tmp_path / "model"))
    assert (model.weights_url, model.place, model.tokenizer_place) == (url, url, url)
    assert model.served_name == "some-model"
    assert model.weights_digest == weights_digest(str(model_dir), str(tmp_path / "no-cache"))
    assert stat.S_IMODE((tmp_path / "model").stat().st_mode) == 0o700
    assert json.loads((tmp_path / "model" / "config.json").read_text()) == json.loads(
        (model_dir / "config.json").read_text()
    )
    assert not list((tmp_path / "model").glob("*.safetensors"))


def test_names_and_tokenizers_of_ones_own(resolved: Resolve, url: str, model_dir: Path) -> None:
    flags = ("--model-path", url, "--served-model-name", "mine", "--tokenizer-path", str(model_dir))
    model = resolved(*flags).config.model
    assert (model.served_name, model.tokenizer_path, model.tokenizer_place) == ("mine", str(model_dir), str(model_dir))


def test_a_plain_folder_by_its_url_is_that_folder(resolved: Resolve, model_dir: Path) -> None:
    model = resolved("--model-path", f"file://{model_dir}").config.model
    assert (model.path, model.weights_url, model.place) == (str(model_dir), "", str(model_dir))


def test_a_name_may_come_from_the_environment(resolved: Resolve, url: str) -> None:
    where = url.replace("some-model", "${env.MODEL}")
    model = resolved("--model-path", where, environment={"MODEL": "some-model"}).config.model
    assert (model.served_name, model.place) == ("some-model", url)


def test_the_url_that_is_told_can_be_used(resolved: Resolve, tmp_path: Path) -> None:
    folder = tmp_path / "100% a#b"
    folder.mkdir()
    (folder / "hicache-model.json").write_text("{}")
    with pytest.raises(UserError, match="its URL is file://.*/100%25%20a%23b$"):
        resolved("--model-path", str(folder))


def test_the_folder_of_a_saved_model_is_told_its_url(resolved: Resolve, url: str) -> None:
    with pytest.raises(UserError, match=f"as save_model stores it; its URL is {url}"):
        resolved("--model-path", url.removeprefix("file://"))


class FakeRedis(FileConnector):
    """Stands for a Redis server: the URL has a password, and the model is in a folder."""

    def __init__(self, folder: str) -> None:
        super().__init__(parse_url(folder))
        self.urls: list[StoreUrl] = []

    def __call__(self, url: str) -> FakeRedis:
        self.urls.append(parse_url(url))
        return self


@pytest.fixture
def fake(url: str, monkeypatch: pytest.MonkeyPatch) -> FakeRedis:
    found = FakeRedis(url)
    monkeypatch.setattr(source, "create_remote_connector", found)
    return found


def test_a_password_on_the_command_line_is_warned_of_and_secret(resolved: Resolve, fake: FakeRedis) -> None:
    found = resolved("--model-path", "redis://:wo%2Frd@host/m")
    assert any("--model-path: every user of this machine can see" in text for text in found.rewrites)
    model = found.config.model
    assert model.weights_url == "redis://:wo%2Frd@host/m" and model.place == "redis://host/m"
    assert secrets_of(found.config) == ["wo%2Frd", "wo/rd"]
    assert not any("rd@" in text for text in found.rewrites)


def test_a_password_from_the_environment_is_secret_and_needs_no_warning(resolved: Resolve, fake: FakeRedis) -> None:
    found = resolved("--model-path", "redis://:${env.WORD}@host/m", environment={"WORD": "wo/rd"})
    assert not any("ps" in text for text in found.rewrites)
    assert fake.urls[-1].login == ":wo%2Frd" and secrets_of(found.config) == ["wo%2Frd", "wo/rd"]
    assert found.config.model.place == "redis://host/m"


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--model-path", "http://host/m"), "--model-path: there is no connector for http://"),
        (("--model-path", "redis://:${env.NOT_SET}@host/m"), "--model-path: .*NOT_SET is not set"),
        (("--tokenizer-path", "s3://bucket/m"), "--tokenizer-path takes no URL"),
    ],
)
def test_what_cannot_be_served_is_refused_before_anything_starts(
    flags: tuple[str, ...], says: str, resolved: Resolve
) -> None:
    with pytest.raises(UserError, match=says) as caught:
        resolved(*flags)
    assert "secret" not in str(caught.value)


def test_a_store_that_does_not_answer_is_no_mistake_in_the_flags(
    resolved: Resolve, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whoever starts servers may try again after exit code 1, and need not after 2."""
    with pytest.raises(StorageError, match="--model-path: the model cannot be had: redis://127.0.0.1:1/m: cannot"):
        resolved("--model-path", "redis://:secret@127.0.0.1:1/m")
    assert main(["--model-path", "redis://:secret@127.0.0.1:1/m", "--port", "0"]) == 1
    assert "secret" not in capsys.readouterr().err
