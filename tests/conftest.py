"""Tiny models of every architecture, tokenizers, the command line, an S3 server of this process, and seeds that a failing test shows."""

from __future__ import annotations

import os
import re
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
import torch
import transformers
from transformers import PreTrainedModel

VOCABULARY = 64
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
DECODER = {**SIZES, "intermediate_size": 48, "max_position_embeddings": 64, "eos_token_id": None, "pad_token_id": 0}
GROUPED = {**DECODER, "num_key_value_heads": 2}
WIDE_HEAD = {**GROUPED, "head_dim": 8}
ENCODER = {**SIZES, "intermediate_size": 48, "max_position_embeddings": 64}
OPT = {**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 64}
GPT2 = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, "eos_token_id": None}
SLIDING = {"num_hidden_layers": 4, "sliding_window": 4}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", GROUPED),
    "mistral": ("Mistral", {**GROUPED, "sliding_window": 8}),
    "qwen2": ("Qwen2", GROUPED),
    "qwen3": ("Qwen3", WIDE_HEAD),
    "gemma2": ("Gemma2", {**WIDE_HEAD, **SLIDING}),
    "gemma3": ("Gemma3Text", {**WIDE_HEAD, **SLIDING}),
    "phi": ("Phi", DECODER),
    "phi3": ("Phi3", GROUPED),
    "gpt2": ("GPT2", GPT2),
    "gpt_neox": ("GPTNeoX", DECODER),
    "gpt_neox_sequential": ("GPTNeoX", {**DECODER, "use_parallel_residual": False}),
    "opt": ("OPT", OPT),
    "opt_post": ("OPT", {**OPT, "do_layer_norm_before": False}),
    "bert": ("Bert", ENCODER),
    "distilbert": (
        "DistilBert",
        {"vocab_size": VOCABULARY, "dim": 32, "hidden_dim": 48, "n_layers": 3, "n_heads": 4},
    ),
    "roberta": ("Roberta", ENCODER),
}
ENCODERS = ("bert", "distilbert", "roberta")


FOLDERS = ("compressors", "kernels", "flows")
"""Those with long files come first, so that no worker is left with one at the end; behind them what is short. Servers run from the first flow on."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        folder = item.path.parent.name
        return FOLDERS.index(folder) if folder in FOLDERS else len(FOLDERS)

    items.sort(key=place)


@pytest.fixture(scope="session", autouse=True)
def choices_of_kernels(tmp_path_factory):
    """What tests measure is not remembered for the user who runs them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TENSORPRESS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def plain_kernels(monkeypatch):
    """`auto` is the reference, also in programs that the test starts."""
    monkeypatch.setenv("TENSORPRESS_KERNELS", "reference")


@pytest.fixture
def seed() -> int:
    """A fresh seed for every test; pytest shows it when the test fails."""
    value = int.from_bytes(os.urandom(4), "little") >> 1
    print(f"seed {value}")
    torch.manual_seed(value)
    return value


@pytest.fixture
def make_model(seed: int) -> Callable[..., PreTrainedModel]:
    """`make_model("llama", num_hidden_layers=2)`: a tiny model in evaluation mode, no parameter of it zero or one."""

    def make(name: str = "llama", **changes: Any) -> PreTrainedModel:
        family, fields = CONFIGS[name]
        config = getattr(transformers, f"{family}Config")(**{**fields, **changes})
        auto = transformers.AutoModel if name in ENCODERS else transformers.AutoModelForCausalLM
        model = auto.from_config(config)
        for parameter in model.parameters():
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
        return model.eval()

    return make


@pytest.fixture
def make_tokenizer() -> Callable[..., Any]:
    """`make_tokenizer(64)`: a tokenizer of letters with that many ids."""

    def make(size: int = VOCABULARY) -> Any:
        from tokenizers import Tokenizer, models, pre_tokenizers

        letters = [chr(code) for code in range(97, 123)]
        words = ["<unk>", "<pad>", *letters, *(f"<{i}>" for i in range(size))][:size]
        inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
        inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
        return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", pad_token="<pad>")

    return make


@pytest.fixture
def make_marking_tokenizer(make_tokenizer: Any) -> Callable[..., Any]:
    """`make_marking_tokenizer(64)`: the same with one mark before a text and two after it."""

    def make(size: int = VOCABULARY) -> Any:
        from tokenizers import processors

        tokenizer = make_tokenizer(size)
        names = [(name, tokenizer.convert_tokens_to_ids(name)) for name in ("<1>", "<2>", "<3>")]
        marking = processors.TemplateProcessing(single="<1> $A <2> <3>", special_tokens=names)
        tokenizer.backend_tokenizer.post_processor = marking
        return tokenizer

    return make


@pytest.fixture(scope="session")
def make_byte_tokenizer() -> Callable[..., Any]:
    """`make_byte_tokenizer((":", "Ċ"), eos_token="<end>")`: a token for each byte, then one for each merge."""

    def make(*merges: tuple[str, str], **special: str) -> Any:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers

        texts = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *map("".join, merges)]
        inner = Tokenizer(models.BPE(vocab={text: i for i, text in enumerate(texts)}, merges=list(merges)))
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        inner.decoder = decoders.ByteLevel()
        return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **special)

    return make


@pytest.fixture(scope="session")
def save_folder(make_byte_tokenizer: Any) -> Callable[[PreTrainedModel, Path], Path]:
    """`save_folder(model, folder)`: the model of a vocabulary of at least 257 on disk, with a tokenizer of bytes."""

    def save(model: PreTrainedModel, folder: Path) -> Path:
        model.save_pretrained(folder)
        make_byte_tokenizer(pad_token="<pad>").save_pretrained(folder)
        return folder

    return save


@pytest.fixture
def make_folder(tmp_path: Path, make_model: Any, make_tokenizer: Any) -> Callable[..., Path]:
    """`make_folder("llama")`: a model folder with weights and tokenizer on disk."""

    def make(
        name: str = "llama", model: PreTrainedModel | None = None, vocabulary: int = VOCABULARY, **changes: Any
    ) -> Path:
        folder = tmp_path / f"{name}-{len(list(tmp_path.iterdir()))}"
        (model or make_model(name, **changes)).save_pretrained(folder)
        make_tokenizer(vocabulary).save_pretrained(folder)
        return folder

    return make


@pytest.fixture
def make_ids(seed: int) -> Callable[..., torch.Tensor]:
    """`make_ids(2, 9)`: random token ids that no architecture takes for padding."""

    def make(rows: int, length: int) -> torch.Tensor:
        return torch.randint(5, VOCABULARY, (rows, length))

    return make


@pytest.fixture
def make_calibration(make_ids: Any) -> Callable[..., Any]:
    """`make_calibration(6, 12)`: windows of random tokens as a method gets them."""

    def make(samples: int = 6, length: int = 12, **fields: Any) -> Any:
        from tensorpress.compressors.base import Calibration

        windows = make_ids(samples, length)
        return Calibration(
            windows, make_ids(2, length), make_ids(1, 64)[0], 0, lambda: pytest.fail("not asked for"), **fields
        )

    return make


@pytest.fixture
def outputs() -> Callable[..., torch.Tensor]:
    """`outputs(model, ids)`: logits or hidden states in float64."""

    def run(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return model(input_ids=ids)[0].double()

    return run


class Ended(NamedTuple):
    """What a run of the command line leaves."""

    code: int
    out: str
    err: str


@pytest.fixture
def tensorpress_run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Ended]:
    """`tensorpress_run("run", "recipe.yaml")`: the command line's own entry in this process; exit code, output, errors."""

    def run(*arguments: object) -> Ended:
        from tensorpress.cli import main

        monkeypatch.setattr(sys, "argv", ["tensorpress", *map(str, arguments)])
        capsys.readouterr()  # what the test printed before
        with pytest.raises(SystemExit) as stop:
            main()
        return Ended(stop.value.code, *capsys.readouterr())

    return run


@pytest.fixture
def one_line() -> Callable[..., str]:
    """`one_line(caught)`: the message of an InputError that is one line; no control characters, not endless."""

    def check(caught: Any, *parts: str) -> str:
        (line,) = caught.value.problems
        assert "\n" not in line and len(line) < 500 and "Traceback" not in line
        for part in parts:
            assert re.search(part, line), f"{part!r} not in {line!r}"
        return line

    return check


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """An S3-compatible server on 127.0.0.1. As in S3, a conditional write is one step: moto alone looks first, then writes."""
    from moto.s3.responses import S3Response
    from moto.server import ThreadedMotoServer

    one_at_a_time, put = threading.Lock(), S3Response.put_object

    def put_object(self: Any) -> Any:
        with one_at_a_time:
            return put(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(S3Response, "put_object", put_object)
        server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        server.start()
        host, port = server.get_host_and_port()
        httpx.put(f"http://{host}:{port}/bucket", trust_env=False).raise_for_status()
        yield f"http://{host}:{port}"
        server.stop()


@pytest.fixture
def s3(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """`s3://bucket/prefix`, a fresh prefix, which this process and those that it starts find by their environment."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "nothing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    monkeypatch.setenv("AWS_CONFIG_FILE", "/dev/null")
    return f"s3://bucket/{uuid.uuid4().hex}/prefix"
