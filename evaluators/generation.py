"""Greedy generation: samples to read, and how many functions of a model of Python source still parse."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
import warnings
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from tensorpress.evaluators.base import EvaluationData, Evaluator, Measurement, Progress, Subject, no_progress
from tensorpress.evaluators.perplexity import position_limit

if TYPE_CHECKING:
    from transformers import PreTrainedModel

HEADER = re.compile(r"^[ \t]*def \w+\([^()\n]*\)(?: *-> *[^:\n]+)?:$", re.MULTILINE)


@torch.no_grad()
def step(model: PreTrainedModel, ids: torch.Tensor, cache: Any = None) -> tuple[torch.Tensor, Any]:
    """Read `ids` [rows, length] after what the cache holds: (the likeliest next tokens [rows, 1], the key-value cache)."""
    prompt = ids.shape[1] > 1 and "logits_to_keep" in inspect.signature(model.forward).parameters
    last = {"logits_to_keep": 1} if prompt else {}
    output = model(input_ids=ids, past_key_values=cache, use_cache=True, **last)
    return output.logits[:, -1:].argmax(-1), output.past_key_values


def greedy(
    model: PreTrainedModel,
    prompts: torch.Tensor,
    count: int,
    stop: Callable[[int, list[int]], bool] = lambda row, new: False,
    progress: Callable[[int], None] = lambda done: None,
) -> list[list[int]]:
    """The tokens that greedy decoding adds to each of `prompts` [rows, length], decoded side by side.

    `count` tokens a row, or fewer where `stop(row, new tokens)` says that they are enough.
    """
    tokens, cache = step(model, prompts.to(model.device))
    rows: list[list[int]] = [[] for _ in prompts]
    going = set(range(len(rows)))
    while True:
        for row in sorted(going):
            rows[row].append(int(tokens[row]))
            if len(rows[row]) == count or stop(row, rows[row]):
                going.remove(row)
        progress(max(map(len, rows)))
        if not going:
            return rows
        tokens, cache = step(model, tokens, cache)


def text_after(tokenizer: Any, prompt: list[int], new: list[int]) -> tuple[str, bool]:
    """Text that `new` tokens add to the prompt up to an end-of-text token, and whether there was one."""
    end = tokenizer.eos_token_id
    ended = end is not None and end in new
    new = new[: new.index(end)] if ended else new
    before, whole = (tokenizer.decode(ids, clean_up_tokenization_spaces=False) for ids in (prompt, prompt + new))
    return whole[len(before) :], ended


@dataclass(frozen=True)
class FunctionPrompt:
    """Tokens up to the end of a function's header, the text from the header's line on, and the text's own next tokens."""

    tokens: list[int]
    header: str
    continuation: list[int]


def function_prompts(text: str, tokenizer: Any, count: int, length: int, after: int) -> list[FunctionPrompt]:
    """At most `count` functions of a Python text, spread over it evenly, each the `length` tokens that its header ends.

    The prompt ends with the token that ends the header's colon, so that it is cut as the text itself is; `after` tokens
    of the text follow it. A function with less text around it, or a longer header, is passed over.
    """
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    starts, ends = [start for start, _ in offsets], [end for _, end in offsets]
    prompts = []
    for match in HEADER.finditer(text):
        first, body = bisect_left(starts, match.start()), bisect_left(ends, match.end()) + 1
        if 0 <= body - length <= first and body + after <= len(ids):
            header = text[match.start() : ends[body - 1]]
            prompts.append(FunctionPrompt(ids[body - length : body], header, ids[body : body + after]))
    if len(prompts) <= count:
        return prompts
    return [prompts[i * len(prompts) // count] for i in range(count)]


def dedent_line(lines: list[str]) -> int | None:
    """Index of the first line indented no deeper than line 0, which is the line that ends the function; None if none is."""
    depth = _indentation(lines[0])
    deeper = (not line.strip() or _indentation(line) > depth for line in lines[1:])
    return next((index for index, inside in enumerate(deeper, start=1) if not inside), None)


def cut_function(source: str, complete: bool) -> str:
    """The function that `source` starts with: up to the first line indented no deeper than its header.

    Where there is no such line and the text is not `complete`, its last line may be half a line and is dropped.
    """
    lines = source.split("\n")
    end = dedent_line(lines)
    if end is None and not complete:
        end = len(lines) - 1
    return "\n".join(lines[:end]) + "\n"


def _indentation(line: str) -> int:
    line = line.expandtabs()
    return len(line) - len(line.lstrip())


def complete_functions(
    model: PreTrainedModel, tokenizer: Any, functions: Sequence[FunctionPrompt], count: int, progress: Progress
) -> list[str]:
    """The functions that greedy decoding makes of their headers; a row ends with its function, or after `count` tokens."""

    def over(row: int, new: list[int]) -> bool:
        added, ended = text_after(tokenizer, functions[row].tokens, new)
        return ended or dedent_line((functions[row].header + added).split("\n")) is not None

    prompts = torch.tensor([function.tokens for function in functions])
    made = greedy(model, prompts, count, over, lambda done: progress("generation", done, count))
    return [_function(tokenizer, function, new) for function, new in zip(functions, made, strict=True)]


def _function(tokenizer: Any, prompt: FunctionPrompt, new: list[int]) -> str:
    """The function that a header and the tokens after it make."""
    added, ended = text_after(tokenizer, prompt.tokens, new)
    return cut_function(prompt.header + added, ended)


def parses(function: str) -> bool:
    """Whether Python's own parser takes the function, wherever it was indented."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ast.parse(textwrap.dedent(function))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


class Generation(Evaluator):
    """`samples.txt` with greedy continuations; for the demo model also `parsable_functions`, a share in 0..1.

    A function longer than `NEW_TOKENS` is cut after a whole line, which not every construct survives: the same share for
    the held-out text itself, cut in the same way, stands in the conditions.
    """

    name = "generation"
    gives = ("parsable_functions",)
    SAMPLES, PROMPT_TOKENS, NEW_TOKENS = 4, 32, 64
    FUNCTIONS, CONTEXT_TOKENS = 64, 128

    def evaluate(self, subject: Subject, data: EvaluationData, progress: Progress = no_progress) -> Measurement:
        room = max(1, min(self.NEW_TOKENS, position_limit(subject.model) // 2))
        samples = self._samples(subject.model, data, room)
        result = Measurement({}, {"decoding": "greedy"}, {"samples.txt": samples})
        if data.demo:
            text = data.tokenizer.decode(data.windows.flatten().tolist(), clean_up_tokenization_spaces=False)
            length = min(self.CONTEXT_TOKENS, position_limit(subject.model) - room)
            functions = function_prompts(text, data.tokenizer, self.FUNCTIONS, length, room)
            result.conditions["functions"] = len(functions)
            if functions:
                made = complete_functions(subject.model, data.tokenizer, functions, room, progress)
                held = [_function(data.tokenizer, function, function.continuation) for function in functions]
                result.metrics["parsable_functions"] = sum(map(parses, made)) / len(functions)
                result.conditions["parsable_functions_of_the_text"] = sum(map(parses, held)) / len(functions)
        return result

    def _samples(self, model: PreTrainedModel, data: EvaluationData, room: int) -> str:
        """Continuations of the beginnings of a few windows, as text."""
        length = min(self.PROMPT_TOKENS, position_limit(model) - room)
        prompts = data.windows[:: max(1, len(data.windows) // self.SAMPLES)][: self.SAMPLES, :length]
        parts = []
        for prompt, new in zip(prompts.tolist(), greedy(model, prompts, room), strict=True):
            added, _ = text_after(data.tokenizer, prompt, new)
            before = data.tokenizer.decode(prompt, clean_up_tokenization_spaces=False)
            parts.append(f"===== prompt\n{before}\n===== continuation\n{added}\n")
        return "\n".join(parts)
