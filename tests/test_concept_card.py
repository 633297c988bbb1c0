"""Concept vectors on disk, and control vectors as GGUF's own reader sees them."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from safetensors.torch import load_file

from prefs.concepts.export import CARD, TENSORS, SavedVectors, check_model, export_gguf, load_vectors, save_vectors
from prefs.errors import UserError
from prefs.probes.probe import Site

SITES = tuple(Site(layer, position) for position in ("last_prompt", "mean_completion") for layer in (0, 1, 4))
MODEL = {"id": "folder", "revision": "abc", "dtype": "float32"}


@pytest.fixture
def saved() -> SavedVectors:
    vectors = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    vectors[2] = 0
    return SavedVectors("liking", SITES, vectors, torch.arange(1.0, 7.0), {"model": MODEL, "n": 5})


def test_a_round_trip(tmp_path, saved):
    paths = save_vectors(tmp_path / "liking", saved)
    assert [path.name for path in paths] == [TENSORS, CARD]
    again = load_vectors(tmp_path / "liking")
    assert (again.concept, again.sites, again.card["n"]) == ("liking", SITES, 5)
    torch.testing.assert_close(again.vectors, saved.vectors)
    vector, norm = again.vector(Site(4, "mean_completion"))
    torch.testing.assert_close(vector, saved.vectors[5])
    assert norm == 6
    unit = load_file(tmp_path / "liking" / TENSORS)["unit"]
    np.testing.assert_allclose(unit.norm(dim=-1), [1, 1, 0, 1, 1, 1], rtol=1e-6)


def test_a_site_that_is_not_there_is_named_with_those_that_are(saved):
    with pytest.raises(UserError, match="no vector at last_prompt, layer 9; it has last_prompt, mean_completion at"):
        saved.vector(Site(9, "last_prompt"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / CARD).unlink(), "no concept vector in .* give a folder with vectors.json"),
        (lambda folder: (folder / CARD).write_text("{"), "is not JSON"),
        (lambda folder: (folder / CARD).write_text("{}"), "has no concept"),
        (lambda folder: (folder / TENSORS).write_bytes((folder / TENSORS).read_bytes()[:-1]), "is damaged"),
        (lambda folder: changed(folder, sites=[[0, "rating"]]), "does not fit"),
        (lambda folder: changed(folder, sites=[["a"]]), "does not describe"),
    ],
)
def test_damaged_files_are_named(tmp_path, saved, damage, message):
    save_vectors(tmp_path, saved)
    damage(tmp_path)
    with pytest.raises(UserError, match=message):
        load_vectors(tmp_path)


def changed(folder, **changes) -> None:
    card = json.loads((folder / CARD).read_text())
    (folder / CARD).write_text(json.dumps(card | changes))


def test_vectors_of_another_model_are_refused(saved):
    check_model(saved, {**MODEL, "dtype": "bfloat16"}, "tiny")
    with pytest.raises(UserError, match="vectors of liking are of another model than tiny: revision 'abc' and not 'd'"):
        check_model(saved, {**MODEL, "revision": "d"}, "tiny")
    with pytest.raises(UserError, match="does not say of which model"):
        check_model(SavedVectors("x", SITES, saved.vectors, saved.activation_norms), MODEL, "tiny")


def test_the_control_vector_is_what_llama_cpp_and_repeng_read(tmp_path, saved):
    path = export_gguf(tmp_path / "deep" / "mean_completion.gguf", saved, "mean_completion", "llama")
    reader = GGUFReader(path)
    text = {name: field.contents() for name, field in reader.fields.items()}
    assert text["general.architecture"] == "controlvector"
    assert text["controlvector.model_hint"] == "llama"
    # Neither has a place for what comes after block 0.
    assert text["controlvector.layer_count"] == 2
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert list(tensors) == ["direction.1", "direction.4"]
    assert tensors["direction.4"].tensor_type.name == "F32"
    np.testing.assert_array_equal(tensors["direction.4"].data, saved.vectors[5].numpy())
    assert export_gguf(tmp_path / "none.gguf", saved, "rating", "llama") is None
    assert not (tmp_path / "none.gguf").exists()
