"""Prepacked weights against torch's own products."""

from __future__ import annotations

import pytest
import torch

from finespun.models.prepacked import Prepacked, can_prepack


@pytest.mark.skipif(not can_prepack(), reason="this CPU has no bfloat16 products")
@pytest.mark.parametrize("rows", [1, 3, 64, 300])
def test_products_are_the_same(rows: int) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(96, 200), torch.nn.Linear(200, 33, bias=False)).bfloat16()
    x = torch.randn(2, rows, 96).bfloat16()
    with torch.inference_mode():
        expected = model(x)
        with Prepacked(model).used():
            assert all("forward" in vars(layer) for layer in model)
            found = model(x)
            part = model(x[:, :1])
    torch.testing.assert_close(found, expected)
    assert torch.equal(part, found[:, :1]), "a row is computed alike beside others"
    assert all("forward" not in vars(layer) for layer in model)


@pytest.mark.skipif(not can_prepack(), reason="this CPU has no bfloat16 products")
@pytest.mark.parametrize("shape", [(1536, 576), (576, 1536), (576, 192)], ids=str)
def test_a_row_is_the_same_alone_and_among_others(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(*shape, bias=False)).bfloat16()
    x = torch.randn(1, 480, shape[0]).bfloat16()
    with torch.inference_mode(), Prepacked(model).used():
        together = model(x)
        for size in (1, 2, 3, 24):
            assert torch.equal(torch.cat([model(part) for part in x.split(size, 1)], 1), together)


def test_there_is_nothing_to_gain_in_float32() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(8, 8))
    with Prepacked(model).used():
        assert "forward" not in vars(model[0])
