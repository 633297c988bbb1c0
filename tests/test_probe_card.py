"""A saved probe predicts what it predicted, and its files say what it is."""

from __future__ import annotations

import json

import pytest
import torch

from prefs.errors import UserError
from prefs.probes.card import CARD, TENSORS, SavedProbe, load_probe, save_probe
from prefs.probes.probe import Probe, Site

D = 6
GENERATOR = torch.Generator().manual_seed(0)
TENSORS_OF = {
    "linear": {"weight": torch.randn(D, generator=GENERATOR), "bias": torch.tensor(3.0)},
    "logistic": {"weight": torch.randn(D, generator=GENERATOR), "bias": torch.tensor(-0.5)},
    "ordinal": {
        "weight": torch.randn(D, generator=GENERATOR),
        "thresholds": torch.tensor([-1.0, 0.5]),
        "values": torch.tensor([1.0, 2.0, 5.0]),
    },
    "mlp": {
        "hidden_weight": torch.randn(4, D, generator=GENERATOR),
        "hidden_bias": torch.randn(4, generator=GENERATOR),
        "out_weight": torch.randn(4, generator=GENERATOR),
        "bias": torch.tensor(1.0),
    },
}


def probe(kind: str) -> Probe:
    mean, scale = torch.randn(D, generator=GENERATOR), torch.rand(D, generator=GENERATOR) + 0.5
    return Probe(kind, Site(3, "rating"), "exact", mean, scale, TENSORS_OF[kind])


@pytest.fixture
def saved(tmp_path):
    sites = [Site(0, "rating"), Site(3, "rating")]
    whole = SavedProbe(probe("linear"), {"model": {"id": "m"}, "metrics": {"r2": None}}, torch.eye(2, D), sites)
    save_probe(tmp_path / "probe", whole)
    return tmp_path / "probe", whole


@pytest.mark.parametrize("kind", list(TENSORS_OF))
def test_a_loaded_probe_predicts_the_same(tmp_path, kind):
    before, vectors = probe(kind), torch.randn(5, 2, D, generator=GENERATOR)
    paths = save_probe(tmp_path, SavedProbe(before))
    assert [path.name for path in paths] == [TENSORS, CARD]
    after = load_probe(tmp_path).probe
    assert torch.equal(after.predict(vectors), before.predict(vectors))
    assert after.predict(vectors).shape == (5, 2)
    assert (after.kind, after.site, after.target) == (kind, Site(3, "rating"), "exact")


def test_predictions_are_those_of_the_formulas():
    x = torch.randn(7, D, generator=GENERATOR)
    for kind in TENSORS_OF:
        made = probe(kind)
        z, parts = (x - made.mean) / made.scale, made.tensors
        if kind == "mlp":
            hidden = torch.nn.functional.gelu(z @ parts["hidden_weight"].T + parts["hidden_bias"])
            wanted = hidden @ parts["out_weight"] + 1
        else:
            score = z @ parts["weight"]
            below = [1 / (1 + torch.exp(-(edge - score))) for edge in (-1.0, 0.5)]
            wanted = {
                "linear": score + 3.0,
                "logistic": 1 / (1 + torch.exp(-(score - 0.5))),
                "ordinal": below[0] + 2 * (below[1] - below[0]) + 5 * (1 - below[1]),
            }[kind]
        torch.testing.assert_close(made.predict(x), wanted)


def test_the_card_says_what_it_is(saved):
    folder, whole = saved
    card = json.loads((folder / CARD).read_text())
    assert {"kind": "linear", "layer": 3, "position": "rating", "target": "exact", "d_model": D}.items() <= card.items()
    assert (card["model"], card["metrics"]) == ({"id": "m"}, {"r2": None})
    loaded = load_probe(folder)
    assert loaded.sites == whole.sites
    assert torch.equal(loaded.directions, whole.directions)
    with pytest.raises(UserError, match="reads vectors of 6 numbers and was given 9: it is of another model"):
        loaded.probe.predict(torch.zeros(2, 9))


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda folder: (folder / CARD).unlink(), "no probe in"),
        (lambda folder: (folder / TENSORS).unlink(), "no probe in"),
        (lambda folder: (folder / CARD).write_text("{"), "is not JSON"),
        (lambda folder: (folder / CARD).write_text("[]"), "has no kind"),
        (lambda folder: (folder / TENSORS).write_bytes((folder / TENSORS).read_bytes()[:-4]), "is damaged"),
        (lambda folder: edit(folder, kind="cubic"), "kind 'cubic' is none of"),
        (lambda folder: edit(folder, kind="mlp"), "does not describe"),
        (lambda folder: edit(folder, d_model=7), "does not describe"),
        (lambda folder: edit(folder, sites=[[1]]), "does not describe"),
        (lambda folder: edit(folder, layer="three"), "has no layer"),
    ],
)
def test_what_is_no_probe_is_one_line(saved, break_it, message):
    folder, _ = saved
    break_it(folder)
    with pytest.raises(UserError, match=message) as caught:
        load_probe(folder)
    assert "\n" not in str(caught.value)


def edit(folder, **changes):
    card = json.loads((folder / CARD).read_text())
    (folder / CARD).write_text(json.dumps(card | changes))


def test_a_card_that_cannot_be_written_is_refused_before_anything_is(tmp_path):
    with pytest.raises(ValueError, match="nan"):
        save_probe(tmp_path / "probe", SavedProbe(probe("linear"), {"r": float("nan")}))
    assert not (tmp_path / "probe").exists()
