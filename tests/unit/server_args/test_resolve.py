"""Several flags together, and flags against the model: one configuration, and every change is told."""

import json

import pytest

from sglang_hicache.errors import UserError
from sglang_hicache.server_args import ADMIN_API_KEY_ENV, API_KEY_ENV


def edit_config(model_dir, **changes):
    path = model_dir / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_flags_arrive_in_the_records(resolved, model_dir, tmp_path):
    config = resolved(
        "--tp", "2", "--page-size", "16", "--max-total-tokens", "1600", "--max-running-requests", "3", "--port", "0",
        "--max-queued-requests", "9", "--schedule-policy", "priority", "--watchdog-timeout", "7", "--random-seed", "5",
        "--check-rank-digests", "--enable-hicache", "--hicache-write-policy", "write_back", "--enable-cache-report",
        "--enable-metrics",
        "--hicache-storage-prefetch-policy", "best_effort", "--radix-eviction-policy", "slru", "--host", "::1",
        "--radix-eviction-policy-config", '{"protected_threshold": 4}', "--hicache-storage-backend", "file",
        "--hicache-storage-attach-timeout", "1", "--hicache-storage-drain-timeout", "2", "--log-level", "debug",
        "--hicache-storage-lookup-timeout", "3", "--hicache-storage-op-timeout", "4", "--shutdown-drain-timeout", "5",
        "--hicache-config-dir", str(tmp_path), "--log-format", "json", "--served-model-name", "mine",
        "--context-length", "100", "--dtype", "float", "--enable-deterministic-inference",
        "--chunked-prefill-size", "64", "--hicache-upload-rate", "0", "--weights-update-timeout", "8",
        "--hicache-force-timeout", "0.5", "--hicache-config-env", "SITE, POD_NAME", "--hicache-storage-optional",
        "--hicache-state-file", f"{tmp_path}/state", "--hicache-audit-log", f"{tmp_path}/audit",
    ).config  # fmt: skip
    model, cache, storage, scheduler, http = config.model, config.cache, config.storage, config.scheduler, config.http
    assert (config.tp_size, config.pool.page_size, config.pool.device_tokens) == (2, 16, 1600)
    assert (model.path, model.tokenizer_path, model.served_name) == (str(model_dir), str(model_dir), "mine")
    assert (model.dtype, model.context_length, model.deterministic, model.random_seed) == ("float32", 100, True, 5)
    assert (model.weights_digest, model.vocab_size, model.eos_token_ids) == ("d" * 64, 512, (7,))
    assert (cache.hierarchical, cache.write_policy, cache.prefetch_policy) == (True, "write_back", "best_effort")
    assert (cache.eviction_policy, cache.protected_threshold, cache.reuse_prefixes) == ("slru", 4, True)
    assert (storage.backend, storage.extra_config_json, storage.config_dir) == ("file", "{}", str(tmp_path))
    assert (storage.is_optional, storage.state_file) == (True, f"{tmp_path}/state")
    assert http.audit_log == f"{tmp_path}/audit"
    assert storage.config_env == ("SITE", "POD_NAME")
    assert (storage.attach_timeout_s, storage.drain_timeout_s, storage.force_timeout_s) == (1, 2, 0.5)
    assert (storage.lookup_timeout_s, storage.op_timeout_s, storage.upload_rate_mib) == (3, 4, 0)
    assert (scheduler.max_running_requests, scheduler.max_queued_requests, scheduler.watchdog_timeout_s) == (3, 9, 7)
    assert (scheduler.schedule_policy, scheduler.check_digests, scheduler.chunked_prefill_size) == (
        "priority",
        True,
        64,
    )
    assert (http.host, http.port, http.cache_report, http.drain_timeout_s) == ("::1", 0, True, 5)
    assert http.enable_metrics is True
    assert scheduler.weights_update_timeout_s == 8
    assert (config.log.format, config.log.level) == ("json", "debug")
    assert config.run_dir == str(tmp_path)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--enable-hicache", "--disable-radix-cache"], ["exclude each other"]),
        (["--hicache-storage-backend", "file"], ["needs --enable-hierarchical-cache"]),
        (["--file-storage-path", "/x"], ["--hicache-storage-backend file"]),
        (["--hicache-storage-backend-extra-config", "{}"], ["needs --hicache-storage-backend"]),
        (["--enable-hicache", "--hicache-storage-backend", "tape"], ["'tape'", "file"]),
        (["--enable-hicache", "--hicache-storage-backend", "file",
          "--hicache-storage-backend-extra-config", '{"x": 1}'], ["'x'", "file_storage_path"]),
        (["--enable-hicache", "--hicache-storage-backend", "file", "--hicache-storage-backend-extra-config",
          '{"file_storage_path": "/a"}', "--file-storage-path", "/b"], ["/a", "/b"]),
        (["--hicache-state-file", "/tmp/state"], ["needs --enable-hierarchical-cache"]),
        (["--enable-hicache", "--hicache-storage-optional"], ["--hicache-storage-backend", "--hicache-state-file"]),
        (["--enable-hicache", "--hicache-state-file", "/no/such/folder/state"], ["/no/such/folder/state"]),
        (["--hicache-audit-log", "/no/such/folder/audit"], ["--hicache-audit-log", "folder that exists"]),
        (["--hicache-audit-log", "/tmp"], ["'/tmp'"]),
        (["--hicache-config-dir", "/no/such/folder"], ["/no/such/folder"]),
        (["--enable-hicache", "--hicache-storage-backend", "file", "--file-storage-path", "/x/${env.HOME}",
          "--hicache-config-env", "SITE"], ["${env.HOME}", "SITE", "--hicache-config-env"]),
        (["--enable-hicache", "--hicache-storage-backend", "file", "--hicache-config-env", "NOT-A-NAME"],
         ["'NOT-A-NAME'"]),
        (["--dtype", "float16"], ["float16", "bfloat16"]),
        (["--context-length", "5000"], ["5000", "4096"]),
        (["--radix-eviction-policy-config", '{"protected_threshold": 3}'], ["lru", "slru"]),
        (["--radix-eviction-policy", "slru", "--radix-eviction-policy-config", '{"threshold": 3}'], ["threshold"]),
        (["--radix-eviction-policy", "slru", "--radix-eviction-policy-config", '{"protected_threshold": 0}'], ["0"]),
        (["--ssl-certfile", "/x"], ["--ssl-keyfile"]),
        (["--ssl-certfile", "/no/cert", "--ssl-keyfile", "/no/key"], ["/no/cert", "cannot be read"]),
        (["--api-key", "has space"], ["--api-key", "printable"]),
        (["--admin-api-key", "schlüssel"], ["--admin-api-key", "ASCII"]),
        (["--admin-api-key", "a", "--admin-api-key-file", "b"], ["exclude each other"]),
        (["--api-key-file", "/no/file"], ["--api-key-file", "/no/file"]),
        (["--tokenizer-path", "/no/tokenizer"], ["--tokenizer-path", "/no/tokenizer"]),
    ],
)  # fmt: skip
def test_contradictions_are_refused(resolved, argv, words):
    with pytest.raises(UserError) as caught:
        resolved(*argv)
    for word in words:
        assert word in str(caught.value)


def test_a_key_from_a_file_is_stripped_and_one_that_others_can_read_is_told(resolved, tmp_path):
    path = tmp_path / "key"
    path.write_text("s3cr3t\n")
    path.chmod(0o600)
    found = resolved("--admin-api-key-file", str(path))
    assert found.config.http.admin_api_key == "s3cr3t"
    assert not any("key" in rewrite for rewrite in found.rewrites)
    path.chmod(0o644)
    assert any("chmod 600" in rewrite for rewrite in resolved("--admin-api-key-file", str(path)).rewrites)


def test_an_empty_key_file_does_not_mean_no_key(resolved, tmp_path):
    path = tmp_path / "key"
    path.write_text("\n")
    with pytest.raises(UserError, match="--admin-api-key"):
        resolved("--admin-api-key-file", str(path))


def test_keys_from_the_environment_and_a_flag_wins(resolved):
    environment = {API_KEY_ENV: "one", ADMIN_API_KEY_ENV: "two"}
    http = resolved(environment=environment).config.http
    assert (http.api_key, http.admin_api_key) == ("one", "two")
    found = resolved("--api-key", "three", environment=environment)
    assert found.config.http.api_key == "three"
    assert any("ps" in rewrite for rewrite in found.rewrites)
    assert not any("three" in rewrite for rewrite in found.rewrites)


def test_the_page_size_rounds_chunks_and_says_so(resolved):
    found = resolved("--chunked-prefill-size", "100", "--page-size", "16")
    assert found.config.scheduler.chunked_prefill_size == 96
    assert "--chunked-prefill-size 100: 96, a multiple of the page size 16" in found.rewrites
    assert resolved("--chunked-prefill-size", "10").config.scheduler.chunked_prefill_size == 64
    assert resolved("--chunked-prefill-size", "-1").config.scheduler.chunked_prefill_size == 4096


def test_dtype_auto_follows_the_checkpoint_but_not_to_float16_on_cpu(resolved, model_dir):
    assert resolved().config.model.dtype == "bfloat16"
    edit_config(model_dir, dtype="float16")
    found = resolved()
    assert found.config.model.dtype == "float32"
    assert any("float32" in rewrite and "float16" in rewrite for rewrite in found.rewrites)
    edit_config(model_dir, dtype="float8_e4m3fn")
    with pytest.raises(UserError, match="float8_e4m3fn"):
        resolved()


def test_names_of_models(resolved, model_dir):
    assert resolved().config.model.served_name == "tiny-model"
    assert resolved().config.model.context_length == 4096


def test_the_file_path_flag_becomes_the_backends_setting(resolved):
    storage = resolved(
        "--enable-hicache", "--hicache-storage-backend", "file", "--file-storage-path", "/data/kv",
        "--hicache-storage-backend-extra-config", '{"prefetch_threshold": 64}',
    ).config.storage  # fmt: skip
    assert json.loads(storage.extra_config_json) == {"prefetch_threshold": 64, "file_storage_path": "/data/kv"}


def test_generation_config_names_the_end_of_a_text(resolved, model_dir):
    (model_dir / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    assert resolved().config.model.eos_token_ids == (1, 2)
    (model_dir / "generation_config.json").write_text("{}")
    assert resolved().config.model.eos_token_ids == (7,)


@pytest.mark.parametrize(
    ("changes", "word"),
    [({"num_hidden_layers": None}, "num_hidden_layers"), ({"max_position_embeddings": "many"}, "'many'")],
)
def test_a_model_without_the_needed_facts_is_refused(resolved, model_dir, changes, word):
    edit_config(model_dir, **changes)
    with pytest.raises(UserError, match=word):
        resolved()


def test_a_folder_that_is_no_model_is_refused(resolved, model_dir):
    (model_dir / "model.safetensors").unlink()
    with pytest.raises(UserError, match="safetensors"):
        resolved()
    (model_dir / "config.json").unlink()
    with pytest.raises(UserError, match=r"config\.json"):
        resolved()
