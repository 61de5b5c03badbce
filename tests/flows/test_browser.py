"""In a browser: from the form in the Prefect UI to COMPLETED, and to the comparison in MLflow.

Pictures of each page are left in `build/screenshots`, for a person to look at.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tensorpress.pictures.tables import METRICS

PICTURES = Path(__file__).parents[2] / "build/screenshots"
BITS = (8, 4, 3)
BRANCHES = [f"quantize[quantize.bits={bits}]" for bits in BITS]
QUALITY = {metric.key for metric in METRICS if metric.group == "quality"}
SWITCHES = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright import sync_api as playwright

    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        assert "TENSORPRESS_NEEDS_BROWSER" not in os.environ, "CI has no chromium"
        pytest.skip(
            "no chromium on this machine: what a browser sees was NOT tested (Debian: apt-get install chromium)"
        )
    PICTURES.mkdir(parents=True, exist_ok=True)
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=chromium, args=SWITCHES)
        yield started
        started.close()


@pytest.fixture(scope="module")
def pages(browser: Any, served: Any) -> Iterator[tuple[Any, Any]]:
    """A page of Prefect that is logged in, and one of MLflow."""
    prefect = browser.new_page(viewport={"width": 1300, "height": 1000})
    prefect.set_default_timeout(60_000)
    prefect.goto(served.prefect)
    prefect.locator("input").first.fill(f"tensorpress:{served.token}")
    prefect.keyboard.press("Enter")
    prefect.wait_for_url("**/dashboard**")
    context = browser.new_context(
        viewport={"width": 1920, "height": 1080},
        http_credentials={"username": "tensorpress", "password": served.token},
    )
    mlflow = context.new_page()
    mlflow.set_default_timeout(60_000)
    yield prefect, mlflow
    prefect.screenshot(path=PICTURES / "last-prefect.png", full_page=True)  # where it stopped, if it failed
    mlflow.screenshot(path=PICTURES / "last-mlflow.png")


@pytest.mark.timeout(900)
def test_from_the_form_to_the_comparison(pages, served, recipe_text):
    prefect, mlflow = pages
    steps = {"quantize": {"use": "gptq", "after": "model", "group_size": 32, "bits": {"each": [*BITS]}}}
    _open_form(prefect, served)
    _choose(prefect, "quickstart", "the text below")
    prefect.get_by_text("as in the recipe", exact=True).first.wait_for()
    text = prefect.locator("textarea").nth(1)
    text.fill(recipe_text(name="from-the-form", steps=steps, evaluate=["perplexity", "fidelity", "size"]))
    parallel = prefect.locator("input[type=number]").last
    parallel.fill("0")
    prefect.get_by_role("button", name="Submit").click()
    prefect.wait_for_timeout(1500)
    prefect.screenshot(path=PICTURES / "form-refuses.png", full_page=True)
    assert "/run" in prefect.url, "a value below its limit was taken"
    assert parallel.evaluate("field => field.validationMessage") or prefect.get_by_text("greater than").count()
    parallel.fill("1")
    prefect.screenshot(path=PICTURES / "form.png", full_page=True)
    with prefect.expect_response(lambda answer: answer.url.endswith("/create_flow_run")) as started:
        prefect.get_by_role("button", name="Submit").click()
    assert started.value.status == 201, started.value.text()
    prefect.wait_for_url(re.compile(r"/deployment/[0-9a-f-]+\?"))

    found = served.api("POST", "/flow_runs/filter", sort="EXPECTED_START_TIME_DESC", limit=1).json()
    run = served.ended(found[0]["id"], 300)
    assert run["state_type"] == "COMPLETED", run["state"]
    prefect.goto(f"{served.prefect}/v2/runs/flow-run/{run['id']}")
    prefect.get_by_text("from-the-form").first.wait_for()
    prefect.get_by_text("Completed").first.wait_for()
    prefect.wait_for_timeout(4000)
    prefect.screenshot(path=PICTURES / "flow-run.png", full_page=True)
    prefect.get_by_role("tab", name="Artifacts").click()
    prefect.get_by_text("results").first.wait_for()
    prefect.screenshot(path=PICTURES / "artifacts.png", full_page=True)
    link = _link(prefect)
    _open_run(mlflow, link)
    _select_branches(mlflow, _metrics(served, link))
    _compare(mlflow)


def _link(page: Any) -> str:
    """The link to MLflow, by the clicks that lead to it from the artifacts of a flow run."""
    page.get_by_role("link", name="mlflow-run").click()
    page.wait_for_url("**/artifacts/key/mlflow-run")
    page.locator("a[href*='/artifacts/artifact/']").first.click()
    link = page.get_by_role("link", name="This run in MLflow")
    link.wait_for()
    page.screenshot(path=PICTURES / "artifact-link.png", full_page=True)
    return link.get_attribute("href")


def _metrics(served: Any, link: str) -> dict[str, dict[str, float]]:
    """The metrics of every branch of a run: the same names on each."""
    experiment, parent = re.search(r"/experiments/(\d+)/runs/(\w+)", link).groups()
    runs = _client(served).search_runs([experiment], f"tags.`mlflow.parentRunId` = '{parent}'")
    assert sorted(run.info.run_name for run in runs) == sorted(BRANCHES)
    assert len({tuple(sorted(run.data.metrics)) for run in runs}) == 1
    return {run.info.run_name: run.data.metrics for run in runs}


def _open_run(page: Any, link: str) -> None:
    """Open the run, then the runs of its experiment, which are one click away, and not the pages for language model applications."""
    page.goto(link)
    page.get_by_role("heading", name="from-the-form").wait_for()
    page.get_by_role("button", name="Close", exact=True).click()  # the assistant, beside every page at first
    for branch in BRANCHES:
        page.get_by_role("link", name=branch, exact=True).wait_for()
    page.get_by_text("original.perplexity", exact=True).first.wait_for()
    page.screenshot(path=PICTURES / "mlflow-run.png")
    page.get_by_role("link", name="Runs", exact=True).first.click()
    page.get_by_role("link", name="from-the-form", exact=True).wait_for()


def _select_branches(page: Any, metrics: dict[str, dict[str, float]]) -> None:
    """Switch columns on, open the run in the table, see its branches with their figures, and tick them."""
    shown = {"perplexity_ratio": "metrics", "size_ratio": "metrics", "gptq.bits": "params"}
    page.get_by_role("button", name="Columns", exact=True).click()
    for name in shown:
        page.get_by_placeholder("Search columns").fill(name)
        found = page.get_by_test_id("column-selector-tree").locator("[class$=tree-title]")
        found.filter(has_text=re.compile(rf"^{re.escape(name)}$")).last.click()  # parameters come after metrics
    page.keyboard.press("Escape")
    _row(page, "from-the-form").get_by_role("gridcell").nth(1).get_by_role("button").click()
    for bits, branch in zip(BITS, BRANCHES, strict=True):
        row = _row(page, branch)
        row.wait_for()
        number = row.get_attribute("row-id")
        expected = metrics[branch] | {"gptq.bits": bits}
        for name, kind in shown.items():
            cell = page.locator(f"[row-id='{number}'] [col-id='{kind}.`{name}`']")
            cell.wait_for()
            assert float(cell.inner_text()) == pytest.approx(expected[name])
    page.screenshot(path=PICTURES / "mlflow-experiment.png")
    for branch in BRANCHES:
        box = _row(page, branch).get_by_role("checkbox", name="row selection")
        box.check()
        assert box.is_checked()
    page.screenshot(path=PICTURES / "mlflow-selected.png")


def _compare(page: Any) -> None:
    """Press Compare: quality over what differs, without a setting."""
    page.get_by_role("button", name="Compare", exact=True).click()
    page.get_by_role("heading", name="Comparing 3 Runs").wait_for()
    plot = page.get_by_role("tabpanel", name="Parallel Coordinates Plot")
    axes = plot.locator(".axis-title")
    axes.nth(1).wait_for()
    page.screenshot(path=PICTURES / "mlflow-compare.png")
    varied, *compared = axes.all_text_contents()
    assert varied == "gptq.bits"
    assert len(compared) == 1 and QUALITY.issuperset(compared), f"compared unless one chooses otherwise: {compared}"
    plot.get_by_role("combobox").nth(1).click()
    page.locator("[class*=select-item-option]").get_by_text("perplexity_ratio", exact=True).click()
    axes.get_by_text("perplexity_ratio", exact=True).wait_for()
    page.keyboard.press("Escape")
    page.screenshot(path=PICTURES / "mlflow-compare-chosen.png")

    for what in ("Parameters", "Metrics"):
        page.get_by_role("switch", name=f"{what} - Show diff only").click()
    page.get_by_role("rowheader", name="gptq.group_size", exact=True).wait_for(state="hidden")
    differs = page.get_by_role("row").filter(has=page.get_by_role("rowheader", name="gptq.bits", exact=True))
    assert differs.get_by_role("cell").all_inner_texts() == [str(bits) for bits in BITS]
    assert page.get_by_role("link", name="perplexity_ratio", exact=True).is_visible()
    page.get_by_role("button", name="Artifacts", exact=True).scroll_into_view_if_needed()
    page.screenshot(path=PICTURES / "mlflow-compare-figures.png")

    page.get_by_role("tab", name="Scatter Plot").click()
    plot = page.get_by_role("tabpanel", name="Scatter Plot")
    plot.locator(".ytitle").wait_for()
    page.screenshot(path=PICTURES / "mlflow-scatter.png")
    across, up = plot.get_by_role("combobox").all_inner_texts()
    assert across == "gptq.bits" and up in QUALITY, f"drawn unless one chooses otherwise: {up} over {across}"


def _row(page: Any, name: str) -> Any:
    """The row of a run in MLflow's table of runs: the part of it that has its name."""
    return page.get_by_role("row").filter(has=page.get_by_role("link", name=name, exact=True))


def _client(served: Any) -> Any:
    from tensorpress.tasks.tracking import open_client

    return open_client(served.store)


def _open_form(page: Any, served: Any) -> None:
    deployment = served.deployment("compress/compress")["id"]
    page.goto(f"{served.prefect}/v2/deployments/deployment/{deployment}/run?parameters=%7B%7D")
    page.get_by_text("Recipe (Optional)").wait_for()


def _choose(page: Any, before: str, after: str) -> None:
    page.get_by_text(before, exact=True).first.click()
    page.get_by_role("option", name=after).first.click()
