"""What passes of a model may share: by its config, and by a trial when it is loaded."""

from __future__ import annotations

import pytest
import torch
from batches import pool
from engine_calls import observe
from families import QUESTION, SAMPLING
from zoo import family, zoo_model

from prefs.errors import UserError
from prefs.models.loading import Models
from prefs.models.local.engine import LocalEngine
from prefs.models.local.sharing import Sharing
from prefs.models.types import Capture


@pytest.mark.parametrize(
    ("name", "sharing"),
    [
        ("llama", Sharing()),
        ("qwen2", Sharing()),  # whose window is switched off
        ("gemma2", Sharing(gaps=False, tree=False)),
        ("gpt_neo", Sharing(gaps=False, tree=False)),  # whose windows have another name
        ("qwen3_5_text", Sharing(gaps=False, tree=False)),
        ("llama4_text", Sharing(gaps=False, tree=False)),
        ("phi3_longrope", Sharing(switch=64, tree=False)),
        ("glm_moe_dsa", Sharing(gaps=False, tree=False, switch=512, indexed=True)),
    ],
)
def test_what_a_config_tells(name, sharing):
    assert Sharing.of_config(family(name)) == sharing


@pytest.mark.parametrize(
    ("sharing", "done", "rows", "goes_on"),
    [
        (Sharing(), [3, 5], [2, 4], True),
        (Sharing(gaps=False), [3, 5], [2, 2], True),
        (Sharing(gaps=False), [3, 5], [2, 4], False),
        (Sharing(gaps=False), [0, 5], [2, 4], True),  # padding before a row's first token
        (Sharing(gaps=False, several=False), [0, 0], [2, 4], True),
        (Sharing(gaps=False, several=False), [3, 5], [1, 1], True),
        (Sharing(gaps=False, several=False), [3, 5], [2, 2], False),
        (Sharing(gaps=False, single=False), [3, 5], [1, 1], False),
        (Sharing(switch=8), [3, 5], [1, 3], True),
        (Sharing(switch=8), [3, 5], [1, 4], False),
        (Sharing(switch=8), [9, 9], [1, 4], True),
    ],
)
def test_where_a_pass_goes_on_from_what_was_kept(sharing, done, rows, goes_on):
    assert sharing.goes_on([[1] * n for n in done], [[1] * n for n in rows]) == goes_on


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> LocalEngine:
    engine = Models().get(zoo_model(tmp_path_factory.mktemp("llama"), "llama"))
    assert isinstance(engine, LocalEngine)
    return engine


def blind_to_padding(cached, ids, options):
    options["attention_mask"] = torch.ones_like(options["attention_mask"])


def elsewhere_with_several(cached, ids, options):
    options["position_ids"] = options["position_ids"] + 7 * bool(cached and ids.shape[1] > 1)


def blind_to_branches(cached, ids, options):
    mask = options["attention_mask"]
    if mask.ndim == 4:
        width = ids.shape[1]
        causal = torch.full((width, width), torch.finfo(mask.dtype).min).triu(1)
        options["attention_mask"] = torch.cat([mask[..., :-width], causal.expand(len(ids), 1, -1, -1)], dim=-1)


def without_a_cache(cached, ids, options):
    if cached:
        raise NotImplementedError("no cache")


@pytest.mark.parametrize(
    ("fault", "sharing", "note"),
    [
        (blind_to_padding, Sharing(rows=False, gaps=False, tree=False), "rows are run one at a time"),
        (elsewhere_with_several, Sharing(gaps=False, several=False, tree=False), "questions are run with all that is"),
        (without_a_cache, Sharing(gaps=False, several=False, single=False, tree=False), "each token that is drawn"),
        (blind_to_branches, Sharing(tree=False), ""),
    ],
)
def test_a_family_that_cannot_share_is_told_and_run_right(llama, monkeypatch, prefs_log, fault, sharing, note):
    rows, forward = pool(4, seed=3), llama.bridge.forward

    def faulty(ids, **options):
        cached = options["past_key_values"].get_seq_length() if options.get("past_key_values") is not None else 0
        fault(cached, ids, options)
        return forward(ids, **options)

    def asked():
        return [
            reply
            for (reply,) in observe(llama, rows, [QUESTION], SAMPLING, seeds=(0,), capture=Capture((4,), ("rating",)))
        ]

    expected = asked()
    monkeypatch.setattr(llama.passes, "sharing", Sharing())
    monkeypatch.setattr(llama.bridge, "forward", faulty)
    llama.try_sharing()
    assert llama.passes.sharing == sharing
    assert note in prefs_log.text
    for reply, right in zip(asked(), expected, strict=True):
        assert reply.samples == right.samples
        assert reply.scores[0].mass == pytest.approx(right.scores[0].mass, rel=1e-4)
        torch.testing.assert_close(reply.residuals["rating"], right.residuals["rating"], rtol=1e-4, atol=1e-4)


def test_rows_beyond_which_a_family_is_not_causal_are_refused(llama, monkeypatch):
    monkeypatch.setattr(llama.passes, "sharing", Sharing(switch=50, indexed=True))
    with pytest.raises(UserError, match=r"over 50 tokens, .* later ones; give model\.max_context=50"):
        observe(llama, pool(4, seed=3), [QUESTION])


def test_the_trial_is_not_counted_as_spent(llama):
    before = llama.usage()
    llama.try_sharing()
    assert llama.usage() == before
    assert llama.passes.sharing == Sharing()
