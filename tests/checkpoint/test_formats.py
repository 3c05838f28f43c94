"""The table of formats, and what has to be there for each of its rows."""

from __future__ import annotations

import subprocess
import sys

import pytest
from layerstream.checkpoint.codecs.base import matrix_shape
from layerstream.checkpoint.codecs.encode import ENCODERS
from layerstream.core.formats import FORMATS, KERNELS

SIZE = 256


def test_every_row_has_its_encoder() -> None:
    assert ENCODERS.keys() == FORMATS.keys()


@pytest.mark.parametrize("kind", FORMATS)
def test_a_sample_is_a_matrix_of_the_format(kind: str) -> None:
    codec, planes = ENCODERS[kind].sample(SIZE)
    assert codec.name == kind
    assert codec.kernel == FORMATS[kind].kernel
    assert {name: tuple(plane.shape) for name, plane in planes.items()} == codec.expected(
        *matrix_shape(codec, (SIZE, SIZE))
    )


def test_no_two_formats_share_a_kernel() -> None:
    assert [row.kernel for row in KERNELS.values()] == list(KERNELS)


def test_the_table_needs_no_torch() -> None:
    program = "import sys, layerstream.core.formats; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
