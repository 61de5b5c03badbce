"""Integers of 2, 3, 4 or 8 bits packed into 32-bit words, in the order of the GPTQ checkpoint layout.

Along the packed axis the values form one little-endian stream of bits: value r occupies bits r*b .. r*b+b-1. For 2, 4
and 8 bits no value crosses a word; for 3 bits 32 values fill three words exactly. A length that does not fill the last
word is padded with zero bits.
"""

from __future__ import annotations

import math

import torch
from torch import nn

WORD = 32


def packed_rows(count: int, bits: int) -> int:
    """Number of 32-bit words that `count` values of `bits` bits take."""
    return math.ceil(count * bits / WORD)


def pack(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack integers [K, N] in 0 .. 2^bits - 1 along their first axis into int32 [ceil(K * bits / 32), N].

    Raises ValueError if a value is out of range.
    """
    if values.numel() and (int(values.min()) < 0 or int(values.max()) >= 1 << bits):
        raise ValueError(f"values must lie in 0..{(1 << bits) - 1} to be packed in {bits} bits")
    count, columns = values.shape
    rows = packed_rows(count, bits)
    words = torch.zeros(rows, columns, dtype=torch.int64, device=values.device)
    values = values.to(torch.int64)
    first = torch.arange(count, device=values.device) * bits
    word, offset = first // WORD, first % WORD
    words.index_add_(0, word, (values << offset[:, None]) & 0xFFFFFFFF)
    spill = offset + bits > WORD
    if bool(spill.any()):
        words.index_add_(0, word[spill] + 1, values[spill] >> (WORD - offset[spill])[:, None])
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def unpack(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """Unpack int32 [ceil(count * bits / 32), N] into integers [count, N] (int32); the inverse of `pack`."""
    mask = (1 << bits) - 1
    if WORD % bits == 0:
        shifts = torch.arange(0, WORD, bits, device=words.device, dtype=torch.int32)
        return ((words[:, None, :] >> shifts[None, :, None]) & mask).reshape(-1, words.shape[1])[:count]
    # 3 bits: every 32 values fill three words; a value is cut out of one word, or of two.
    columns = words.shape[1]
    threes = nn.functional.pad(words, (0, 0, 0, -len(words) % bits)).view(-1, bits, columns)
    values = words.new_empty(len(threes), WORD, columns)
    for place in range(WORD):
        word, offset = divmod(place * bits, WORD)
        value = threes[:, word] >> offset
        if offset + bits > WORD:
            value = (value & ((1 << (WORD - offset)) - 1)) | (threes[:, word + 1] << (WORD - offset))
        values[:, place] = value & mask
    return values.view(-1, columns)[:count]
