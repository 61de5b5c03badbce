from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tensorpress.evaluators.base import no_progress
from tensorpress.evaluators.generation import (
    FunctionPrompt,
    Generation,
    complete_functions,
    cut_function,
    function_prompts,
    greedy,
    parses,
)

END = "<end>"


@pytest.fixture(scope="session")
def tokenizer(make_byte_tokenizer):
    """One token a byte, but for the colon with its line end, which is one."""
    return make_byte_tokenizer((":", "Ċ"), eos_token=END)


class Parrot(nn.Module):
    """Says one known text after the other, a row each, whatever the prompts are."""

    def __init__(self, tokenizer, texts):
        super().__init__()
        self.texts = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        self.size, self.prompts = len(tokenizer), []
        self.device = torch.device("cpu")
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(max_position_embeddings=10_000))

    def forward(self, input_ids, past_key_values=None, use_cache=True):
        if past_key_values is None:
            said = [self.texts[(len(self.prompts) + row) % len(self.texts)] for row in range(len(input_ids))]
            self.prompts += input_ids.tolist()
            past_key_values = [list(text) for text in said]
        tokens = [text.pop(0) if text else 0 for text in past_key_values]
        logits = nn.functional.one_hot(torch.tensor(tokens)[:, None], self.size).float()
        return SimpleNamespace(logits=logits, past_key_values=past_key_values)


@pytest.fixture
def generate(evaluate, tokenizer):
    """`generate(model, text)`: the result on the windows of a text."""

    def run(model, text, demo=True):
        ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
        windows = ids[: len(ids) // 16 * 16].view(-1, 16)
        return evaluate(Generation(), model, model, windows, tokenizer, demo=demo)

    return run


SOURCE = (
    "# the beginning of this text\n" * 6
    + '''
import sys

def first(a, b):
    if a:
        return b
    return sys.argv[0]

class Thing:
    def second(self) -> int:
        text = """quoted
        text"""
        return len(text)

    def third(self, size=len("xx")):
        return 3

def fourth():
    return 4
'''
    + "# the end of this text\n" * 10
)


def test_cut_ends_at_the_first_line_that_is_no_deeper():
    body = "    def f(a):\n        x = 1\n\n        return x\n"
    assert cut_function(body + "    def g", False) == body
    assert cut_function(body + "z", False) == body
    assert cut_function(body + "\n\n", False).rstrip("\n") == body.rstrip("\n")


def test_cut_drops_half_a_line_unless_the_text_is_complete():
    assert cut_function("def f():\n  x = 1\n  return (x", False) == "def f():\n  x = 1\n"
    assert cut_function("def f():\n  x = 1\n  return x", True) == "def f():\n  x = 1\n  return x\n"
    assert cut_function("def f():\n  return x\n  ", False) == "def f():\n  return x\n"
    assert cut_function("def f():", False).strip() == ""


def test_parses():
    assert parses("    def f(a):\n        return a\n")
    assert parses("def f():\n\treturn '\\d'\n")
    assert not parses("def f():\n")
    assert not parses("def f():\n    return (\n")
    assert not parses("def f():\n    x = '\0'\n")
    assert not parses("def f():\n" + "    return " + "(" * 5000 + ")" * 5000 + "\n")


def test_prompts_end_with_the_header_as_the_text_is_cut(tokenizer):
    prompts = function_prompts(SOURCE, tokenizer, 24, length=30, after=12)
    assert [p.header for p in prompts] == ["def first(a, b):\n", "    def second(self) -> int:\n", "def fourth():\n"]
    for prompt in prompts:
        before, _, rest = SOURCE.partition(prompt.header)
        assert (before + prompt.header).endswith(tokenizer.decode(prompt.tokens))
        assert len(prompt.tokens) == 30
        assert rest.startswith(tokenizer.decode(prompt.continuation))
        assert len(prompt.continuation) == 12
    assert [p.header for p in function_prompts(SOURCE, tokenizer, 2, 30, 12)] == [
        "def first(a, b):\n",
        "    def second(self) -> int:\n",
    ]
    assert len(function_prompts(SOURCE, tokenizer, 24, length=30, after=250)) == 2  # too little follows the last
    assert len(function_prompts(SOURCE, tokenizer, 24, length=24, after=12)) == 2  # one header is longer
    assert len(function_prompts(SOURCE, tokenizer, 24, length=220, after=12)) == 2  # too little is before the first


def test_share_of_functions_that_parse(generate, tokenizer):
    texts = ["    return 1\n\nx = (", "        return )\n", "    if a:\n        return 1\n    return (1, 2" + "," * 60]
    model = Parrot(tokenizer, ["."] * 4 + texts)
    result = generate(model, SOURCE)
    assert result.conditions["functions"] == 3
    assert result.metrics == {"parsable_functions": pytest.approx(2 / 3)}
    assert result.conditions["parsable_functions_of_the_text"] == 1.0
    assert generate(Parrot(tokenizer, ["."] * 4 + texts), SOURCE) == result


def test_end_of_text_ends_the_function(generate, tokenizer):
    complete = Parrot(tokenizer, ["."] * 4 + [f"        return 1{END}def )"] * 3)
    assert generate(complete, SOURCE).metrics["parsable_functions"] == 1.0
    silent = Parrot(tokenizer, ["."] * 4 + [END] * 3)
    assert generate(silent, SOURCE).metrics["parsable_functions"] == 0.0


def test_decoding_ends_with_the_last_function(tokenizer):
    model = Parrot(tokenizer, ["        return 1\n\nx" + "y" * 60, "        1\nz" + "y" * 60])
    steps = []
    model.register_forward_hook(lambda *call: steps.append(1))
    prompt = tokenizer("    def f():\n", add_special_tokens=False)["input_ids"]
    functions = [FunctionPrompt(prompt, "    def f():\n", [])] * 2
    made = complete_functions(model, tokenizer, functions, 64, no_progress)
    assert made == ["    def f():\n        return 1\n\n", "    def f():\n        1\n"]
    assert len(steps) == len("        return 1\n\nx")


def test_samples_are_kept_for_every_model(generate, tokenizer):
    result = generate(Parrot(tokenizer, ["ONE", "TWO"]), SOURCE, demo=False)
    assert result.metrics == {}
    assert result.texts["samples.txt"].count("===== prompt") == 4
    assert "===== continuation\nTWO" in result.texts["samples.txt"]
    assert generate(Parrot(tokenizer, ["x"]), "no functions here " * 20).metrics == {}


def test_greedy_with_a_cache_is_greedy_without(generate, make_model, tokenizer):
    model = make_model(num_hidden_layers=2, vocab_size=len(tokenizer)).double()
    prompts = torch.randint(len(tokenizer), (3, 7))
    expected = prompts.tolist()
    with torch.no_grad():
        for row in expected:  # one at a time
            for _ in range(10):
                row.append(int(model(torch.tensor([row])).logits[0, -1].argmax()))
    assert greedy(model, prompts, 10) == [row[7:] for row in expected]
    early = greedy(model, prompts, 10, lambda row, new: row == 1 and len(new) == 4)
    assert early == [row[7:11] if index == 1 else row[7:] for index, row in enumerate(expected)]
    assert 0 <= generate(model, SOURCE).metrics["parsable_functions"] <= 1  # within 64 positions
