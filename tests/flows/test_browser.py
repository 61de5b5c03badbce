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

PICTURES = Path(__file__).parents[2] / "build/screenshots"
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
        viewport={"width": 1500, "height": 1000},
        http_credentials={"username": "tensorpress", "password": served.token},
    )
    mlflow = context.new_page()
    mlflow.set_default_timeout(60_000)
    yield prefect, mlflow


@pytest.mark.timeout(900)
def test_from_the_form_to_the_comparison(pages, served, recipe_text):
    prefect, mlflow = pages
    steps = {"quantize": {"use": "gptq", "after": "model", "group_size": 32, "bits": {"each": [8, 4, 3]}}}
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
    prefect.get_by_role("button", name="Submit").click()
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
    _compare(mlflow, served, run["id"])


def _compare(page: Any, served: Any, flow_run_id: str) -> None:
    """Open the link that the run left, go to its experiment, select the branches, compare them."""
    artifacts = served.api("POST", "/artifacts/filter", flow_runs={"id": {"any_": [flow_run_id]}}).json()
    (link,) = re.findall(r"http://[^)\s\"]+", next(a["data"] for a in artifacts if a["key"] == "mlflow-run"))[:1]
    page.goto(link)
    page.get_by_text("from-the-form").first.wait_for()
    page.wait_for_timeout(3000)
    page.screenshot(path=PICTURES / "mlflow-run.png", full_page=True)
    experiment = re.search(r"/experiments/(\d+)", link).group(1)
    client = _client(served)
    (parent,) = client.search_runs([experiment], f"tags.`tensorpress.flow_run_id` = '{flow_run_id}'")
    runs = client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'")
    assert len(runs) == 3 and {tuple(sorted(run.data.metrics)) for run in runs} == {tuple(sorted(runs[0].data.metrics))}
    ids = ",".join(f'"{run.info.run_id}"' for run in runs)
    page.goto(f"{served.mlflow}/#/experiments/{experiment}/runs")
    page.get_by_text("quantize[quantize.bits=4]").first.wait_for(state="attached")
    page.wait_for_timeout(5000)
    page.screenshot(path=PICTURES / "mlflow-experiment.png", full_page=True)
    page.goto(f'{served.mlflow}/#/compare-runs?runs=[{ids}]&experiments=["{experiment}"]')
    page.get_by_text("Parallel Coordinates").first.wait_for()
    page.wait_for_timeout(4000)
    page.screenshot(path=PICTURES / "mlflow-compare.png", full_page=True)
    shown = page.inner_text("body")
    assert "perplexity_ratio" in shown and "gptq.bits" in shown


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
