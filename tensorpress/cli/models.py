"""Verbs on models: eval, bench, inspect, generate, export."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from tensorpress.cli.common import (
    DEFAULT_STORE,
    FAILED,
    JsonOption,
    StoreOption,
    check_json_target,
    console,
    progress_bars,
    write_json,
)
from tensorpress.errors import InputError, nearest

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from tensorpress.source import ModelHandle

ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="`demo`, a folder, a hub id, or the first 6 or more digits of an artifact's digest."
    ),
]
AgainstOption = Annotated[
    str | None, typer.Option("--against", help="The original that it is set beside, named as MODEL is.")
]
DtypeOption = Annotated[
    Literal["float32", "bfloat16", "stored"], typer.Option("--dtype", help="Precision of the arithmetic.")
]
KernelsOption = Annotated[str, typer.Option("--kernels", help="`auto`, or a backend's name.")]

MOST_TEXTS = 1024
PLAIN = {
    "transformers_version", "_from_model_config", "bos_token_id", "eos_token_id", "pad_token_id", "do_sample", "temperature", "top_k", "top_p",
    "use_cache", "max_length", "max_new_tokens", "output_attentions", "output_hidden_states",
}  # fmt: skip
"""Settings of generation that `generate` has options for, or that change no text."""
PLANNED = ("gguf", "compressed-tensors", "onnx")
"""Formats that export will know and does not yet."""


def add_to(app: typer.Typer) -> None:
    """Add the verbs of this file."""
    app.command("eval")(evaluate)
    app.command("bench")(bench)
    app.command("inspect")(inspect)
    app.command("generate")(generate)
    app.command("export")(export)


def evaluate(
    model: ModelArgument,
    text: Annotated[str, typer.Option("--text", help="`demo`, or a UTF-8 text file.")] = "demo",
    split: Annotated[
        Literal["train", "test", "other"], typer.Option("--split", help="Split of the demo's text.")
    ] = "test",
    measures: Annotated[
        list[str] | None,
        typer.Option("--measure", help="Measure this; repeat it for more. All that apply if not given."),
    ] = None,
    samples: Annotated[int, typer.Option("--samples", min=1, max=1_000_000, help="Windows of the text.")] = 200,
    length: Annotated[int, typer.Option("--length", min=8, max=131_072, help="Tokens of a window.")] = 256,
    pairs: Annotated[
        Path | None, typer.Option("--pairs", help="CSV of sentence pairs with a score, for encoders.")
    ] = None,
    other: Annotated[str | None, typer.Option("--other", help="Text of another domain: `demo`, or a file.")] = None,
    against: AgainstOption = None,
    dtype: DtypeOption = "float32",
    store: StoreOption = DEFAULT_STORE,
    json_file: JsonOption = None,
) -> None:
    """Measure a model's quality and size, alone or against its original. What was measured before is remembered."""
    from tensorpress.checks import read_config
    from tensorpress.recipe import EvaluationSpec
    from tensorpress.tasks.bench import check_model, check_same_kind
    from tensorpress.tasks.measuring import measure
    from tensorpress.tasks.planning import config_kind

    check_json_target(json_file)
    handle = check_model(model, store)
    original = check_model(against, store) if against else None
    config = read_config(handle.folder)
    demo = text == "demo" and _from_demo(handle, store)
    chosen = _measures(measures, config_kind(config), demo, pairs is not None, original is not None)
    spec = EvaluationSpec(
        source=text, split=split, samples=samples, length=length, other=other, pairs=str(pairs) if pairs else None
    )
    _check_texts(spec, chosen, handle.folder, config)
    if original is not None:
        check_same_kind(config, read_config(original.folder), against or "")
    root = original or handle
    job = {
        "measures": chosen,
        "evaluation": spec.model_dump(mode="json"),
        "root": {"path": root.path, "digest": root.digest},
        "dtype": dtype,
        "store": str(store.absolute()),
        "demo": demo,
        "kernels": "auto",
    }
    name = Path(handle.path).name if model != "demo" else model
    first: dict[str, Any] | None = None
    with progress_bars():
        if original is not None:
            first = measure(job, {"path": original.path, "digest": original.digest}, None, "original")
        result = measure(job, {"path": handle.path, "digest": handle.digest}, first, name)
    metrics, conditions = result["metrics"], result["conditions"]
    if first is None:
        metrics, conditions = _alone(metrics, conditions, config)
    _show_figures({model: metrics, **({f"{against} (original)": first["metrics"]} if first else {})}, conditions)
    if measures and "generation" in measures:
        for sample in result["texts"].values():
            typer.echo(_printable(sample))
    answer = {"model": model, "metrics": metrics, "conditions": conditions, "texts": result["texts"]}
    write_json(json_file, {**answer, **({"against": against, "original": first["metrics"]} if first else {})})


def bench(
    model: ModelArgument,
    against: AgainstOption = None,
    prompt: Annotated[int, typer.Option("--prompt", min=1, max=131_072, help="Tokens of the prompt.")] = 128,
    tokens: Annotated[int, typer.Option("--tokens", min=1, max=131_072, help="Tokens that are decoded.")] = 32,
    repeats: Annotated[int, typer.Option("--repeats", min=1, max=1000, help="Runs that the median is taken of.")] = 5,
    kernels: KernelsOption = "auto",
    threads: Annotated[
        int | None,
        typer.Option("--threads", min=1, max=1024, help="Threads of the CPU; torch's own choice if not given."),
    ] = None,
    batch: Annotated[
        str,
        typer.Option(
            "--batch",
            help="Texts at once that every backend is measured with, as 1,4,16; 0: only the figures at batch 1.",
        ),
    ] = "1,4,16",
    dtype: DtypeOption = "float32",
    store: StoreOption = DEFAULT_STORE,
    json_file: JsonOption = None,
) -> None:
    """Measure the speed of prefill and decode, in turns with the dense original if one is given, by every backend that can run the model."""
    from tensorpress.tasks.bench import bench_model

    check_json_target(json_file)
    batches = _batches(batch)
    with _threads(threads), progress_bars():
        answer = bench_model(model, against, prompt, tokens, repeats, kernels, dtype, store, batches)
    metrics, conditions = answer["metrics"], answer["conditions"]
    _show_figures({model: metrics}, conditions)
    _show_backends(answer.get("backends") or [])
    if against is None:
        console.print("[dim]no dense control: give the original with --against for speedups[/]")
    write_json(json_file, answer)


def inspect(
    model: ModelArgument,
    layers: Annotated[bool, typer.Option("--layers", help="List every layer.")] = False,
    store: StoreOption = DEFAULT_STORE,
    json_file: JsonOption = None,
) -> int | None:
    """Show what a model is made of: blocks and layers, its size, the steps that made it, and whether its files are whole."""
    from tensorpress.cli.structure import describe, show
    from tensorpress.tasks.bench import find_model

    check_json_target(json_file)
    found = describe(find_model(model, store))
    show(found, layers)
    write_json(json_file, {"model": model, **found})
    return FAILED if found["problem"] else None


def generate(
    model: ModelArgument,
    text: Annotated[str, typer.Argument(metavar="TEXT", help="What the model goes on from.")],
    tokens: Annotated[int, typer.Option("--tokens", min=1, max=131_072, help="Most tokens to add.")] = 64,
    temperature: Annotated[
        float, typer.Option("--temperature", min=0.0, max=1000.0, help="0: always the likeliest token.")
    ] = 0.0,
    seed: Annotated[
        int, typer.Option("--seed", min=0, max=2**31 - 1, help="Draws the same tokens again (at a temperature).")
    ] = 0,
    kernels: KernelsOption = "auto",
    store: StoreOption = DEFAULT_STORE,
) -> None:
    """Let a model go on from a text; printed as it comes."""
    import torch

    from tensorpress.checks import read_config
    from tensorpress.evaluators.perplexity import position_limit
    from tensorpress.evaluators.reading import COMPILED, reader_for
    from tensorpress.loading import load
    from tensorpress.source import read_tokenizer
    from tensorpress.tasks.bench import check_model, check_runs
    from tensorpress.tasks.planning import check_kernels, config_kind

    check_kernels(kernels)
    handle = check_model(model, store)
    if config_kind(read_config(handle.folder)) != "causal":
        raise InputError(f"{model}: is an encoder, which cannot generate text; generate needs a causal language model")
    tokenizer = read_tokenizer(handle.folder)
    encoded = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"]
    if encoded.shape[1] == 0:
        raise InputError("TEXT: is empty; give the model something to go on from")
    opened = load(handle.path, kernels=kernels)
    check_runs(opened, kernels)
    limit = position_limit(opened)
    if encoded.shape[1] + tokens > limit:
        raise InputError(f"--tokens {tokens}: the text has {encoded.shape[1]} tokens, and {model} takes {limit} in all")
    ids = encoded.long()
    reader = reader_for(opened, kernels, ids.shape[1] + tokens) if _is_plain(opened) else None
    if reader is not None and reader.runner == COMPILED:
        _write(opened, reader, ids, tokens, temperature, seed, _streamer(tokenizer))
        return
    torch.manual_seed(seed)
    drawn = (
        {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        if temperature
        else {"do_sample": False}
    )
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    generator: Any = opened
    with torch.no_grad():
        generator.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            pad_token_id=0 if padding is None else padding,
            streamer=_streamer(tokenizer),
            **drawn,
        )


def _is_plain(model: Any) -> bool:
    """Whether a model's own settings of generation ask for nothing but drawing and its end: no penalties, no words left out."""
    return set(model.generation_config.to_diff_dict()) <= PLAIN


def _write(model: Any, reader: Any, ids: Any, tokens: int, temperature: float, seed: int, streamer: Any) -> None:
    """Let a reader go on from `ids` [1, length], token by token, until the text ends or has so many more."""
    import torch

    drawn = torch.Generator().manual_seed(seed)
    value = model.generation_config.eos_token_id
    end = {value} if isinstance(value, int) else set(value or ())
    streamer.put(ids[0])
    logits = reader.read(ids)
    for left in range(tokens - 1, -1, -1):
        token = _next(logits[0], temperature, drawn)
        streamer.put(torch.tensor([token]))
        if token in end or not left:
            break
        logits = reader.read(torch.tensor([[token]]))
    streamer.end()


def _next(logits: Any, temperature: float, drawn: Any) -> int:
    """The likeliest token, or at a temperature one that is drawn."""
    import torch

    if not temperature:
        return int(logits.argmax())
    return int(torch.multinomial((logits.double() / temperature).softmax(0), 1, generator=drawn))


def export(
    model: ModelArgument,
    target: Annotated[Path, typer.Argument(metavar="TARGET", help="The folder to write; it must not be there yet.")],
    layout: Annotated[
        str, typer.Option("--format", help="gptq: the standard checkpoint, as gptqmodel reads it.")
    ] = "gptq",
    store: StoreOption = DEFAULT_STORE,
) -> None:
    """Write a model in a format that other programs read."""
    from tensorpress.tasks.bench import check_model
    from tensorpress.tasks.export import FORMATS
    from tensorpress.tasks.export import export as write

    if layout not in FORMATS:
        there = ", ".join(FORMATS)
        if layout in PLANNED:
            raise InputError(f"--format {layout}: is not built yet; there is: {there}")
        raise InputError(f"--format {layout}: is not known{nearest(layout, (*FORMATS, *PLANNED))}; there is: {there}")
    if target.exists():
        raise InputError(f"{target}: exists already; export writes a new folder")
    console.print(str(write(Path(check_model(model, store).path), target, layout)), markup=False, soft_wrap=True)


def _measures(asked: list[str] | None, kind: Any, demo: bool, pairs: bool, against: bool) -> list[str]:
    """The measures to apply: those asked for, else all that apply. Raises InputError for one that cannot be applied."""
    from tensorpress.evaluators.catalog import MEASURES, applicable

    if asked:
        for name in asked:
            if name not in MEASURES:
                raise InputError(
                    f"--measure {name}: is not known{nearest(name, MEASURES)}; known: {', '.join(MEASURES)}"
                )
            if not applicable(name, kind):
                usable = ", ".join(n for n in MEASURES if applicable(n, kind))
                raise InputError(f"--measure {name}: cannot measure a model of kind {kind}; usable: {usable}")
        chosen = list(dict.fromkeys(asked))
    else:
        fitting = {"perplexity": True, "fidelity": against, "size": True, "generation": demo, "sts": pairs}
        chosen = [name for name, wanted in fitting.items() if wanted and applicable(name, kind)]
    if "fidelity" in chosen and not against:
        raise InputError("--measure fidelity: needs the original, with --against")
    if "sts" in chosen and not pairs:
        raise InputError("--measure sts: needs a CSV of sentence pairs, with --pairs")
    if pairs and "sts" not in chosen:
        raise InputError(
            f"--pairs: is for sts, which {'was not asked for' if asked else f'cannot measure a model of kind {kind}'}"
        )
    return chosen


def _check_texts(spec: Any, measures: list[str], folder: Path, config: PretrainedConfig) -> None:
    """Refuse texts that cannot be read or are too short, before the store is touched."""
    from tensorpress.evaluators.sts import read_pairs
    from tensorpress.source import read_tokenizer
    from tensorpress.text import has_tokens, read_text

    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    if limit and spec.length > limit and {"perplexity", "fidelity"} & set(measures):
        raise InputError(f"--length {spec.length}: the model takes {limit} tokens at most")
    tokenizer = read_tokenizer(folder)
    texts = [("--text", spec.source, spec.split)] + ([("--other", spec.other, "other")] if spec.other else [])
    for where, source, split in texts:
        text = read_text(source, split, where)
        if not has_tokens(text, tokenizer, spec.length):
            raise InputError(f"{where}: the text has fewer than one window of {spec.length} tokens")
    if spec.pairs:
        try:
            read_pairs(Path(spec.pairs).expanduser())
        except InputError as error:
            raise InputError(*(p.replace("data.evaluation.pairs", "--pairs") for p in error.problems)) from None


def _from_demo(handle: ModelHandle, store: Path) -> bool:
    """Whether a model is the demo model or was made of it."""
    from tensorpress.artifact import RECORD, Artifact, Store
    from tensorpress.tasks.planning import known_source
    from tensorpress.text import demo_folder

    if not (demo_folder() / "config.json").is_file():
        return False
    root = Artifact(handle.folder).record.get("root") if (handle.folder / RECORD).is_file() else handle.digest
    return bool(root == known_source(demo_folder(), Store(store)).digest)


def _alone(
    metrics: dict[str, float], conditions: dict[str, Any], config: PretrainedConfig
) -> tuple[dict[str, float], dict[str, Any]]:
    """What holds of a model without its original; sizes are set beside the dense model that its config describes."""
    from tensorpress.cli.structure import dense_parameters
    from tensorpress.tasks.bench import compares

    metrics = {key: value for key, value in metrics.items() if not compares(key)}
    conditions = {key: value for key, value in conditions.items() if not compares(key)}
    if "weight_bytes" in metrics:
        parameters = dense_parameters(config)
        metrics["bits_per_parameter"] = 8 * metrics["weight_bytes"] / parameters
        metrics["size_ratio"] = metrics["weight_bytes"] / (2 * parameters)
        conditions["original_parameters"] = parameters
    return metrics, conditions


def _show_figures(models: dict[str, dict[str, float]], conditions: dict[str, Any]) -> None:
    """Metrics down, models across, and what they hold under."""
    from rich.markup import escape
    from rich.table import Table

    from tensorpress.pictures.tables import clean, present, write

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("")
    for name in models:
        table.add_column(escape(clean(name)), justify="right", overflow="fold")
    for shown in present(models.values()):
        table.add_row(
            escape(shown.label), *(escape(write(shown.key, metrics.get(shown.key))) for metrics in models.values())
        )
    console.print(table)
    lines = [
        f"{key.replace('_', ' ')} {_condition(value)}" for key, value in conditions.items() if key != "bytes_count"
    ]
    console.print(f"[dim]{escape(clean('; '.join(lines)))}[/]", soft_wrap=True)


def _batches(text: str) -> list[int]:
    """The sizes of batch that `--batch` names; empty for 0. Raises InputError."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and int(part) <= MOST_TEXTS for part in parts):
        raise InputError(f"--batch {text[:80]}: found no list of whole numbers from 1 to {MOST_TEXTS}, as 1,4,16")
    return sorted({int(part) for part in parts} - {0})


def _show_backends(rows: list[dict[str, Any]]) -> None:
    """A line for each backend and size of batch."""
    from rich.table import Table

    from tensorpress.pictures.tables import human_bytes

    if not rows:
        return
    columns = (
        "batch",
        "backend",
        "by",
        "prompt tok/s",
        "p50 ms",
        "p90 ms",
        "decode tok/s",
        "p50 ms",
        "p90 ms",
        "weights GB/s",
        "of reading",
        "memory",
    )
    table = Table(*columns[:3], box=None, padding=(0, 2, 0, 0), header_style="dim")
    for column in columns[3:]:
        table.add_column(column, justify="right")
    for row in sorted(rows, key=lambda row: row["batch"]):
        share = row["share_of_read_bandwidth"]
        table.add_row(
            str(row["batch"]),
            f"{'original, ' if row['of'] == 'original' else ''}{row['backend']}",
            row["runner"],
            *(
                f"{row[f'{phase}_{key}']:.1f}"
                for phase in ("prefill", "decode")
                for key in ("tokens_per_second", "ms_p50", "ms_p90")
            ),
            f"{row['weight_gigabytes_per_second']:.2f}",
            "–" if share is None else f"{share:.0%}",
            human_bytes(row["peak_memory_bytes"]),
        )
    console.print()
    console.print(table)


def _condition(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} ({count} layers)" for key, count in value.items()) or "none"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _printable(text: str) -> str:
    """Text without what could steer a terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)


def _streamer(tokenizer: Any) -> Any:
    from transformers import TextStreamer

    class Printer(TextStreamer):
        """Prints what a model writes, without what could steer a terminal."""

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            typer.echo(_printable(text), nl=stream_end)

    return Printer(tokenizer, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
