"""Vector formats are recognised and refused, with the reason."""

import pytest
import torch

from conformance.weights import draw_weight
from ref.layouts import vector


@pytest.mark.parametrize("method", vector.METHODS)
def test_refused(method):
    for refuse in (vector.find, vector.options):
        args = ([], {"quant_method": method}) if refuse is vector.find else ({"quant_method": method}, "layer")
        with pytest.raises(NotImplementedError, match=f"^{method}: ") as error:
            refuse(*args)
        assert vector.REASONS[method] in str(error.value)


@pytest.mark.parametrize("config", [{}, {"quant_method": "aqml"}, [], {"quant_method": ["aqlm"]}])
def test_not_one_of_them(config):
    with pytest.raises(ValueError, match=r"vector: quant_method is .*the nearest is"):
        vector.find([], config)


def test_read_and_write():
    with pytest.raises(NotImplementedError, match="vector: codebooks, codes: no QTensor"):
        vector.read({"codes": torch.zeros(1), "codebooks": torch.zeros(1)}, {})
    q = draw_weight(1, "int4", (2, 4))
    for store in (vector.write, vector.config_of):
        with pytest.raises(ValueError, match="vector: cannot store int4"):
            store(q)


def test_no_codebook_of_256_values_carries_even_the_smallest_aqlm():
    """One codebook of 8 bits, vectors of 8: the first weights of the vectors already take up all 256 values."""
    codebooks = torch.randn(1, 256, 1, 8, generator=torch.Generator().manual_seed(0)).half()
    assert codebooks.unique().numel() > 256
