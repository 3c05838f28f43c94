from collections.abc import Callable

import pytest
import torch
from layerstream.hardware.waits import RefusingWaits

THERE = torch.device("meta")
Work = Callable[[torch.Tensor], object]


@pytest.mark.parametrize(
    "work",
    [
        lambda rows: rows.sum().item(),
        lambda rows: bool(rows.any()),
        lambda rows: rows.nonzero(),
        lambda rows: rows[rows > 0],
        lambda rows: torch.equal(rows, rows),
        lambda rows: rows.copy_(torch.ones(4)),
        lambda rows: torch.ones(4).to(THERE) if rows.dim() else None,
        lambda rows: torch.tensor(1.0).to(rows.device),
    ],
)
def test_what_the_host_waits_for_is_refused(work: Work) -> None:
    rows = torch.ones(4, device=THERE)
    with torch.inference_mode(), pytest.raises(RuntimeError, match="wait for the device"), RefusingWaits(THERE):
        work(rows)


def test_everything_else_runs() -> None:
    rows, chosen = torch.ones((4, 8), device=THERE), torch.zeros(2, dtype=torch.long, device=THERE)
    with torch.inference_mode(), RefusingWaits(THERE):
        found = torch.nn.functional.rms_norm(rows * 2.0 + torch.tensor(1.0), (8,))[chosen]
        assert found.index_copy_(0, chosen, found).to(torch.bfloat16).view(4, 4).shape == (4, 4)
        assert torch.ones(3).sum().item() == 3  # on the host
