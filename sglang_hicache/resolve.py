"""From flags to one `ServerConfig`: everything that depends on the model, the machine or several flags together.

Called once by the launcher, before anything is started.  Every value that ends up other than the user wrote it, or was
chosen from the machine's state, is told as a `Rewrite` that the launcher logs: nothing is adjusted silently.
"""

from __future__ import annotations

import argparse
import json
import os
import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from sglang_hicache.config import (
    CacheConfig,
    HttpConfig,
    LogConfig,
    ModelConfig,
    SchedulerConfig,
    ServerConfig,
    StorageConfig,
)
from sglang_hicache.connectors.source import RemoteModel, fetch_blocking
from sglang_hicache.connectors.url import filled_in, is_url, parse_url, shows_password
from sglang_hicache.errors import StorageError, UserError
from sglang_hicache.extra_config import extra_config_json
from sglang_hicache.model_facts import ModelFacts, model_directory, read_model_facts
from sglang_hicache.pool_sizes import Memory, pool_config
from sglang_hicache.server_args import ADMIN_API_KEY_ENV, API_KEY_ENV, BUILTIN_MODEL_PATH
from sglang_hicache.storage import registry
from sglang_hicache.storage.allowed_plugins import allowed_plug_ins
from sglang_hicache.storage.placeholders import check_placeholders, variable_names

BUILTIN_MODEL_NAME = "builtin"

_DTYPES = {"float": "float32", "half": "float16"}

#: What may travel in an HTTP header and be copied from a terminal.
_KEY_CHARACTERS = frozenset(string.ascii_letters + string.digits + string.punctuation)


@dataclass
class Resolution:
    """The configuration, and what was changed on the way to it."""

    config: ServerConfig
    rewrites: list[str] = field(default_factory=list)


def resolve(
    args: argparse.Namespace,
    *,
    run_dir: str,
    weights_digest: Callable[[str], str],
    memory: Memory,
    environment: Mapping[str, str] = os.environ,
) -> Resolution:
    """Settle every flag.  UserError, or StorageError where the model is in a store: nothing was started."""
    rewrites: list[str] = []
    _check_exclusions(args)
    http = _http(args, environment, rewrites)
    storage = _storage(args)
    found = _model(args, run_dir, environment, rewrites)
    facts = read_model_facts(found.directory, found.weights_bytes)
    dtype = _dtype(args, facts, rewrites)
    context_length = _context_length(args, facts)
    pool = pool_config(args, facts, dtype, memory, rewrites)
    model = ModelConfig(
        path=found.directory,
        weights_url=found.url,
        public_url=found.public_url,
        tokenizer_path=_tokenizer_path(args, found.directory),
        served_name=args.served_model_name or _served_name(args.model_path, found),
        dtype=dtype,
        device=args.device,
        context_length=context_length,
        deterministic=args.enable_deterministic_inference,
        weights_digest=found.weights_digest or weights_digest(found.directory),
        random_seed=args.random_seed,
        eos_token_ids=facts.eos_token_ids,
        vocab_size=facts.vocab_size,
    )
    config = ServerConfig(
        model=model,
        pool=pool,
        cache=_cache(args),
        storage=storage,
        scheduler=_scheduler(args, context_length, rewrites),
        http=http,
        log=LogConfig(format=args.log_format, level=args.log_level),
        tp_size=args.tp_size,
        run_dir=run_dir,
    )
    return Resolution(config, rewrites)


def _check_exclusions(args: argparse.Namespace) -> None:
    """Flags that contradict each other."""
    if args.enable_hierarchical_cache and args.disable_radix_cache:
        raise UserError(
            "--enable-hierarchical-cache and --disable-radix-cache exclude each other: the host tier keeps "
            "prefixes; leave one of them out"
        )
    if args.hicache_storage_backend and not args.enable_hierarchical_cache:
        raise UserError(
            f"--hicache-storage-backend {args.hicache_storage_backend} needs --enable-hierarchical-cache: storage is "
            "read into, and written from, the host tier"
        )
    if args.file_storage_path is not None and args.hicache_storage_backend != "file":
        raise UserError("--file-storage-path belongs to --hicache-storage-backend file; add that, or leave it out")
    if args.hicache_storage_backend_extra_config is not None and not args.hicache_storage_backend:
        raise UserError("--hicache-storage-backend-extra-config needs --hicache-storage-backend")
    if args.hicache_state_file and not args.enable_hierarchical_cache:
        raise UserError("--hicache-state-file keeps what is attached, and so needs --enable-hierarchical-cache")
    if args.hicache_storage_optional and not (args.hicache_storage_backend or args.hicache_state_file):
        raise UserError(
            "--hicache-storage-optional needs a storage that may be missing: --hicache-storage-backend, or a "
            "--hicache-state-file that can bring one back"
        )
    if args.hicache_config_dir and not Path(args.hicache_config_dir).is_dir():
        raise UserError(f"--hicache-config-dir {args.hicache_config_dir!r} is no directory")


def _model(args: argparse.Namespace, run_dir: str, environment: Mapping[str, str], rewrites: list[str]) -> RemoteModel:
    """A directory, or what the run has of a model in a store."""
    if not is_url(args.model_path):
        return RemoteModel(model_directory(args.model_path, "--model-path"))
    try:
        url = filled_in(args.model_path, environment)
        if shows_password(args.model_path):
            rewrites.append(
                "--model-path: every user of this machine can see its password in ps; ${env.NAME} in its place hides it"
            )
        found = fetch_blocking(url, Path(run_dir, "model"))
    except UserError as error:
        raise UserError(f"--model-path: {error}") from error
    except StorageError as error:
        raise StorageError(f"--model-path: the model cannot be had: {error}", error.reason, error.code) from error
    return found if found.url else RemoteModel(model_directory(found.directory, "--model-path"))


def _tokenizer_path(args: argparse.Namespace, directory: str) -> str:
    return model_directory(args.tokenizer_path, "--tokenizer-path") if args.tokenizer_path else directory


def _dtype(args: argparse.Namespace, facts: ModelFacts, rewrites: list[str]) -> str:
    """The dtype to compute in; float16 is slow and partly missing on CPU."""
    asked = _DTYPES.get(args.dtype, args.dtype)
    if asked == "float16" and args.device == "cpu":
        raise UserError("--dtype float16 is not supported on --device cpu; use bfloat16 or float32")
    if asked != "auto":
        return asked
    if facts.dtype == "float16" and args.device == "cpu":
        rewrites.append("--dtype auto: float32, because the checkpoint is float16 and the device is cpu")
        return "float32"
    if facts.dtype not in ("float32", "bfloat16", "float16"):
        raise UserError(f"--dtype auto: the checkpoint's dtype {facts.dtype!r} is not supported; give --dtype bfloat16")
    rewrites.append(f"--dtype auto: {facts.dtype}, the checkpoint's")
    return facts.dtype


def _context_length(args: argparse.Namespace, facts: ModelFacts) -> int:
    if args.context_length is not None and args.context_length > facts.positions:
        raise UserError(
            f"--context-length {args.context_length} is more than the {facts.positions} positions of the model; "
            f"give at most {facts.positions}, or leave it out"
        )
    return args.context_length or facts.positions


def _served_name(path_or_id: str, found: RemoteModel) -> str:
    if found.directory == str(Path(BUILTIN_MODEL_PATH).resolve()):
        return BUILTIN_MODEL_NAME
    if found.url:
        return parse_url(found.url).name
    return Path(found.directory).name if is_url(path_or_id) or Path(path_or_id).is_dir() else path_or_id


def _scheduler(args: argparse.Namespace, context_length: int, rewrites: list[str]) -> SchedulerConfig:
    """Chunks end at page boundaries, so that what is computed in chunks is cached like what is not."""
    asked, page = args.chunked_prefill_size, args.page_size
    if asked <= 0:
        chunk = -(-context_length // page) * page
        rewrites.append(f"--chunked-prefill-size {asked}: prompts are not chunked ({chunk} tokens fit every prompt)")
    else:
        chunk = max(page, asked // page * page)
        if chunk != asked:
            rewrites.append(f"--chunked-prefill-size {asked}: {chunk}, a multiple of the page size {page}")
    return SchedulerConfig(
        max_running_requests=args.max_running_requests,
        chunked_prefill_size=chunk,
        max_queued_requests=args.max_queued_requests,
        schedule_policy=args.schedule_policy,
        watchdog_timeout_s=args.watchdog_timeout,
        weights_update_timeout_s=args.weights_update_timeout,
        check_digests=args.check_rank_digests,
    )


def _cache(args: argparse.Namespace) -> CacheConfig:
    return CacheConfig(
        hierarchical=args.enable_hierarchical_cache,
        reuse_prefixes=not args.disable_radix_cache,
        write_policy=args.hicache_write_policy,
        prefetch_policy=args.hicache_storage_prefetch_policy,
        eviction_policy=args.radix_eviction_policy,
        protected_threshold=_protected_threshold(args),
    )


def _protected_threshold(args: argparse.Namespace) -> int:
    given = dict(args.radix_eviction_policy_config)
    value = given.pop("protected_threshold", 2)
    if given or (args.radix_eviction_policy_config and args.radix_eviction_policy != "slru"):
        raise UserError(
            f"--radix-eviction-policy-config {args.radix_eviction_policy_config} does not fit "
            f"--radix-eviction-policy {args.radix_eviction_policy}; only slru takes a setting, protected_threshold"
        )
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"protected_threshold {value!r} is not a whole number above 0")
    return value


def _storage(args: argparse.Namespace) -> StorageConfig:
    extra, plug_ins = "{}", []
    if args.hicache_storage_backend:
        extra = extra_config_json(args.hicache_storage_backend_extra_config) or "{}"
        if args.file_storage_path is not None:
            extra = _with_file_path(extra, args.file_storage_path)
        registry.validate_extra_config(args.hicache_storage_backend, extra)
        plug_ins = registry.plug_ins(args.hicache_storage_backend, extra)
    config_env = variable_names(args.hicache_config_env)
    check_placeholders(extra, config_env)
    return StorageConfig(
        backend=args.hicache_storage_backend,
        extra_config_json=extra,
        config_dir=str(Path(args.hicache_config_dir).resolve()) if args.hicache_config_dir else "",
        config_env=config_env,
        plug_ins=allowed_plug_ins(args.hicache_allow_dynamic_backend, plug_ins),
        attach_timeout_s=args.hicache_storage_attach_timeout,
        drain_timeout_s=args.hicache_storage_drain_timeout,
        force_timeout_s=args.hicache_force_timeout,
        is_optional=args.hicache_storage_optional,
        state_file=_kept_file("--hicache-state-file", args.hicache_state_file),
        lookup_timeout_s=args.hicache_storage_lookup_timeout,
        op_timeout_s=args.hicache_storage_op_timeout,
        upload_rate_mib=args.hicache_upload_rate,
    )


def _kept_file(flag: str, path: str) -> str:
    """A file that the server writes: its folder must be there, as nobody would look for it where a typing error led."""
    if not path:
        return ""
    found = Path(os.path.abspath(path))
    if not found.parent.is_dir() or found.is_dir():
        raise UserError(f"{flag} {path!r} must be a file in a folder that exists")
    return str(found)


def _with_file_path(extra: str, path: str) -> str:
    config = json.loads(extra)
    in_extra = config.setdefault("file_storage_path", path)
    if in_extra != path:
        raise UserError(
            f"--file-storage-path {path!r} and file_storage_path {in_extra!r} of the extra config differ; give one"
        )
    return json.dumps(config)


def _http(args: argparse.Namespace, environment: Mapping[str, str], rewrites: list[str]) -> HttpConfig:
    if bool(args.ssl_certfile) != bool(args.ssl_keyfile):
        raise UserError("--ssl-certfile and --ssl-keyfile belong together; give both, or none for plain HTTP")
    for flag, path in (("--ssl-certfile", args.ssl_certfile), ("--ssl-keyfile", args.ssl_keyfile)):
        if path and not os.access(path, os.R_OK):
            raise UserError(f"{flag} {path!r} cannot be read")
    return HttpConfig(
        host=args.host,
        port=args.port,
        api_key=_key("--api-key", args.api_key, args.api_key_file, environment.get(API_KEY_ENV), rewrites),
        admin_api_key=_key(
            "--admin-api-key",
            args.admin_api_key,
            args.admin_api_key_file,
            environment.get(ADMIN_API_KEY_ENV),
            rewrites,
        ),
        ssl_certfile=args.ssl_certfile,
        ssl_keyfile=args.ssl_keyfile,
        max_body_bytes=args.max_body_bytes,
        audit_log=_kept_file("--hicache-audit-log", args.hicache_audit_log),
        cache_report=args.enable_cache_report,
        enable_metrics=args.enable_metrics,
        drain_timeout_s=args.shutdown_drain_timeout,
    )


def _key(flag: str, given: str | None, file: str | None, from_environment: str | None, rewrites: list[str]) -> str:
    """The key from its flag, its file or the environment, in this order; "" for none."""
    if given is not None and file is not None:
        raise UserError(f"{flag} and {flag}-file exclude each other; give one of them")
    key = from_environment or ""
    if given is not None:
        rewrites.append(f"{flag}: every user of this machine can see it in ps; {flag}-file and the environment hide it")
        key = given
    elif file is not None:
        key = _key_of_file(flag, file, rewrites)
    elif not key:
        return ""
    if not key or not _KEY_CHARACTERS.issuperset(key):
        raise UserError(f"{flag}: a key is one or more printable ASCII characters without spaces")
    return key


def _key_of_file(flag: str, file: str, rewrites: list[str]) -> str:
    try:
        key = Path(file).read_text(encoding="utf-8").strip()
        mode = Path(file).stat().st_mode
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{flag}-file {file!r} cannot be read: {error}") from error
    if mode & 0o077:
        rewrites.append(f"{flag}-file {file}: other users can read it; chmod 600 hides it")
    return key
