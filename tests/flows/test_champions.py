"""Which artifact stands for a run, what makes it the champion of its line, and what keeps it from that."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
from mlflow import MlflowClient

from tensorpress.artifact import Store
from tensorpress.errors import InputError, StepError
from tensorpress.tasks.contest import best_of, candidate, compare, failing, why_none
from tensorpress.tasks.tracking import champions, open_client

HERE = {"device": "EPYC", "threads": 2, "batch": 1, "prompt_tokens": 128, "decode_tokens": 32}
NAN, INF = math.nan, math.inf


def leaf(node, error=None, leaf=True, conditions=HERE, digest="", **metrics):
    return {"node": node, "leaf": leaf, "error": error, "metrics": metrics, "conditions": conditions,
            "digest": digest or node * 4, "path": f"/{node}", "run_id": "1"}  # fmt: skip


def document(*artifacts, gates=None, **more):
    return {"name": "quick", "artifacts": list(artifacts), "original": {}, "mlflow_run_id": "p",
            "gates": {"perplexity_ratio": {"min": None, "max": 1.2}} if gates is None else gates,
            "recipe": {}, "original_digest": "root", **more}  # fmt: skip


def test_the_candidate_is_the_smallest_leaf_that_holds_every_gate():
    small, large = leaf("small", bytes=10, perplexity_ratio=1.2), leaf("large", bytes=20, perplexity_ratio=1.0)
    others = [
        leaf("bad", bytes=1, perplexity_ratio=1.21),
        leaf("failed", error="no memory", bytes=1, perplexity_ratio=1.0),
        leaf("inner", leaf=False, bytes=1, perplexity_ratio=1.0),
        leaf("nan", bytes=1, perplexity_ratio=NAN),
        leaf("unmeasured", bytes=1),
    ]
    assert candidate(document(large, small, *others)) == small
    assert candidate(document(*others)) is None
    reason = why_none(document(*others))
    assert "bad: perplexity_ratio" in reason and "failed: no memory" in reason and "inner" not in reason


def test_every_gate_counts_for_each_leaf_alone():
    gates = {"perplexity_ratio": {"min": None, "max": 1.2}, "decode_speedup": {"min": 1.5, "max": None}}
    quick, good = leaf("q", bytes=1, perplexity_ratio=2, decode_speedup=2), leaf("g", bytes=2, perplexity_ratio=1)
    assert candidate(document(quick, good, gates=gates)) is None
    both = leaf("b", bytes=3, perplexity_ratio=1.2, decode_speedup=1.5)
    assert candidate(document(quick, good, both, gates=gates)) == both
    assert failing(quick, gates) == ["perplexity_ratio"] and failing(good, gates) == ["decode_speedup"]


def test_of_two_with_as_few_bytes_the_better():
    worse, better = leaf("a", bytes=5, perplexity_ratio=1.1), leaf("b", bytes=5, perplexity_ratio=1.05)
    assert candidate(document(worse, better)) == candidate(document(better, worse)) == better
    first, second = leaf("a", bytes=5, perplexity_ratio=1.1), leaf("b", bytes=5, perplexity_ratio=1.1)
    assert candidate(document(second, first)) == first


def test_a_recipe_without_gates_promotes_nothing():
    run = document(leaf("a", bytes=1, perplexity_ratio=1.0), gates={})
    assert candidate(run) is None and why_none(run) == "a recipe without gates promotes nothing"


@pytest.mark.parametrize(
    ("metric", "before", "now", "verdict"),
    [
        ("perplexity", 10.0, 10.1, "same"),  # at the tolerance
        ("perplexity", 10.0, 10.11, "worse"),
        ("perplexity", 10.0, 9.8, "better"),
        ("perplexity_other", 10.0, 11.0, "worse"),
        ("perplexity_ratio_other", 1.0, 0.9, "better"),
        ("bits_per_byte_other", 1.0, 1.1, "worse"),
        ("kl_divergence", 0.0, 0.0, "same"),
        ("kl_divergence", 0.0, 1e-6, "worse"),  # nothing to be relative to
        ("kl_divergence", 1e-6, 0.0, "better"),
        ("bytes", 1000, 980, "better"),
        ("size_ratio", 0.3, 0.31, "worse"),
        ("weight_bytes", 100, 100, "same"),
        ("top1_agreement", 0.9, 0.8, "worse"),
        ("top1_agreement", 0.9, 0.905, "same"),
        ("embedding_cosine", -0.5, -0.4, "better"),
        ("embedding_cosine", -0.5, -0.6, "worse"),
        ("sts_spearman", 0.7, 0.8, "better"),
        ("parsable_functions", 0.5, 0.0, "worse"),
        ("perplexity", 10.0, NAN, "worse"),
        ("perplexity", 10.0, None, "worse"),
        ("perplexity", 10.0, INF, "worse"),
        ("perplexity", INF, INF, "same"),
        ("perplexity", INF, 10.0, "better"),
        ("perplexity", NAN, 10.0, "better"),
        ("perplexity", NAN, NAN, "same"),
        ("perplexity", NAN, None, "worse"),
        ("decode_tokens_per_second", 100.0, 85.0, "same"),  # within the tolerance of speed
        ("decode_tokens_per_second", 100.0, 79.0, "worse"),
        ("decode_tokens_per_second", 100.0, None, "worse"),
        ("prefill_speedup", 1.0, 1.3, "better"),
        ("peak_memory_bytes", 100, 130, "worse"),
    ],
)
def test_a_metric_against_the_champions(metric, before, now, verdict):
    (change,) = compare(leaf("new", **{metric: now}), leaf("old", **{metric: before}))
    assert (change.metric, change.verdict) == (metric, verdict)
    assert "\n" not in change.says and change.verdict in change.says
    assert (now is None) == ("not measured now" in change.says)


def test_metrics_without_a_direction_are_no_matter():
    old = leaf("old", parameters=5, step_seconds=1.0, original_decode_tokens_per_second=9.0, unheard_of=3)
    assert compare(leaf("new"), old) == []
    assert compare(leaf("new", perplexity=3.0), leaf("old")) == []  # what the champion was not measured by


@pytest.mark.parametrize("differing", [{"device": "GPU"}, {"threads": 4}, {"prompt_tokens": 64}])
def test_speed_of_another_machine_is_not_compared(differing):
    there = leaf("new", conditions={**HERE, **differing}, decode_speedup=0.1, perplexity=10.0)
    changes = {c.metric: c.verdict for c in compare(there, leaf("old", decode_speedup=2.0, perplexity=10.0))}
    assert changes == {"decode_speedup": "not comparable", "perplexity": "same"}


def test_small_losses_do_not_add_up():
    line, promoted = {"metrics": {"perplexity": 10.0}, "best": {"perplexity": 10.0}}, 0
    for night in range(1, 50):
        new = leaf("new", perplexity=10.0 * 1.005**night)
        if any(change.verdict == "worse" for change in compare(new, line)):
            continue
        promoted += 1
        line = {"metrics": new["metrics"], "best": best_of(line["best"], new["metrics"])}
    assert promoted == 1 and line["metrics"]["perplexity"] < 10.1


def test_the_best_of_a_line():
    best = best_of({"perplexity": 9.0, "top1_agreement": 0.9}, {"perplexity": NAN, "top1_agreement": 0.95, "bytes": 5})
    assert best == {"perplexity": 9.0, "top1_agreement": 0.95, "bytes": 5}
    assert best_of({}, {"decode_speedup": 2.0, "parameters": 3}) == {}


class Night:
    """A store with a real database, and the runs of one line in it."""

    def __init__(self, root: Path):
        self.store = Store(root).open()
        self.client = open_client(root)
        self.experiment = self.client.create_experiment("tiny", artifact_location=(root / "artifacts").as_uri())

    def run(self, *leaves, **more):
        parent = self.client.create_run(self.experiment)
        for artifact in leaves:
            folder = self.store.folder(artifact["digest"])
            folder.mkdir(exist_ok=True)
            model = self.client.create_logged_model(self.experiment, name="m", tags={"path": str(folder)})
            child = self.client.create_run(self.experiment, tags={"tensorpress.model_id": model.model_id})
            artifact |= {"run_id": child.info.run_id, "path": str(folder)}
        return document(*leaves, mlflow_run_id=parent.info.run_id, **more)

    def decide(self, *leaves, **more):
        return champions.decide(self.client, self.store, self.run(*leaves), **more)

    def versions(self, line):
        return sorted(int(v.version) for v in self.client.search_model_versions(f"name = '{line}'"))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder whose database is made once; each test takes a copy."""
    return open_client(tmp_path_factory.mktemp("made") / "store")


@pytest.fixture
def night(tmp_path, root):
    import shutil

    made = Path(root.tracking_uri.removeprefix("sqlite:///"))
    (tmp_path / "store").mkdir()
    shutil.copyfile(made, tmp_path / "store/mlflow.db")
    return Night(tmp_path / "store")


def good(digest, **metrics):
    return leaf("q", digest=digest, **{"bytes": 100, "perplexity_ratio": 1.1, **metrics})


def test_the_nights_of_a_line(night):
    first = night.decide(good("aa"))
    line = first.line
    assert first.verdict == "first" and first.changes == [] and "became the champion" in first.says[0]
    file = night.store.root / "champions" / f"{line}.json"
    written = json.loads(file.read_text())
    assert written["digest"] == "aa" and written["version"] == "1" and written["metrics"]["bytes"] == 100
    assert set(written) >= {"line", "node", "digest", "path", "metrics", "run_id", "version", "since"}

    again = night.decide(good("aa"))
    assert again.verdict == "unchanged" and night.versions(line) == [1] and json.loads(file.read_text()) == written

    worse = night.decide(good("bb", perplexity_ratio=1.19, bytes=50))
    assert worse.verdict == "worse" and worse.champion["digest"] == "aa"
    assert any("perplexity ratio" in line and "worse" in line for line in worse.says)
    assert json.loads(file.read_text()) == written and night.versions(line) == [1]

    none = night.decide(good("cc", perplexity_ratio=1.3))
    assert none.verdict == "none" and "no branch holds" in none.says[0] and "stays the champion" in none.says[1]

    would = night.decide(good("dd", bytes=50), promote=False)
    assert would.verdict == "promoted" and would.champion["digest"] == "aa" and "would become" in would.says[0]
    assert json.loads(file.read_text()) == written

    promoted = night.decide(good("dd", bytes=50))
    assert promoted.verdict == "promoted" and promoted.champion["digest"] == "dd" and night.versions(line) == [1, 2]
    alias = night.client.get_model_version_by_alias(line, "champion")
    assert alias.tags["digest"] == "dd" and alias.source == night.store.folder("dd").as_uri()
    model_id = night.client.get_run(alias.run_id).data.tags["tensorpress.model_id"]
    linked = json.loads(night.client.get_logged_model(model_id).tags["mlflow.modelVersions"])
    assert linked == [{"name": line, "version": "2"}]

    back = night.decide(good("aa", bytes=40))  # was a version before: it is not registered again
    assert back.verdict == "promoted" and night.versions(line) == [1, 2]
    assert night.client.get_model_version_by_alias(line, "champion").version == 1


def test_a_run_alone_registers_a_version_without_an_alias(night):
    run = night.run(good("aa"))
    assert [champions.register(night.client, night.store, run) for _ in range(2)] == ["1", "1"]
    line = champions.line_of(night.client, run)
    assert night.versions(line) == [1] and night.client.get_registered_model(line).aliases == {}
    assert champions.register(night.client, night.store, night.run(good("bb"), gates={})) is None
    assert not list((night.store.root / "champions").iterdir())
    assert night.decide(good("aa")).champion["version"] == "1"


def test_the_same_bytes_measured_by_other_code_are_the_new_measure(night):
    night.decide(good("aa", perplexity=10.0))
    again = night.decide(good("aa", perplexity=11.0))
    assert again.verdict == "unchanged" and any("worse" in line for line in again.says)
    assert again.champion["metrics"]["perplexity"] == again.champion["best"]["perplexity"] == 11.0
    assert night.decide(good("bb", perplexity=11.0)).verdict == "promoted"


def test_an_artifact_that_is_gone_is_not_promoted(night):
    run = night.run(good("aa"))
    night.store.folder("aa").rmdir()
    with pytest.raises(StepError, match="is gone from the store"):
        champions.decide(night.client, night.store, run)
    assert not list((night.store.root / "champions").iterdir())


def test_a_champions_file_that_cannot_be_read_stops_everything(night):
    line = night.decide(good("aa")).line
    file = night.store.root / "champions" / f"{line}.json"
    for text in ("{", '{"line": "x"}', "3", ""):
        file.write_text(text)
        with pytest.raises(InputError, match="cannot be read as a champion"):
            night.decide(good("bb"))


def test_a_line_is_one_recipe_model_and_evaluation(tmp_path):
    inputs = SimpleNamespace(dataset_inputs=[SimpleNamespace(dataset=SimpleNamespace(digest="t1"))])
    client = SimpleNamespace(get_run=lambda _: SimpleNamespace(inputs=inputs))

    def line(source="demo", length=256, **more):
        recipe = {"model": {"source": source}, "data": {"evaluation": {"length": length, "source": "a.txt"}}}
        return champions.line_of(client, document(recipe=recipe, **more))

    assert line().startswith("quick on demo ") and line() == line()
    assert len({line(), line(length=128), line(original_digest="other"), line(name="slow"), line(source="x")}) == 5
    inputs.dataset_inputs[0].dataset.digest = "t2"
    assert line() != line(length=128)
    wild = line(source="/models/o'brien:7b/\nx y" + "z" * 300)
    assert len(wild) < 150 and not set(wild) & set("/:'\n")


def test_a_decision_as_a_page_and_in_the_terminal(night):
    night.decide(good("aa"))
    decision = night.decide(good("bb", bytes=200))
    assert "| size | 100 B | 200 B | 100.0 % | worse |" in decision.markdown.replace("  ", " ")
    assert decision.lines[0].startswith("[bold red]worse[/]") and len(decision.lines) == 2


def test_the_registry_is_made_again_from_the_files(night):
    line = night.decide(good("aa")).line
    night.client.delete_registered_model(line)
    champions.restore(night.client, night.store)
    assert night.client.get_model_version_by_alias(line, "champion").tags["digest"] == "aa"


def test_a_night_after_a_crash_between_file_and_registry(night):
    line = night.decide(good("aa")).line
    night.client.delete_registered_model_alias(line, "champion")
    assert night.decide(good("aa")).verdict == "unchanged"
    assert night.client.get_model_version_by_alias(line, "champion").version == 1
    night.client.delete_registered_model(line)
    night.client.create_registered_model(line)
    night.client.create_model_version(line, source="file:///of/another")
    assert (
        night.decide(good("aa")).champion["version"] == "2"
        and champions.champion_of(night.store, line)["version"] == "2"
    )


def test_two_real_runs(prefect_api, monkeypatch, recipe, place, tensorpress_run):
    monkeypatch.setenv("PREFECT_API_URL", prefect_api)
    steps = {"quantize": {"use": "gptq", "after": "model", "group_size": 32, "bits": 8}}
    path = recipe(steps=steps, evaluate=["size"], gates={"size_ratio": {"max": 10}})
    store = Store(place / "mlruns")
    decisions = []
    for bits in (8, 4):
        assert tensorpress_run("run", path, "--set", f"steps.quantize.bits={bits}", "--json", "out.json").code == 0
        run = json.loads(Path("out.json").read_text())
        decisions.append(champions.decide(open_client(store.root), store, run))
    assert [decision.verdict for decision in decisions] == ["first", "promoted"]
    assert decisions[0].line == decisions[1].line and decisions[0].line.startswith("tiny on llama ")
    assert any("size: " in line and "better" in line for line in decisions[1].says)
    client = MlflowClient(f"sqlite:///{store.root / 'mlflow.db'}")
    champion = client.get_model_version_by_alias(decisions[0].line, "champion")
    assert champion.version == 2 and Path(champion.source.removeprefix("file://")).is_dir()
    assert client.get_run(champion.run_id).data.params["gptq.bits"] == "4"
