"""`recipes`: list, show and copy."""

from __future__ import annotations

import pytest

import tensorpress.cli.recipes as recipes


@pytest.fixture
def two_recipes(tmp_path, monkeypatch):
    folder = tmp_path / "packaged"
    folder.mkdir()
    (folder / "quick.yaml").write_text("name: quick\ndescription: four bits\nsteps: {}\n# ends [here]\n")
    (folder / "slow.yaml").write_text("name: slow\nsteps: {}\n")
    monkeypatch.setattr(recipes, "packaged", lambda: {p.stem: p for p in sorted(folder.glob("*.yaml"))})
    return folder


def test_recipes(call, refused, two_recipes, work):
    code, out, _ = call("recipes", "list")
    assert code == 0 and out.split() == ["quick", "four", "bits", "slow"]
    whole = (two_recipes / "quick.yaml").read_text()
    assert call("recipes", "show", "quick")[:2] == (0, whole)
    assert call("recipes", "copy", "quick")[:2] == (0, "quick.yaml\n")
    (work / "folder").mkdir()
    assert call("recipes", "copy", "quick", "folder")[0] == call("recipes", "copy", "quick", "mine.yml")[0] == 0
    for name in ("quick.yaml", "folder/quick.yaml", "mine.yml"):
        assert (work / name).read_text() == whole
        assert "exists already" in refused("recipes", "copy", "quick", name)
    assert "did you mean quick" in refused("recipes", "show", "quik")
    assert "no folder" in refused("recipes", "copy", "quick", "no/such/folder.yaml")


@pytest.mark.parametrize("name", recipes.packaged())
def test_every_recipe_is_valid(call, name):
    code, out, err = call("validate", str(recipes.packaged()[name]))
    assert code == 0, err
    assert f"{name}: " in out
