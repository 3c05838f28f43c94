"""bitsandbytes' kernel is used where it gives the formula's bits, and only there."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from layerstream.checkpoint.codecs import bnb_kernel

BLOCK = 64
Run = Callable[[str, int, torch.Tensor, torch.Tensor, torch.Tensor], None]


@pytest.fixture(autouse=True)
def _nothing_known() -> Iterator[None]:
    bnb_kernel._agrees.clear()
    yield
    bnb_kernel._agrees.clear()


class Matrix:
    """What is decoded: sixteen rows of one value each; counts how often the formula is asked."""

    def __init__(self) -> None:
        self.asked = 0
        self.out = torch.empty(16, BLOCK)

    def formula(self) -> None:
        self.asked += 1
        self.out.copy_(torch.arange(16.0)[:, None].expand(16, BLOCK))

    def decode(self) -> torch.Tensor:
        self.out.fill_(-1)
        codes = torch.zeros(16 * BLOCK // 2, dtype=torch.uint8)
        bnb_kernel.decode("nf4", BLOCK, codes, torch.ones(16), self.out, self.formula)
        return self.out.clone()


def _right(name: str, blocksize: int, codes: torch.Tensor, scales: torch.Tensor, out: torch.Tensor) -> None:
    out.copy_(torch.arange(16.0)[:, None].expand(16, BLOCK))


def _one_bit_off(name: str, blocksize: int, codes: torch.Tensor, scales: torch.Tensor, out: torch.Tensor) -> None:
    _right(name, blocksize, codes, scales, out)
    out[3, 5] = torch.nextafter(out[3, 5], out[4, 5])


def _minus_zero(name: str, blocksize: int, codes: torch.Tensor, scales: torch.Tensor, out: torch.Tensor) -> None:
    _right(name, blocksize, codes, scales, out)
    out[0] = -0.0


def _cannot_run(name: str, blocksize: int, codes: torch.Tensor, scales: torch.Tensor, out: torch.Tensor) -> None:
    raise NotImplementedError("no kernel for this device")


def test_a_kernel_that_agrees_takes_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bnb_kernel, "_run", _right)
    matrix = Matrix()
    results = [matrix.decode() for _ in range(3)]
    assert matrix.asked == 1
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("run", [_one_bit_off, _minus_zero, _cannot_run])
def test_a_kernel_that_does_not_is_never_asked_again(monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    asked = 0

    def counted(name: str, blocksize: int, codes: torch.Tensor, scales: torch.Tensor, out: torch.Tensor) -> None:
        nonlocal asked
        asked += 1
        run(name, blocksize, codes, scales, out)

    monkeypatch.setattr(bnb_kernel, "_run", counted)
    matrix = Matrix()
    results = [matrix.decode() for _ in range(3)]
    assert (matrix.asked, asked) == (3, 1)
    assert all(torch.equal(result, torch.arange(16.0)[:, None].expand(16, BLOCK)) for result in results)


def test_without_the_package_the_formula_decodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    matrix = Matrix()
    assert torch.equal(matrix.decode(), matrix.decode())
    assert matrix.asked == 2
