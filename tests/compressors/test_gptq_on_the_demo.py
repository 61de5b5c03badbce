"""Plain 4 bits on the demo model, as the quickstart has it: what the whole pipeline must give on real text, with each kernel."""

from __future__ import annotations

import math

import torch

from tensorpress.compressors.base import Calibration
from tensorpress.compressors.quantize.gptq import GPTQ
from tensorpress.evaluators.perplexity import nll
from tensorpress.kernels import cpu_linear
from tensorpress.loading import load, use_kernels, use_quick_kernels
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
    after, _ = nll(model, held_out)
    assert 1.0 < math.exp((after - nats) / tokens) <= BAR
    if cpu_linear.compiled() is not None:
        found = {}
        for kernels in ("cpu", "cpu_int8"):
            use_kernels(model, kernels)
            found[kernels] = nll(model, held_out)[0]
        assert abs(math.exp((found["cpu"] - after) / tokens) - 1) < 1e-4, "weight-only changes nothing but the rounding"
        assert abs(math.exp((found["cpu_int8"] - found["cpu"]) / tokens) - 1) < 0.005
