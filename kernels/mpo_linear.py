"""Linear layer whose weight is a matrix product operator (MPO), with its plain PyTorch reference.

W [m, n] with m = prod(i_k) outputs and n = prod(j_k) inputs is the contraction of cores T_k [d_{k-1}, i_k, j_k, d_k]
along their bonds d_0 = d_n = 1 (Oseledets 2011; Gao et al. 2020, "Compressing deep neural networks by MPO").
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from tensorpress.kernels import cpu_linear, mpo_contraction, packed_dense, registry
from tensorpress.kernels.kernel_layer import Kept, KernelLayer
from tensorpress.kernels.measured import BATCHES, batch_of
from tensorpress.kernels.mpo_contraction import TORCH, Contraction, Kind, Plan, Shape, merge
from tensorpress.kernels.origin import Origin
from tensorpress.kernels.packed_dense import PackedDense


def mpo_to_matrix(cores: Sequence[torch.Tensor]) -> torch.Tensor:
    """Contract cores [d_{k-1}, i_k, j_k, d_k] to the matrix [prod i_k, prod j_k]."""
    _, rows, columns, _ = (merged := merge(cores)).shape
    return merged.reshape(rows, columns)


def mpo_apply(cores: Sequence[torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """Y = W x by contracting the cores with the input one after the other; x [..., n], result [..., m].

    The tensor in hand is [batch, outputs so far, bond, inputs to come]; each site is one matrix product.
    """
    shape = x.shape[:-1]
    state = x.reshape(-1, 1, 1, x.shape[-1])
    batch, outputs = state.shape[0], 1
    for core in cores:
        left, i, j, right = core.shape
        rest = state.shape[-1] // j
        state = state.reshape(batch * outputs, left * j, rest).transpose(1, 2)  # [batch*outputs, rest, left*j]
        state = state @ core.permute(0, 2, 1, 3).reshape(left * j, i * right)
        state = state.reshape(batch, outputs, rest, i, right).permute(0, 1, 3, 4, 2)
        outputs *= i
        state = state.reshape(batch, outputs, right, rest)
    return state.reshape(*shape, outputs)


def apply_cost(cores: Sequence[torch.Tensor] | Sequence[torch.Size], tokens: int) -> int:
    """Multiply-adds of `mpo_apply` on `tokens` inputs."""
    shapes = [tuple(core.shape) if isinstance(core, torch.Tensor) else tuple(core) for core in cores]
    rest, outputs, cost = math.prod([s[2] for s in shapes]), 1, 0
    for left, i, j, right in shapes:
        rest //= j
        cost += tokens * outputs * rest * left * j * i * right
        outputs *= i
    return cost


def matrix_cost(cores: Sequence[torch.Tensor] | Sequence[torch.Size], tokens: int) -> int:
    """Multiply-adds of contracting the cores to a matrix and multiplying `tokens` inputs with it."""
    shapes = [tuple(core.shape) if isinstance(core, torch.Tensor) else tuple(core) for core in cores]
    done, cost = shapes[0][1] * shapes[0][2], 0
    for left, i, j, right in shapes[1:]:
        cost += done * left * i * j * right
        done *= i * j
    return cost + tokens * done


class MPOLinear(KernelLayer):
    """y = x W^T + b with W an MPO; inputs [..., prod(in_factors)], outputs [..., prod(out_factors)]."""

    operation = "mpo_linear"
    fields = ("out_factors", "in_factors", "bonds", "bias")
    lists = ("out_factors", "in_factors", "bonds")

    def __init__(self, out_factors: Sequence[int], in_factors: Sequence[int], bonds: Sequence[int], *, bias: bool):
        super().__init__()
        if not len(out_factors) == len(in_factors) == len(bonds) + 1:
            raise ValueError("an MPO of n sites has n output factors, n input factors and n - 1 bonds")
        self.out_factors, self.in_factors, self.bonds = tuple(out_factors), tuple(in_factors), tuple(bonds)
        self.in_features, self.out_features = math.prod(in_factors), math.prod(out_factors)
        edges = (1, *bonds, 1)
        self.cores = nn.ParameterList(
            torch.zeros(edges[k], i, j, edges[k + 1])
            for k, (i, j) in enumerate(zip(out_factors, in_factors, strict=True))
        )
        self.bias = nn.Parameter(torch.zeros(self.out_features)) if bias else None
        self.kernel = "reference"
        """What computes it; `auto` in a model that was opened from a folder."""
        self.kept_of: dict[str, tuple[Origin, Contraction | torch.Tensor | PackedDense]] = {}
        """What kernels keep, by name, and the cores that it was made of: matrices, and contractions by size of batch."""

    @classmethod
    def from_cores(cls, cores: Sequence[torch.Tensor], bias: torch.Tensor | None) -> MPOLinear:
        """Wrap cores [d_{k-1}, i_k, j_k, d_k]; they are copied."""
        shapes = [core.shape for core in cores]
        layer = cls([s[1] for s in shapes], [s[2] for s in shapes], [s[3] for s in shapes[:-1]], bias=bias is not None)
        layer.cores = nn.ParameterList(core.detach().clone() for core in cores)
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach().clone())
        return layer

    @classmethod
    def from_low_rank(cls, left: torch.Tensor, right: torch.Tensor, bias: torch.Tensor | None) -> MPOLinear:
        """W = left [m, r] @ right [r, n] as two sites, whose chain multiplies with `right`, then with `left`, as they are; they are copied.

        Raises ValueError where the ranks differ.
        """
        (outputs, rank), (other, inputs) = left.shape, right.shape
        if rank != other:
            raise ValueError(f"the left factor has {rank} columns, the right one {other} rows")
        return cls.from_cores([left.reshape(1, outputs, 1, rank), right.reshape(rank, 1, inputs, 1)], bias)

    def dense_weight(self) -> torch.Tensor:
        """The weight [m, n] that the cores stand for."""
        return mpo_to_matrix(list(self.cores))

    def shapes(self) -> tuple[Shape, ...]:
        """The shapes of the cores."""
        edges = (1, *self.bonds, 1)
        return tuple(zip(edges[:-1], self.out_factors, self.in_factors, edges[1:], strict=True))

    def stored(self) -> list[torch.Tensor]:
        return [*self.cores] if self.bias is None else [*self.cores, self.bias]

    def place(self, tensors: Sequence[torch.Tensor]) -> None:
        parameters = [nn.Parameter(tensor, requires_grad=False) for tensor in tensors]
        self.cores = nn.ParameterList(parameters[: len(self.in_factors)])
        self.bias = parameters[-1] if len(parameters) > len(self.in_factors) else None

    def kept(self, names: Collection[str] | None = None) -> Iterator[Kept]:
        for key, (_, made) in list(self.kept_of.items()):
            if names is None or key.partition(" ")[0] in names:
                yield from made.matrices if isinstance(made, Contraction) else [made]

    def read_bytes(self, rows: int) -> int:
        """Bytes of weights that the kernel in use reads for so many rows."""
        name = registry.in_use(self.operation, self, rows)
        made = self.kept_of.get(name, self.kept_of.get(f"{name} {batch_of(rows)}", (None, None)))[1]
        return sum(core.nbytes for core in self.cores) if made is None else made.nbytes

    def __getstate__(self) -> dict[str, Any]:
        """A copy makes its own of what kernels keep."""
        return {**self.__dict__, "kept_of": {}}

    def release_own(self, names: Collection[str]) -> None:
        self.kept_of = {key: value for key, value in self.kept_of.items() if key.partition(" ")[0] in names}

    def kernel_key(self) -> str:
        """What the speed of its kernels depends on."""
        return f"{self.in_factors} to {self.out_factors}, bonds {self.bonds}"

    def spec(self) -> dict[str, object]:
        """What rebuilds this layer's empty form: the entry of the loading plug-in."""
        return {
            "form": "mpo",
            "out_factors": list(self.out_factors),
            "in_factors": list(self.in_factors),
            "bonds": list(self.bonds),
            "bias": self.bias is not None,
        }

    @classmethod
    def from_spec(cls, spec: dict) -> MPOLinear:
        layer = cls(spec["out_factors"], spec["in_factors"], spec["bonds"], bias=spec["bias"])
        layer.kernel = "auto"
        return layer

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bonds={self.bonds}"


def mpo_linear_dense(layer: MPOLinear, x: torch.Tensor) -> torch.Tensor:
    """Contract the cores to the matrix, then multiply: the oracle."""
    return nn.functional.linear(x, layer.dense_weight(), layer.bias)


def mpo_linear_reference(layer: MPOLinear, x: torch.Tensor) -> torch.Tensor:
    """Whichever of the chain, from either side, and the contracted matrix takes fewest multiply-adds for this many tokens."""
    cores = list(layer.cores)
    left, right, matrix = _reference_costs(layer, x.numel() // x.shape[-1])
    if min(left, right) >= matrix:
        return mpo_linear_dense(layer, x)
    y = mpo_apply(cores, x) if left <= right else Contraction(cores, _from_right(layer))(x)
    return y if layer.bias is None else y + layer.bias


def _from_right(layer: MPOLinear) -> Plan:
    return Plan("right", tuple(range(1, len(layer.cores) + 1)))


def _reference_costs(layer: MPOLinear, tokens: int) -> tuple[int, int, int]:
    """Multiply-adds of the chain from the left, from the right, and of the contracted matrix."""
    cores = list(layer.cores)
    right = mpo_contraction.operations(layer.shapes(), _from_right(layer), tokens)
    return apply_cost(cores, tokens), right, matrix_cost(cores, tokens)


def mpo_linear_matrix(layer: MPOLinear, x: torch.Tensor) -> torch.Tensor:
    """The matrix, contracted once and kept in memory."""
    if _learns(layer, x):
        return mpo_linear_reference(layer, x)
    matrix = _kept(layer, "matrix", layer.dense_weight)
    return nn.functional.linear(x, matrix, layer.bias)


def mpo_linear_cpu_matrix(layer: MPOLinear, x: torch.Tensor) -> torch.Tensor:
    """The matrix in the layout of the compiled code, contracted once and kept in memory."""
    if _learns(layer, x):
        return mpo_linear_reference(layer, x)
    kept = _kept(layer, "cpu_matrix", lambda: PackedDense(layer.dense_weight(), None))
    y = cpu_linear.multiply(kept.weights, x, cpu_linear.MODES["cpu"])
    return y if layer.bias is None else y + layer.bias


def mpo_linear_chain(layer: MPOLinear, x: torch.Tensor, name: str = "chain", kind: Kind = TORCH) -> torch.Tensor:
    """The cores one after the other, grouped and ordered as is predicted to be fastest for so many inputs (`mpo_contraction`)."""
    if _learns(layer, x):
        return mpo_linear_reference(layer, x)
    rows = x.numel() // x.shape[-1]

    def made() -> Contraction:
        plan, _ = plan_for(layer, rows, x.dtype, kind)
        known = ((made_of, one) for made_of, one in layer.kept_of.values() if isinstance(one, Contraction))
        alike = ((made_of, one) for made_of, one in known if one.plan == plan and one.kind.form is kind.form)
        same = next((one for made_of, one in alike if made_of.holds(layer.cores)), None)
        return same.by(kind) if same else Contraction(list(layer.cores), plan, kind)

    y: torch.Tensor = _kept(layer, f"{name} {batch_of(rows)}", made)(x)
    return y if layer.bias is None else y + layer.bias


def mpo_linear_triton(layer: MPOLinear, x: torch.Tensor) -> torch.Tensor:
    """The same by Triton, which reads and writes each step's operands where they lie."""
    return mpo_linear_chain(layer, x, "triton", TRITON)


def mpo_linear_cpu_chain(layer: MPOLinear, x: torch.Tensor) -> torch.Tensor:
    """The same by the compiled code."""
    return mpo_linear_chain(layer, x, "cpu_chain", COMPILED)


def _triton_step(matrix: torch.Tensor, state: torch.Tensor, batch: int, columns: int) -> torch.Tensor:
    from tensorpress.kernels import triton_linear

    return triton_linear.chain_step(matrix, state.reshape(batch, matrix.shape[1], columns))


TRITON = Kind("triton", _triton_step, has_rates=False)
COMPILED = Kind("cpu", packed_dense.multiply_columns, lambda matrix: PackedDense(matrix, None))


def plan_for(layer: MPOLinear, rows: int, dtype: torch.dtype, kind: Kind = TORCH) -> tuple[Plan, float]:
    """The chain that is predicted to be fastest for up to so many inputs of a layer, and the seconds that it is predicted to take.

    It keeps at most as much as its matrix or its cores.
    """
    most = next((size for size in BATCHES if rows <= size), 8 * BATCHES[-1])
    machine = mpo_contraction.machine_of(str(layer.cores[0].device), dtype, torch.get_num_threads(), kind)
    shapes = layer.shapes()
    room = max(layer.in_features * layer.out_features, sum(core.numel() for core in layer.cores))
    size = torch.empty((), dtype=dtype).element_size()
    found = mpo_contraction.best_chain(shapes, most, size, machine, room)
    plan = found or Plan("left", tuple(range(1, len(shapes) + 1)))
    return plan, mpo_contraction.predicted(shapes, plan, rows, size, machine)


def _chain_seconds(layer: MPOLinear, x: torch.Tensor, kind: Kind = TORCH) -> float:
    return plan_for(layer, x.numel() // x.shape[-1], x.dtype, kind)[1]


def _reference_seconds(layer: MPOLinear, x: torch.Tensor) -> float:
    """By its multiply-adds alone."""
    tokens, device = x.numel() // x.shape[-1], str(layer.cores[0].device)
    machine = mpo_contraction.machine_of(device, x.dtype, torch.get_num_threads())
    return min(_reference_costs(layer, tokens)) / machine.rate


def _kept(layer: MPOLinear, key: str, make: Callable[[], Any]) -> Any:
    """What was made of the cores as they are, made anew if they changed."""
    made_of, made = layer.kept_of.get(key, (None, None))
    if made_of is None or not made_of.holds(_cores(layer)):
        now = Origin(layer.cores)
        with torch.no_grad():
            made = make()
        others = {name: value for name, value in layer.kept_of.items() if name != key}
        kind, _, batch = key.partition(" ")
        chains = [name for name in others if name.startswith(f"{kind} ")]
        if batch and len(chains) > 1:  # one for reading, one for decoding
            others.pop(chains[0])
        layer.kept_of = {**others, key: (now, made)}
    return made


def _cores(layer: MPOLinear) -> Iterable[torch.Tensor]:
    """The cores, for every product: a list of parameters takes microseconds for each."""
    return layer.cores._parameters.values()  # type: ignore[return-value]


def _learns(layer: MPOLinear, x: torch.Tensor) -> bool:
    """Whether gradients are asked for, which what is kept has not; or another precision, which it would have to be made for."""
    core = next(iter(_cores(layer)))
    if torch.is_grad_enabled() and (x.requires_grad or any(one.requires_grad for one in _cores(layer))):
        return True
    return x.dtype != core.dtype or x.numel() == 0


def _matrix_room(layer: MPOLinear) -> int:
    return layer.in_features * layer.out_features * layer.cores[0].element_size()


def _is_chain(layer: MPOLinear) -> bool:
    return len(layer.cores) > 1


def _can_compiled(layer: MPOLinear) -> bool:
    """Whether the code was built, and the cores are in bf16 on the CPU."""
    core = layer.cores[0]
    return cpu_linear.compiled() is not None and core.device.type == "cpu" and core.dtype == torch.bfloat16


registry.register("mpo_linear", "dense", mpo_linear_dense, automatic=False)
registry.register("mpo_linear", "cpu_matrix", mpo_linear_cpu_matrix, _can_compiled, room=_matrix_room)
registry.register(
    "mpo_linear",
    "cpu_chain",
    mpo_linear_cpu_chain,
    lambda layer: _is_chain(layer) and _can_compiled(layer),
    room=_matrix_room,
    expected=lambda layer, x: _chain_seconds(layer, x, COMPILED),
)
registry.register("mpo_linear", "matrix", mpo_linear_matrix, room=_matrix_room)
registry.register("mpo_linear", "chain", mpo_linear_chain, _is_chain, room=_matrix_room, expected=_chain_seconds)
registry.register(
    "mpo_linear",
    "triton",
    mpo_linear_triton,
    lambda layer: _is_chain(layer) and registry.triton_runs(layer.cores[0]),
    automatic=torch.cuda.is_available(),
    room=_matrix_room,
)
registry.register("mpo_linear", "reference", mpo_linear_reference, expected=_reference_seconds)
