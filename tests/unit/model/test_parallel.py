"""How a model is divided over ranks, looked at on one rank: shapes, whole parts, and what is said about it."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from sglang_hicache.errors import UserError
from sglang_hicache.workers.parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    Share,
    TensorGroup,
    divide_linears,
    kv_share,
)
from tests.unit.model.support import config_of


def _divided(rank: int, size: int, **fields: object) -> PreTrainedModel:
    config = config_of("llama")
    for name, value in fields.items():
        setattr(config, name, value)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    divide_linears(model, TensorGroup(rank, size))
    return model


def test_linears_follow_the_plan_of_the_model():
    layer = _divided(1, 2).model.layers[0]
    assert isinstance(layer.self_attn.q_proj, ColumnParallelLinear) and isinstance(
        layer.mlp.down_proj, RowParallelLinear
    )
    assert layer.self_attn.q_proj.weight.shape == (32, 64)
    assert layer.self_attn.k_proj.weight.shape == (16, 64)
    assert layer.self_attn.o_proj.weight.shape == (64, 32)
    assert layer.mlp.down_proj.weight.shape == (64, 48)
    assert layer.input_layernorm.weight.shape == (64,)


def test_a_group_of_one_leaves_the_model_alone():
    assert not any(isinstance(module, ColumnParallelLinear) for module in _divided(0, 1).modules())


def test_fewer_kv_heads_than_ranks_are_repeated_and_said(caplog):
    with caplog.at_level(logging.INFO):
        layer = _divided(0, 4).model.layers[0]
    assert layer.self_attn.k_proj.weight.shape == (16, 64)
    assert "2 KV heads on 4 ranks: each head is repeated on 2" in caplog.text
    assert [kv_share(2, TensorGroup(rank, 4)).bounds(2) for rank in range(4)] == [(0, 1), (0, 1), (1, 2), (1, 2)]
    assert [kv_share(8, TensorGroup(rank, 4)).bounds(8) for rank in range(4)] == [(0, 2), (2, 4), (4, 6), (6, 8)]


def test_a_vocabulary_that_cannot_be_divided_stays_whole(caplog):
    with caplog.at_level(logging.INFO):
        model = _divided(0, 2, vocab_size=255)
    assert type(model.lm_head) is nn.Linear and model.lm_head.weight.shape == (255, 64)
    assert "255 tokens cannot be divided by 2 ranks" in caplog.text


def test_a_plan_that_we_cannot_follow_is_refused():
    plan = {"layers.*.mlp.gate_proj": "packed_colwise"}
    with pytest.raises(UserError, match=r"model.layers.0.mlp.gate_proj: dividing a Linear as packed_colwise is not"):
        _divided(0, 2, base_model_tp_plan=plan)
    with pytest.raises(UserError, match="dividing a LlamaRMSNorm as colwise is not supported"):
        _divided(0, 2, base_model_tp_plan={"norm": "colwise"})


def test_shares_of_a_tensor_put_together_are_the_tensor():
    whole = torch.arange(48).view(8, 6)
    for dim, parts in ((0, 4), (1, 2), (0, 1)):
        shares = [Share(dim, index, parts).narrow(whole) for index in range(parts)]
        assert torch.equal(torch.cat(shares, dim), whole)
