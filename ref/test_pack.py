"""The little-endian bitstream against a model bit by bit, and against one big integer."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from .pack import pack, unpack, words_per_row


@st.composite
def rows_of_codes(draw):
    bits, k = draw(st.integers(1, 8)), draw(st.integers(0, 100))
    row = st.lists(st.integers(0, 2**bits - 1), min_size=k, max_size=k)
    rows = draw(st.lists(row, min_size=1, max_size=3))
    return bits, k, rows


def words(row, bits):
    """A row as one big integer, cut into words of 32 bits."""
    big = sum(code << (i * bits) for i, code in enumerate(row))
    count = (len(row) * bits + 31) // 32
    return [(big >> (32 * i)) & 0xFFFFFFFF for i in range(count)]


@given(rows_of_codes())
def test_pack_is_one_big_integer(drawn):
    bits, k, rows = drawn
    packed = pack(torch.tensor(rows, dtype=torch.long).reshape(len(rows), k), bits)
    assert packed.dtype == torch.int32 and packed.shape == (len(rows), words_per_row(k, bits)) and packed.is_contiguous()
    assert [[w & 0xFFFFFFFF for w in row] for row in packed.tolist()] == [words(row, bits) for row in rows]


@given(rows_of_codes())
def test_round_trip(drawn):
    bits, k, rows = drawn
    codes = torch.tensor(rows, dtype=torch.uint8).reshape(len(rows), k)
    back = unpack(pack(codes, bits), bits, k)
    assert back.dtype == torch.uint8 and torch.equal(back, codes)


@given(st.integers(1, 8), st.integers(1, 70), st.integers(0, 2**32 - 1))
def test_unpack_any_words(bits, k, seed):
    """Words that no pack made: every bit pattern, bits behind the last code included."""
    generator = torch.Generator().manual_seed(seed)
    packed = torch.randint(-(2**31), 2**31, (2, words_per_row(k, bits)), generator=generator).to(torch.int32)
    for row, codes in zip(packed.tolist(), unpack(packed, bits, k).tolist(), strict=True):
        stream = [(word >> i) & 1 for word in row for i in range(32)]
        assert codes == [sum(bit << j for j, bit in enumerate(stream[i * bits : (i + 1) * bits])) for i in range(k)]


@pytest.mark.parametrize("bits", range(1, 9))
def test_every_code_at_every_place(bits):
    """Two blocks of 32 codes: every place a code can have in its words, one code set at a time and all others zero or all ones."""
    codes = torch.arange(2**bits)[:, None, None] * torch.eye(64, dtype=torch.long)
    assert torch.equal(unpack(pack(codes, bits), bits, 64).long(), codes)
    assert torch.equal(unpack(pack(2**bits - 1 - codes, bits), bits, 64).long(), 2**bits - 1 - codes)


@pytest.mark.parametrize("bits", range(1, 9))
def test_padding_is_zero_and_a_row_is_a_prefix(bits):
    codes = torch.randint(2**bits, (3, 77), generator=torch.Generator().manual_seed(0))
    whole = pack(codes, bits).tolist()
    for k in (1, 5, 31, 32, 33, 64, 77):
        for full, part in zip(whole, pack(codes[:, :k], bits).tolist(), strict=True):
            big = sum((w & 0xFFFFFFFF) << (32 * i) for i, w in enumerate(full)) & (2 ** (k * bits) - 1)
            assert sum((w & 0xFFFFFFFF) << (32 * i) for i, w in enumerate(part)) == big


def test_shapes_dtypes_and_strides():
    codes = torch.randint(8, (2, 3, 4, 40))
    packed = pack(codes, 3)
    assert packed.shape == (2, 3, 4, 4) and torch.equal(packed[1, 2], pack(codes[1, 2], 3))
    assert torch.equal(pack(codes.transpose(0, 2), 3), packed.transpose(0, 2))
    assert torch.equal(unpack(packed.transpose(0, 2), 3, 40), unpack(packed, 3, 40).transpose(0, 2))
    for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32):
        assert torch.equal(pack(codes.to(dtype), 3), packed)
    for shape in ((0, 5), (5, 0), (0, 0), (0,), (2, 0, 7)):
        empty = pack(torch.zeros(shape, dtype=torch.uint8), 5)
        assert empty.shape == (*shape[:-1], words_per_row(shape[-1], 5)) and unpack(empty, 5, shape[-1]).shape == shape


@pytest.mark.parametrize("bits", range(1, 9))
def test_rows_cut_from_others(bits):
    """Rows that begin at any word of a larger tensor, and columns that lie apart."""
    codes = torch.randint(2**bits, (7, 37), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    packed = pack(codes, bits)
    assert torch.equal(unpack(packed[3:], bits, 37), codes[3:]) and torch.equal(unpack(packed[::3], bits, 37), codes[::3])
    assert torch.equal(pack(codes[3:, 1:], bits), pack(codes[3:, 1:].clone(), bits))
    assert torch.equal(pack(codes[:, ::5], bits), pack(codes[:, ::5].clone(), bits))
    apart = torch.stack((packed, packed), dim=-1)[..., 1]
    assert not apart.is_contiguous() and torch.equal(unpack(apart, bits, 37), codes)
    assert torch.equal(unpack(apart[:1, :1], bits, 32 // bits), codes[:1, : 32 // bits])
    assert torch.equal(pack(codes[:1, 5:6], bits), pack(codes[:1, 5:6].clone(), bits))


@pytest.mark.parametrize("bits", range(1, 9))
def test_arguments_are_left_alone_and_results_are_new(bits):
    codes = torch.randint(2**bits, (3, 64), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    before, packed = codes.clone(), pack(codes, bits)
    words_before, back = packed.clone(), unpack(packed, bits, 64)
    assert torch.equal(codes, before) and torch.equal(packed, words_before)
    back.zero_()
    assert torch.equal(packed, words_before)
    packed.zero_()
    assert torch.equal(codes, before)


def test_width():
    assert [words_per_row(33, b) for b in range(1, 9)] == [2, 3, 4, 5, 6, 7, 8, 9]
    assert (words_per_row(0, 3), words_per_row(1, 8), words_per_row(64, 3), words_per_row(4096, 4)) == (0, 1, 6, 512)


def test_errors():
    codes = torch.zeros(2, 8, dtype=torch.long)
    for bits in (0, 9, -1):
        with pytest.raises(ValueError, match=f"pack: got {bits} bits, expected 1 to 8"):
            pack(codes, bits)
        with pytest.raises(ValueError, match=f"unpack: got {bits} bits, expected 1 to 8"):
            unpack(codes.int(), bits, 8)
    with pytest.raises(ValueError, match=r"codes range from 0 to 16, expected 0 to 15 \(4 bits\)"):
        pack(torch.tensor([0, 16]), 4)
    with pytest.raises(ValueError, match=r"codes range from -1 to 3"):
        pack(torch.tensor([-1, 3]), 4)
    for dtype in (torch.float32, torch.bool):
        with pytest.raises(TypeError, match="expected an integer dtype"):
            pack(codes.to(dtype), 4)
    with pytest.raises(TypeError, match=r"dtype torch.int64, expected torch.int32"):
        unpack(torch.zeros(2, 1, dtype=torch.long), 4, 8)
    for count in (0, 2):
        with pytest.raises(ValueError, match=rf"packed has {count} words a row, expected 1 \(k=8 codes of 4 bits\)"):
            unpack(torch.zeros(2, count, dtype=torch.int32), 4, 8)
