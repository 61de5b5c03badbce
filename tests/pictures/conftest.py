"""Run documents that no run made."""

from __future__ import annotations

from typing import Any

import pytest

HOSTILE = "<script>alert('x')</script> & $x_{1$ | \"q\" [red]\x1b[31m\x00"


def layer(name: str, action: str = "gptq 4", error: float | None = 0.02, kept: float = 0.27) -> dict[str, Any]:
    after = 0 if action == "removed" else int(131072 * kept)
    return {
        "layer": name, "action": action, "parameters_before": 65536, "parameters_after": 0 if after == 0 else 65536,
        "bytes_before": 131072, "bytes_after": after, "error_before": None, "error_after": error, "seconds": 0.4,
        "detail": {},
    }  # fmt: skip


def layers(action: str = "gptq 4", blocks: int = 8, scale: float = 0.02) -> list[dict[str, Any]]:
    kinds = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
    kinds += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    return [
        layer(f"model.layers.{b}.{kind}", action, scale * (1 + b * 0.3) * (1 + i * 0.2))
        for b in range(blocks)
        for i, kind in enumerate(kinds)
    ]


def artifact(step: str, use: str, parent: str = "model", **more: Any) -> dict[str, Any]:
    branch = more.pop("branch", "")
    metrics = more.pop("metrics", {})
    return {
        "node": f"{step}[{branch}]" if branch else step, "step": step, "branch": branch, "use": use, "parent": parent,
        "leaf": True, "path": f"artifacts/{step}", "digest": "0123456789ab", "cached": False, "seconds": 12.3,
        "error": None, "metrics": metrics, "conditions": {}, "report": {"layers": [], "summary": {}}, **more,
    }  # fmt: skip


def measured(size: float, perplexity: float, **more: float) -> dict[str, float]:
    return {
        "perplexity": 3.842 * perplexity, "perplexity_ratio": perplexity, "bits_per_byte": 0.61 * perplexity,
        "kl_divergence": 0.05 * (perplexity - 1) + 0.004, "top1_agreement": 0.985 - (perplexity - 1) * 0.5,
        "bytes": 14.7e6 * size, "size_ratio": size, "bits_per_parameter": 16 * size,
        "prefill_tokens_per_second": 5120.0, "decode_tokens_per_second": 141.7, "decode_speedup": 1.43, **more,
    }  # fmt: skip


@pytest.fixture
def quickstart() -> dict[str, Any]:
    """The demo model, five branches, one of them cached, all measured."""
    removed = [layer(f"block {b} {kind}", "removed" if b in (2, 5) and kind == "feed_forward" else "dense", None, 1.0)
               for b in range(8) for kind in ("attention", "feed_forward")]  # fmt: skip
    mpo = {"layers": layers("mpo", scale=0.09), "summary": {"bond_dimension": 48, "kept": 0.71}}
    gptq = {"layers": layers(), "summary": {"bits": 4, "group_size": 128, "mean_error": 0.0212}}
    return {
        "recipe": {
            "name": "quickstart", "model": {"source": "demo"}, "seed": 0,
            "steps": {
                "four_bit": {"use": "gptq", "after": "model", "bits": 4},
                "prune": {"use": "finercut", "after": "model", "remove": 0.15},
                "heal": {"use": "distill", "after": "prune", "tokens": 300000},
            },
        },
        "name": "quickstart", "flow_run_id": "4f1c", "mlflow_run_id": "9ab0", "verdict": "ACCEPT",
        "gates": {
            "perplexity_ratio": {"min": None, "max": 1.25, "holds": True, "worst": 1.147, "branch": "quantize2"},
            "size_ratio": {"min": None, "max": 0.35, "holds": True, "worst": 0.33, "branch": "four_bit"},
        },
        "original": {
            "perplexity": 3.842, "bits_per_byte": 0.61, "bytes": 14.7e6, "bits_per_parameter": 16.0,
            "prefill_tokens_per_second": 4310.0, "decode_tokens_per_second": 99.1, "decode_speedup": 1.0,
            "perplexity_ratio": 1.0, "size_ratio": 1.0,
        },
        "artifacts": [
            artifact("four_bit", "gptq", metrics=measured(0.33, 1.01), cached=True, report=gptq,
                     branch="four_bit.bits=4"),
            artifact("three_bit", "gptq", metrics=measured(0.28, 1.04), branch="three_bit.bits=3", report=gptq),
            artifact("prune", "finercut", seconds=41.0, report={"layers": removed, "summary": {"removed": 2}}),
            artifact("heal", "distill", "prune", seconds=182.0),
            artifact("quantize", "gptq", "heal", metrics=measured(0.291, 1.062), report=gptq),
            artifact("decompose", "mpo", seconds=17.2, report=mpo),
            artifact("prune2", "finercut", "decompose", seconds=39.5),
            artifact("heal2", "distill", "prune2", seconds=190.0),
            artifact("quantize2", "gptq", "heal2", metrics=measured(0.243, 1.147), report=gptq),
        ],
        "conditions": {
            "dataset": "demo (test split)", "tokens": 51200, "window": 256, "dtype": "float32", "threads": 2,
            "kernel": "cpu int4 (C++)",
        },
        "seconds": 512.4, "overhead_seconds": 6.1,
        "samples": {"model": "def add(a, b):\n    return a + b",
                    "four_bit[four_bit.bits=4]": "def add(a, b):\n    return a"},
        "versions": {"tensorpress": "0.1.0", "torch": "2.11.0"},
    }  # fmt: skip


@pytest.fixture
def failed(quickstart: dict[str, Any]) -> dict[str, Any]:
    """A step fell over, and what follows it never ran."""
    quickstart["verdict"] = "FAILED"
    for a in quickstart["artifacts"]:
        if a["step"] in ("heal2", "quantize2"):
            a.update(
                error="OutOfMemory: <b>no room</b> for the teacher beside the student on this machine",
                metrics={},
                seconds=None,
            )
    return quickstart


@pytest.fixture
def hostile() -> dict[str, Any]:
    """One branch whose every text is an attack or a nuisance."""
    one = artifact(HOSTILE, HOSTILE, branch=f"{HOSTILE}.bits=<i>4</i>", metrics={"perplexity_ratio": float("nan")})
    one["report"] = {"layers": [layer(HOSTILE, HOSTILE)], "summary": {HOSTILE: HOSTILE}}
    two = artifact("b", "gptq", one["node"], error=HOSTILE, seconds=None)
    gates = {HOSTILE: {"min": 1.0, "max": None, "holds": False, "worst": None, "branch": HOSTILE}}
    return {
        "recipe": {"name": HOSTILE, "steps": {HOSTILE: {"use": HOSTILE}}}, "name": HOSTILE, "verdict": HOSTILE,
        "gates": gates, "original": {HOSTILE: 1.0}, "artifacts": [one, two], "conditions": {HOSTILE: HOSTILE},
        "samples": {HOSTILE: HOSTILE, one["node"]: HOSTILE}, "versions": {HOSTILE: HOSTILE}, "seconds": 1.0,
    }  # fmt: skip


@pytest.fixture
def thirty(quickstart: dict[str, Any]) -> dict[str, Any]:
    """Thirty leaves under three branching steps: 40 nodes."""
    made = []
    for k in range(10):
        prune = artifact("prune", "finercut", branch=f"prune.remove={k / 20}")
        made.append(prune)
        for bits in (4, 3, 2):
            branch = f"{prune['branch']}, quantize.bits={bits}"
            metrics = measured(bits / 12 * (1 - k / 40), 1 + (4 - bits) ** 2 * 0.05 + k * k * 0.004)
            made.append(artifact("quantize", "gptq", prune["node"], branch=branch, metrics=metrics))
    return {**quickstart, "artifacts": made}


@pytest.fixture
def single() -> dict[str, Any]:
    """The least a run document can be: one step that nothing measured."""
    return {"artifacts": [{"node": "a", "step": "a", "branch": "", "use": "gptq", "parent": "model"}]}
