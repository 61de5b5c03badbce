"""Decomposition of the token embedding and of the head: what is minimised, which plan is taken, and what stands in their places.

Sources: Khrulkov et al. 2019, arXiv 1901.10787 (tensorized embeddings); ALBERT, Lan et al. 2020, arXiv 1909.11942 (embeddings of low rank);
Good 1953 (the mass of what a sample does not show).
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tensorpress.compressors.base import Calibration, LayerReport
from tensorpress.compressors.decompose.mpo_rows import dense_row, spectra_of
from tensorpress.compressors.decompose.site_plans import WORD, Fitted, SitePlan, best_fit
from tensorpress.compressors.decompose.tensor_train import factors
from tensorpress.compressors.decompose.weighted_low_rank import damped, weighted_error
from tensorpress.compressors.moments import BATCH_TOKENS, SecondMoment, drawn_loss
from tensorpress.errors import InputError, StepError
from tensorpress.kernels.factorized_embedding import FactorizedEmbedding, TiedHead, tie_heads
from tensorpress.kernels.low_rank_linear import LowRankLinear
from tensorpress.kernels.mpo_linear import MPOLinear
from tensorpress.structure import Structure, model_kind, set_module

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from tensorpress.compressors.decompose.mpo import MPO

PROBED = 16
"""Tokens whose rows are compared with what the embedding gives for them."""
UNEVEN = 2
"""The largest row factor of a padded table over its smallest, at most."""
LARGEST = 1 << 26
"""Numbers of a table up to which `auto` tries a balanced split: minutes, for the singular values of a matrix that is nearly square."""


@dataclass(frozen=True)
class Ends:
    """The embedding [V, d] of a model, and the head that gives its logits, None for encoders."""

    path: str
    embedding: nn.Embedding
    scale: float
    """What the embedding multiplies its rows with."""
    head_path: str | None = None
    head: nn.Linear | None = None

    @property
    def tied(self) -> bool:
        return self.head is not None and self.head.weight is self.embedding.weight


@dataclass
class Use:
    """What a change D of a table [V, d] costs in one of its uses: 0.5 sum_v rows_v D_v^T columns D_v."""

    rows: torch.Tensor
    columns: torch.Tensor


def find_ends(model: PreTrainedModel) -> Ends:
    """The embedding and the head. Raises InputError for those that do more than look up and scale, or multiply."""
    modules = {module: path for path, module in model.named_modules()}
    embedding = model.get_input_embeddings()
    path = modules[embedding]
    if not isinstance(embedding, nn.Embedding):
        raise InputError(f"embeddings: {path} is a {type(embedding).__name__}, no table of rows")
    head = model.get_output_embeddings() if model_kind(model) == "causal" else None
    if head is not None and not isinstance(head, nn.Linear):
        raise InputError(f"embeddings: the head is a {type(head).__name__}, no linear layer")
    ends = Ends(path, embedding, _scale_of(path, embedding), None if head is None else modules[head], head)
    others = [name for name, weight in model.named_parameters(remove_duplicate=False) if weight is embedding.weight]
    others = [name for name in others if name not in (f"{path}.weight", f"{ends.head_path}.weight")]
    if others:
        raise InputError(f"embeddings: {others[0]} is {path}.weight, too; only a head can share it")
    return ends


def _scale_of(path: str, embedding: nn.Embedding) -> float:
    """What the rows are multiplied with. Raises InputError for an embedding that does anything else with them."""
    if embedding.weight.is_meta:
        return 1.0
    scale = float(getattr(embedding, "embed_scale", 1.0))
    ids = torch.arange(min(PROBED, len(embedding.weight)), device=embedding.weight.device)
    with torch.no_grad():
        rows = embedding.weight[ids].clone()
        if embedding.max_norm is None and torch.allclose(embedding(ids), scale * rows, rtol=1e-2, atol=0):
            return scale
    raise InputError(f"embeddings: {path}, a {type(embedding).__name__}, does more than look up rows and scale them")


def site_plans(config: MPO, vocabulary: int, width: int, *, padded: bool) -> list[SitePlan]:
    """The plans that are tried for a table [V, d], the low rank first.

    `padded`: the row factors of the balanced one may make a few rows more than V, those of an untied head may not.
    """
    which = config.plans or "auto"
    found = [SitePlan("low_rank", (vocabulary, 1), (1, width))] if which != "balanced" else []
    if which == "balanced" or (which == "auto" and vocabulary * width <= LARGEST):
        for count in [config.sites] if which == "balanced" else range(2, config.sites + 1):
            rows = even_factors(vocabulary, count) if padded else factors(vocabulary, count)
            if rows is not None and max(rows) ** 2 <= vocabulary * width:  # its metric is no larger than the table
                found.append(SitePlan("balanced", rows, factors(width, count)))
    return found


def even_factors(size: int, sites: int) -> tuple[int, ...] | None:
    """The factors of the smallest number from `size` on, below twice that, that are above 1 and as even as `UNEVEN` asks; None if there is none."""
    for padded in range(size, 2 * size):
        found = factors(padded, sites)
        if min(found) > 1 and max(found) <= UNEVEN * min(found):
            return found
    return None


def _pivoted(config: MPO, padded: bool) -> bool:
    """Whether a table is stored in the fewest numbers: a head by itself is, as other layers are; an embedding is looked up, and is not."""
    return config.pivots and config.metric != "weights" and not padded


def check_embeddings(config: MPO, model: PreTrainedModel) -> None:
    """Refuse a model whose embedding or head cannot be decomposed to the share asked for. Raises InputError."""
    ends = find_ends(model)
    vocabulary, width = ends.embedding.weight.shape
    least = 0.0
    for path, padded in [(ends.path, True)] + ([] if ends.head is None or ends.tied else [(ends.head_path, False)]):
        tried = site_plans(config, vocabulary, width, padded=padded)
        if not tried:
            raise InputError(
                f"sites: {config.sites} sites; {path} of {vocabulary} x {width} has no even split of its rows into as many; "
                "take plans: low_rank"
            )
        cheapest = min(plan.bytes(1, _pivoted(config, padded)) for plan in tried)
        least = max(least, cheapest / (WORD * vocabulary * width))
    assert config.embeddings is not None
    if config.embeddings < least:
        raise InputError(
            f"embeddings: {config.embeddings:,} cannot be met; the smallest is {math.ceil(1e4 * least) / 1e4:g}"
        )


def decompose_embeddings(
    config: MPO, model: PreTrainedModel, structure: Structure, calibration: Calibration
) -> list[LayerReport]:
    """Decompose the embedding, and the head with it if they are tied, else by itself; to `config.embeddings` of the numbers of each.

    A row for each table. With `metric: weights` the Frobenius error is minimised, and no data is asked for. Else a change D of a table
    [V, d] costs the model, to second order and in nats a token, for each use of it 0.5 sum_v r_v D_v^T C D_v:

    - As embedding, token v is met with frequency r_v = f_v, and its vector then changes by D_v, which the loss answers with 0.5 D_v^T G D_v for
      the second moment C = G of the loss's gradient at the embedding's output (`metric: inputs`: C the unit matrix).
    - As head, the logit of token v changes by D_v^T h for the last hidden state h, and cross-entropy has the second derivative p_v (1 - p_v) by it
      (what couples two logits is left out): r_v = q_v, the mean of p_v (1 - p_v), and C = H, the second moment of h.

    Both take the token apart from its surroundings, as K-FAC does. A tied table pays for both uses: 0.5 sum_v D_v^T (f_v G + q_v H) D_v, which
    has no solution in closed form. But a model that predicts well gives a token in the mean the probability that it occurs with, and p (1 - p)
    is near p for all but the few tokens that are certain. So with q = s q', s = sum q, both f and q' are near w = (f + q') / 2, and
    the sum is near 0.5 sum_v w_v D_v^T (G + s H) D_v: one diagonal metric of the rows, one metric of the columns, both losses in nats. With
    `metric: inputs`, which knows no nats, each of the two counts relative to what the whole table gives.
    """
    start = time.monotonic()
    ends = find_ends(model)
    uses = {} if config.metric == "weights" else observed(config, model, structure, ends, calibration)
    table = ends.embedding.weight.detach()
    of_table = [uses[name] for name in (("embedding", "head") if ends.tied else ("embedding",)) if name in uses]
    found, row = _fitted(config, ends.path, table, None, of_table, padded=True)
    made = FactorizedEmbedding.from_cores(
        _stored(found), len(table), scale=ends.scale, padding_idx=ends.embedding.padding_idx
    )
    rows = [row]
    if ends.head is not None and ends.head_path is not None:
        if ends.tied:
            head: nn.Module = TiedHead.from_embedding(made, ends.path, ends.head.bias)
        else:
            weight = ends.head.weight.detach()
            of_head = [uses["head"]] if uses else []
            best, row = _fitted(config, ends.head_path, weight, ends.head.bias, of_head, padded=False)
            rows.append(row)
            head = best.layer
        set_module(model, ends.head_path, head)
    set_module(model, ends.path, made)
    tie_heads(model)
    for row in rows:
        row.seconds = round((time.monotonic() - start) / len(rows), 3)
    return rows


def observed(
    config: MPO, model: PreTrainedModel, structure: Structure, ends: Ends, calibration: Calibration
) -> dict[str, Use]:
    """What the uses of the tables, `embedding` and `head`, cost on the calibration windows.

    Rows of the embedding: frequencies; the tokens that the windows do not show have as much together as those seen once (Good 1953), and not
    less than `damping`. The head's probabilities are those of the model's own output: where it scales or caps the logits, the slope counts.
    Raises StepError where outputs or gradients are not finite.
    """
    windows, table = calibration.windows.to(model.device), ends.embedding.weight
    counts = windows.flatten().bincount(minlength=len(table)).double()
    unseen = max(float((counts == 1).sum() / counts.sum()), config.damping)
    frequencies = (1 - unseen) * counts / counts.sum()
    frequencies[counts == 0] = unseen / max(int((counts == 0).sum()), 1)
    width, nats = table.shape[1], config.metric == "loss"
    gradients = SecondMoment(width, model.device, ends.scale**2)
    states, variances = SecondMoment(width, model.device), torch.zeros_like(frequencies)
    generator = torch.Generator(model.device).manual_seed(calibration.seed)
    batches = windows.split(max(1, BATCH_TOKENS // windows.shape[1])) if nats or ends.head is not None else ()
    with _taken(model, ends, nats) as taken:
        for done, batch in enumerate(batches):
            calibration.progress("embeddings", done, len(batches))
            loss, shares, drawn = drawn_loss(model, structure, batch, generator)
            of_logits = None
            if nats:
                wanted = [taken[name] for name in ("vectors", "logits") if name in taken]
                of_vectors, *others = torch.autograd.grad(loss, wanted)
                gradients.add(of_vectors.flatten(0, -2))
                of_logits = others[0].flatten(0, -2).float() if others else None
            if ends.head is not None:
                states.add(taken["states"].flatten(0, -2))
                variances += _variances(shares, drawn, of_logits).double()
    uses = {"embedding": Use(frequencies, gradients.matrix if nats else torch.eye(width, device=model.device))}
    if ends.head is not None:
        uses["head"] = Use(variances / windows.numel(), states.matrix)
    if not all(bool(torch.isfinite(part).all()) for use in uses.values() for part in (use.rows, use.columns)):
        raise StepError("the gradients of the model's loss are not finite; try metric: inputs")
    return uses


@contextmanager
def _taken(model: PreTrainedModel, ends: Ends, with_gradients: bool) -> Iterator[dict[str, torch.Tensor]]:
    """What every forward pass gives: the embedding's `vectors`, cut off from the table so that gradients end there, and the head's `states` and `logits`.

    No parameter gets a gradient.
    """
    found: dict[str, torch.Tensor] = {}
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]

    def embed(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        found["vectors"] = output.detach().requires_grad_(with_gradients)
        return found["vectors"]

    def predict(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        found["states"], found["logits"] = args[0].detach(), output

    handles = [ends.embedding.register_forward_hook(embed)]
    if ends.head is not None:
        handles.append(ends.head.register_forward_hook(predict))
    for parameter, _ in flags:
        parameter.requires_grad_(False)
    try:
        with torch.set_grad_enabled(with_gradients):
            yield found
    finally:
        for handle in handles:
            handle.remove()
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def _variances(shares: torch.Tensor, drawn: torch.Tensor, gradient: torch.Tensor | None) -> torch.Tensor:
    """Sum over the tokens of p (1 - p): [V]; times the squared slope of the model's output by the head's, where its gradient [tokens, V] is known.

    Without a slope the gradient is p less one for the token that was drawn.
    """
    variances = shares * (1 - shares)
    if gradient is not None:
        plain = shares.clone()
        plain[torch.arange(len(drawn), device=drawn.device), drawn] -= 1
        variances *= (gradient / plain).square_().nan_to_num_(0)
    return variances.sum(0)


def metrics(uses: Sequence[Use], table: torch.Tensor, relative: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """One metric of the rows [V], of sum 1, and one of the columns [d, d] for all uses of a table together, as `decompose_embeddings` says.

    `relative`: several uses count as parts of what the whole table gives in each.
    """
    rows, columns = [], []
    for use in uses:
        total = use.rows.sum()
        rows.append(use.rows / total)
        columns.append(total.to(use.columns) * use.columns)
        if relative and len(uses) > 1:
            columns[-1] /= max(weighted_error(table, columns[-1], rows[-1]), 1e-300)
    return torch.stack(rows).mean(0), torch.stack(columns).sum(0)


def _fitted(
    config: MPO, path: str, weight: torch.Tensor, bias: torch.Tensor | None, uses: Sequence[Use], *, padded: bool
) -> tuple[Fitted, LayerReport]:
    """The plan with the smallest loss within the share that is kept of a table [V, d], and its row of the report."""
    outputs = inputs = None
    if uses:
        outputs, inputs = metrics(uses, weight, config.metric == "inputs")
        inputs = damped(inputs, config.damping)
    vocabulary, width = weight.shape
    assert config.embeddings is not None
    best: Fitted | None = None
    losses: dict[str, float] = {}
    for plan in site_plans(config, vocabulary, width, padded=padded):
        more = math.prod(plan.rows) - vocabulary
        found, told = best_fit(
            [plan],
            config.embeddings * WORD * weight.numel(),
            nn.functional.pad(weight, (0, 0, 0, more)) if more else weight,
            bias,
            inputs,
            nn.functional.pad(outputs, (0, more)) if more and outputs is not None else outputs,
            pivoted=_pivoted(config, padded),
            sweeps=config.sweeps,
            damping=config.damping,
            multiple=1 if config.metric == "weights" else config.multiple,
        )
        losses |= told
        if found is not None and (best is None or found.loss < best.loss):
            best = found
    assert best is not None, "check_embeddings has let it pass"
    stored = best.layer.dense_weight().detach()[:vocabulary]  # type: ignore[operator]
    lost = weighted_error(stored - weight, inputs, outputs) / max(weighted_error(weight, inputs, outputs), 1e-300)
    row = dense_row(path, vocabulary, width)
    row.action, row.bytes_after, row.error_after = f"mpo {best.plan.name}", best.bytes, math.sqrt(lost)
    row.parameters_after = sum(p.numel() for name, p in best.layer.named_parameters() if name != "bias")
    row.detail |= {
        "plan": best.plan.name,
        "out_factors": best.plan.rows,
        "in_factors": best.plan.columns,
        "bonds": [core.shape[3] for core in best.cores[:-1]],
        "losses": losses,
        **spectra_of(weight, best.plan),
    }
    return best, row


def _stored(found: Fitted) -> list[torch.Tensor]:
    """The cores in the precision of the model."""
    layer = found.layer
    if isinstance(layer, LowRankLinear):
        outer, inner = layer.outer.weight, layer.inner.weight
        return [outer.reshape(1, len(outer), 1, -1), inner.reshape(len(inner), 1, -1, 1)]
    assert isinstance(layer, MPOLinear)
    return list(layer.cores)
