"""Plain 4 bits on the demo model, as the quickstart has it: what the whole pipeline must give on real text."""

from __future__ import annotations

import math

import torch

from tensorpress.compressors.base import Calibration
from tensorpress.compressors.quantize.gptq import GPTQ
from tensorpress.evaluators.perplexity import nll
from tensorpress.loading import load, use_quick_kernels
from tensorpress.source import read_tokenizer
from tensorpress.text import demo_folder, random_windows, read_text, tokenise, windows

BAR = 1.03


def test_four_bits_cost_at_most_three_percent_of_perplexity():
    tokenizer = read_tokenizer(demo_folder())
    train = tokenise(read_text("demo", "train", ""), tokenizer)
    held_out = windows(tokenise(read_text("demo", "test", ""), tokenizer), 256, 40, "")
    model = load(demo_folder(), dtype=torch.float32)
    nats, tokens = nll(model, held_out)
    chosen = random_windows(train, 256, 32, 0, "")
    model, _ = GPTQ(bits=4).compress(model, Calibration(chosen, held_out[:0], train, 0, lambda: model))
    use_quick_kernels(model)
    ratio = math.exp((nll(model, held_out)[0] - nats) / tokens)
    assert 1.0 < ratio <= BAR
