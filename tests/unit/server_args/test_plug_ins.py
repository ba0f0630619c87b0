"""Which plug-ins a command line allows."""

import json

import pytest

from sglang_hicache.errors import UserError

ALLOW = "--hicache-allow-dynamic-backend"
EIC = "sglang.srt.mem_cache.storage.eic.eic_storage:EICStorage"
MINE = {"backend_name": "mine", "module_path": "my.store", "class_name": "Store"}


def allowed(resolved, *argv):
    return resolved("--enable-hicache", *argv).config.storage.plug_ins


def test_nothing_is_allowed_by_itself(resolved):
    assert allowed(resolved) == ()
    assert allowed(resolved, "--hicache-storage-backend", "file") == ()


def test_the_flag_takes_classes_and_names_and_may_be_repeated(resolved):
    assert allowed(resolved, ALLOW, "my.store:Store", ALLOW, "eic", ALLOW, "eic") == ("my.store:Store", EIC)


def test_what_is_attached_at_the_start_is_allowed_with_its_standbys_and_what_is_inside(resolved):
    def start(backend, config):
        extra = ("--hicache-storage-backend-extra-config", json.dumps(config))
        return allowed(resolved, "--hicache-storage-backend", backend, *extra)

    assert start("dynamic", MINE) == ("my.store:Store",)
    assert start("eic", {}) == (EIC,)
    standby = {"level": "failover", "standby": [{"backend": "eic"}, {"backend": "dynamic", "extra_config": MINE}]}
    assert start("file", {"fault_tolerance": standby}) == ("my.store:Store", EIC)
    tiers = {"tiers": [{"backend": "memory"}, {"backend": "dynamic", "extra_config": MINE}]}
    assert start("tiered", tiers) == ("my.store:Store",)


@pytest.mark.parametrize("text", ["my.store", "my.store:", ":Store", "my store:Store", "my.store:Store:x", "file", "*"])
def test_what_names_no_class_is_refused(resolved, text):
    with pytest.raises(UserError, match=f"{ALLOW} .*it takes module.path:ClassName, or one of: .*hf3fs"):
        allowed(resolved, f"{ALLOW}={text}")
