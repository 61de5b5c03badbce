"""Packed integers against an oracle that sets one bit at a time, and against the layout that GPTQ files have."""

import pytest
import torch

from tensorpress.kernels.packing import pack, packed_rows, unpack

SHAPES = [(1, 1), (7, 3), (31, 5), (32, 2), (33, 1), (64, 4), (97, 13), (160, 7)]
BITS = (2, 3, 4, 8)


def naive_pack(column, bits):
    """One little-endian stream of bits, cut into words of 32, as signed integers."""
    stream = [(value >> bit) & 1 for value in column for bit in range(bits)]
    stream += [0] * (-len(stream) % 32)
    words = [sum(bit << i for i, bit in enumerate(stream[at : at + 32])) for at in range(0, len(stream), 32)]
    return [word - (1 << 32) if word >> 31 else word for word in words]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", SHAPES)
def test_pack_sets_every_bit_where_the_oracle_does(seed, bits, shape):
    values = torch.randint(0, 1 << bits, shape)
    words = pack(values, bits)
    assert words.dtype == torch.int32 and words.shape == (packed_rows(shape[0], bits), shape[1])
    assert words.T.tolist() == [naive_pack(column, bits) for column in values.T.tolist()]
    back = unpack(words, bits, shape[0])
    assert back.shape == shape and torch.equal(back.long(), values)


@pytest.mark.parametrize("bits", BITS)
def test_extremes_and_input_types(bits):
    top = (1 << bits) - 1
    full = torch.full((32, 3), top)
    assert (pack(full, bits) == -1).all()  # every bit set
    assert not pack(torch.zeros(32, 3, dtype=torch.int64), bits).any()
    assert torch.equal(unpack(pack(full, bits), bits, 32).long(), full)
    for dtype in (torch.uint8, torch.int32, torch.int64):
        assert torch.equal(pack(full.to(dtype), bits), pack(full, bits))
    strided = torch.arange(96).remainder(top + 1).view(3, 32).T
    assert torch.equal(unpack(pack(strided, bits), bits, 32).long(), strided)


def test_three_bits_lie_as_gptq_files_have_them(seed):
    """32 values in three words: values 10 and 21 are split between two words, as AutoGPTQ's packing loop does."""
    for _ in range(20):
        q = torch.randint(0, 8, (32,)).tolist()
        first = sum(q[j] << 3 * j for j in range(10)) | q[10] << 30
        second = q[10] >> 2 | sum(q[j] << 3 * (j - 11) + 1 for j in range(11, 21)) | q[21] << 31
        third = q[21] >> 1 | sum(q[j] << 3 * (j - 22) + 2 for j in range(22, 32))
        found = pack(torch.tensor(q)[:, None], 3)[:, 0]
        assert [int(word) & 0xFFFFFFFF for word in found] == [word & 0xFFFFFFFF for word in (first, second, third)]


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_other_bits_lie_as_gptq_files_have_them(seed, bits):
    """Value j of word r is row r * (32 / bits) + j of the weights."""
    per_word = 32 // bits
    values = torch.randint(0, 1 << bits, (3 * per_word, 5))
    words = pack(values, bits).long() & 0xFFFFFFFF
    for row in range(3 * per_word):
        field = words[row // per_word] >> (row % per_word * bits) & ((1 << bits) - 1)
        assert torch.equal(field, values[row])


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("wrong", ["below", "above"])
def test_values_out_of_range_are_refused(bits, wrong):
    values = torch.zeros(5, 3, dtype=torch.int64)
    values[3, 1] = -1 if wrong == "below" else 1 << bits
    with pytest.raises(ValueError, match=rf"0\.\.{(1 << bits) - 1} .*{bits} bits"):
        pack(values, bits)


@pytest.mark.parametrize(
    ("count", "bits", "rows"), [(32, 3, 3), (33, 3, 4), (10, 3, 1), (11, 3, 2), (8, 4, 1), (9, 4, 2)]
)
def test_words_needed(count, bits, rows):
    assert packed_rows(count, bits) == rows
