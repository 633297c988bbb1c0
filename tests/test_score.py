"""A saved probe on new text: the numbers, the page, and what a user can get wrong."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from html import unescape
from pathlib import Path

import numpy as np
import pytest
import torch
from browser import chromium
from conftest import template
from engine_calls import complete, replies
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from scipy.special import expit, ndtr
from tiny_models import llama, tiny_model

from prefs.config import ModelConfig, ThinkingConfig
from prefs.errors import UserError
from prefs.models.loading import Models, ModelSpec, identity
from prefs.models.local.engine import LocalEngine
from prefs.models.types import Capture, Message, Question, Reply, Request, Sampling
from prefs.probes.card import SavedProbe, load_probe, save_probe
from prefs.probes.probe import Probe, Site
from prefs.probes.source import Source
from prefs.score import ScoreConfig, literal, score, texts

GREEDY = Sampling(0.0, 1.0, 6)
HOSTILE = "Add 1,2 {a: ${b}} = 'x' \"y\"\n<script>alert('<|im_end|>')</script> \\${c} &amp; 🦄\x1b[31m\u202e \\"
SMOLLM2 = ModelConfig(name="smollm2", path="embedded:smollm2", device="cpu", prefill="Answer: ")
RANDOM = torch.Generator().manual_seed(3)


def made(kind: str, position: str, d: int = 576, layer: int = 14) -> Probe:
    """A probe of random weights, with a mean and a scale that matter."""

    def numbers(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=RANDOM)

    weight = {"weight": 0.05 * numbers(d)}
    tensors = {
        "linear": weight | {"bias": torch.tensor(3.2)},
        "logistic": weight | {"bias": torch.tensor(-0.2)},
        "ordinal": weight
        | {"thresholds": torch.tensor([-1.0, -0.2, 0.4, 1.5]), "values": torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])},
        "mlp": {
            "hidden_weight": 0.05 * numbers(7, d),
            "hidden_bias": numbers(7),
            "out_weight": numbers(7),
            "bias": torch.tensor(3.0),
        },
    }[kind]
    return Probe(kind, Site(layer, position), "exact", numbers(d), 2 + numbers(d).abs(), tensors)


def predicted(probe: Probe, vector: torch.Tensor) -> float:
    """What each form says of one vector, written out again, in float64."""
    z = ((vector - probe.mean) / probe.scale).double().numpy()
    parts = {name: tensor.double().numpy() for name, tensor in probe.tensors.items()}
    if probe.kind == "mlp":
        hidden = parts["hidden_weight"] @ z + parts["hidden_bias"]
        return float((hidden * ndtr(hidden)) @ parts["out_weight"] + parts["bias"])
    if probe.kind == "ordinal":
        at_most = [*(expit(edge - z @ parts["weight"]) for edge in parts["thresholds"]), 1.0]
        return float(np.diff([0.0, *at_most]) @ parts["values"])
    raw = float(z @ parts["weight"] + parts["bias"])
    return float(expit(raw)) if probe.kind == "logistic" else raw


def card(model: ModelConfig = SMOLLM2, dtype: str = "float32", **other: object) -> dict[str, object]:
    asked = template("stated")
    spec = dataclasses.replace(ModelSpec.from_config(model), dtype=dtype)
    return {
        "model": identity(spec),
        "model_config": OmegaConf.to_container(OmegaConf.structured(model), enum_to_str=True),
        "template": {
            "name": asked.name,
            "question": asked.question,
            "options": [{"say": option.say, "value": option.value} for option in asked.options],
            "prefill": None,
        },
        "system_prompt": None,
        "dataset": "mini",
        "metrics": {"r2": 0.7149, "pearson": 0.85},
        "scale": {"low": 1, "high": 5},
        **other,
    }


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "probe"


@pytest.fixture
def own(backend, smollm2_fp32) -> Models:
    """The session's model under the care of one test."""
    return Models({smollm2_fp32.engine: backend})


def scored(folder: Path, models: Models, **given: object):
    config = ScoreConfig(probe=str(folder), max_new_tokens=6, **given)
    return score(config, *texts(config), folder.parent / "out", models)


def written(folder: Path) -> dict:
    return json.loads((folder.parent / "out" / "score.json").read_text())


TURNS = (Message("user", "Name a colour."), Message("assistant", "Blue, green"))


def captured(
    engine: LocalEngine, position: str, *turns: Message, sampling: Sampling = GREEDY, scores: tuple[int, ...] = ()
) -> Reply:
    """What the engine itself captures at layer 14."""
    question = Question(template("stated").question, tuple("12345"), "Answer: ") if position == "rating" else None
    capture = Capture((14,), (position,))
    (reply,) = replies(engine, [Request(turns, question, sampling, scores=scores, capture=capture)])
    return reply


@pytest.mark.parametrize("kind", ["linear", "logistic", "ordinal", "mlp"])
def test_the_prediction_is_the_probes_of_what_is_captured_at_rating(folder, own, backend, kind):
    probe = made(kind, "rating")
    save_probe(folder, SavedProbe(probe, card()))
    applied = scored(folder, own, text=TURNS[0].content, completion=TURNS[1].content)
    expected = predicted(probe, captured(backend, "rating", *TURNS).residuals["rating"][0])
    assert applied.prediction == pytest.approx(expected, abs=1e-4)
    assert written(folder)["prediction"] == applied.prediction
    assert float(applied.scores[-1]) == pytest.approx(expected, abs=2e-3)
    assert applied.centre == pytest.approx(predicted(probe, probe.mean), abs=1e-5)


@pytest.mark.parametrize("position", ["last_prompt", "first_completion", "last_completion", "mean_completion"])
def test_positions_before_the_question(folder, own, backend, position):
    probe = made("linear", position)
    save_probe(folder, SavedProbe(probe, card(system_prompt="Be brief.")))
    applied = scored(folder, own, text=TURNS[0].content, completion=TURNS[1].content)
    residuals = captured(backend, position, Message("system", "Be brief."), *TURNS).residuals
    assert applied.prediction == pytest.approx(predicted(probe, residuals[position][0]), abs=1e-4)
    start, end = written(folder)["positions"][position]
    assert end - start == (3 if position == "mean_completion" else 1)
    token_scores = [token["score"] for token in written(folder)["tokens"][start:end]]
    assert np.mean(token_scores) == pytest.approx(applied.prediction, abs=2e-3)  # a linear probe of a mean


def test_the_model_writes_its_own_completion_where_one_is_needed(folder, own, backend):
    save_probe(folder, SavedProbe(made("linear", "last_completion"), card()))
    applied = scored(folder, own, text="Count to three.")
    (sample,) = complete(backend, [(Message("user", "Count to three."),)], 0, GREEDY)
    assert applied.conversation[-1] == Message("assistant", sample.text)
    assert written(folder)["completion_written_by_model"]
    again = scored(folder, own, text="Count to three.", completion=sample.text)
    assert again.prediction == applied.prediction
    assert not written(folder)["completion_written_by_model"]
    with pytest.raises(UserError, match="an empty completion has no last_completion"):
        scored(folder, own, text="Hi", completion="")


def tokens_of(page: str) -> list[tuple[str, str]]:
    """The text and the title of each token of a page; the text of a page is in no other element."""
    (tokens,) = re.findall(r'<div class="tokens"[^>]*>(.*?)</div>', page, flags=re.DOTALL)
    spans = re.findall(r'<span [^<>]*?title="([^"]*)"[^<>]*>([^<>]*)</span>', tokens)
    assert tokens.replace("<br>", "").count("<") == 2 * len(spans)
    return [(unescape(text), unescape(title)) for title, text in spans]


def test_hostile_text_is_text_on_the_page(folder, own):
    save_probe(folder, SavedProbe(made("linear", "rating"), card()))
    applied = scored(folder, own, text=HOSTILE, completion="</span></div><img src=x onerror=alert(1)>")
    html = (folder.parent / "out" / "score.html").read_text()
    assert not re.search("<script|<img", html)
    assert "default-src 'none'" in html
    told = tokens_of(html)
    assert len(told) == len(applied.stream.tokens) == len(written(folder)["tokens"])
    for number, ((shown, title), token) in enumerate(zip(told, applied.stream.tokens, strict=True)):
        assert shown == (token.replace("\n", "↵").replace("\x1b", "␛") or "·")
        assert f"token {number}, " in title
        assert shown in title
    assert sum("control token" in title for _, title in told) == sum(applied.stream.control)
    assert told[-1][1].endswith(", rating")
    assert "<script>alert('<|im_end|>')</script>" in "".join(applied.stream.tokens)
    assert written(folder)["conversation"][0]["content"] == HOSTILE


def test_a_rater_that_thinks_is_read_after_its_thought(folder, backend):
    sentence = ThinkingConfig(enabled=True, open="", close=".", gap=" ", max_tokens=12, force_close=True)
    model = dataclasses.replace(SMOLLM2, thinking=sentence)
    asked = card(model, thought={"seed": 5, "temperature": 1.0, "top_p": 1.0})
    probe = made("linear", "rating")
    save_probe(folder, SavedProbe(probe, asked))
    spec = Source.read(load_probe(folder)).rater(None, None)
    assert spec.thinking == ThinkingConfig(True, "", ".", " ", 12, True)
    thinker = LocalEngine(backend.bridge, backend.encoder.tokenizer, spec)
    applied = scored(folder, Models({spec.engine: thinker}), text="Name a colour.", completion="Blue")
    sampling = Sampling(1.0, 1.0, 1)
    reply = captured(thinker, "rating", *applied.conversation, sampling=sampling, scores=(5,))
    assert applied.thought == reply.scores[5].thought
    assert applied.prediction == pytest.approx(predicted(probe, reply.residuals["rating"][0]), abs=1e-4)
    assert float(applied.scores[-1]) == pytest.approx(applied.prediction, abs=2e-3)
    assert "".join(applied.stream.tokens).endswith(f"{applied.thought}. Answer: ")


@pytest.mark.parametrize(
    ("probe", "changed", "match"),
    [
        ({}, {"scale": None}, "card has no scale, which scoring new text needs"),
        ({}, {"template": None}, "card has no template, which scoring new text needs"),
        ({}, {"scale": {"low": 1}}, "no scale.high"),
        ({}, {"template": {"question": "?", "options": [{}], "prefill": None}}, "no template.options with say"),
        ({}, {"model_config": {"name": "x", "path": "y", "colour": 3}}, "no model_config that this version"),
        ({}, {"model_config": {"name": "x", "path": "y", "backend": "vllm"}}, "of vllm, which gives no residual"),
        ({"d": 64}, {}, "vectors of 64 numbers, and smollm2 has 576"),
        ({"layer": 30}, {}, "layer 30, and smollm2 has 0 to 29"),
    ],
)
def test_a_probe_that_cannot_score_this_text_is_one_line(folder, own, probe, changed, match):
    asked = {key: value for key, value in card(**changed).items() if value is not None or key == "system_prompt"}
    save_probe(folder, SavedProbe(made("linear", "rating", **probe), asked))
    with pytest.raises(UserError, match=match):
        scored(folder, own, text="Hi")
    assert not (folder.parent / "out").exists()


def test_another_model_is_refused_and_one_that_has_moved_is_found(folder, tmp_path):
    spec = tiny_model(tmp_path / "tiny", llama())
    save_probe(
        folder,
        SavedProbe(
            made("linear", "last_prompt", d=64, layer=2), card(ModelConfig(name="tiny", path=spec.path, device="cpu"))
        ),
    )
    (tmp_path / "tiny").rename(tmp_path / "moved")
    source = Source.read(load_probe(folder))
    with pytest.raises(UserError, match="there is no folder"):
        source.rater(None, None)
    applied = scored(folder, Models(), text="Hi", model_path=str(tmp_path / "moved"))
    assert np.isfinite(applied.prediction)
    with pytest.raises(UserError, match=r"had id 'folder' and here 'embedded:smollm2'; revision .* with model_path="):
        source.rater(None, "embedded:smollm2")


def test_a_text_that_is_too_long(folder, own):
    save_probe(folder, SavedProbe(made("linear", "rating"), card()))
    with pytest.raises(UserError, match=r"tokens long, and smollm2 reads 8,192: shorten the text"):
        scored(folder, own, text="one " * 9000)


def test_texts_from_files(folder, own):
    save_probe(folder, SavedProbe(made("linear", "rating"), card()))
    (folder / "text.txt").write_bytes("\ufeffName a\ncolour".encode())
    (folder / "latin.txt").write_bytes("Grün".encode("latin-1"))
    applied = scored(folder, own, text_file=str(folder / "text.txt"), completion="Blue")
    assert applied.conversation[0] == Message("user", "Name a\ncolour")
    for name, match in (("none.txt", "a file that can be read"), ("latin.txt", "a UTF-8 file")):
        with pytest.raises(UserError, match=f"completion_file: got .*{match}"):
            scored(folder, own, text="Hi", completion_file=str(folder / name))


@given(
    st.text(alphabet=st.characters(exclude_categories=["Cs"], exclude_characters="\0"))
    | st.text(alphabet="\\${}'\",=x \n", max_size=12)  # that mean something to Hydra
)
def test_a_text_comes_through_hydra_as_it_is(text):
    (argument,) = literal([f"text={text}"])
    override = OverridesParser.create().parse_override(argument)
    assert not override.is_sweep_override()
    config = OmegaConf.create({"text": "?"})
    OmegaConf.update(config, "text", override.value())
    assert config.text == text


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    clean = {key: value for key, value in os.environ.items() if not key.startswith("HYDRA")}
    command = [sys.executable, "-m", "prefs.score", *arguments]
    return subprocess.run(
        command, cwd=folder, env=clean | {"COLUMNS": "80"}, capture_output=True, text=True, timeout=120
    )


def test_the_command(folder):
    save_probe(folder, SavedProbe(made("ordinal", "rating"), card()))
    done = run(folder.parent, "probe=probe", f"text={HOSTILE}", "max_new_tokens=4")
    assert done.returncode == 0, done.stderr
    (out,) = folder.parent.glob("outputs/*/*")
    record = json.loads((out / "score.json").read_text())
    assert record["conversation"][0]["content"] == HOSTILE
    assert re.search(rf"predicted +{record['prediction']:.2f} on a scale from 1 to 5", done.stdout)
    assert "R² .71, r .85" in done.stdout
    assert "(cut off after 4 tokens)" in done.stdout
    assert f"token by token  {out / 'score.html'}" in done.stdout
    assert "\x1b" not in done.stdout
    assert tokens_of((out / "score.html").read_text())


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["probe=none", "txt=Hi"], "prefs: txt: there is no such key; did you mean 'text'?"),
        (["probe=none"], "prefs: text: got None; allowed: the prompt"),
        (["probe=none", "text=Hi", "text_file=x"], "prefs: text_file: got 'x'; allowed: null, since there is text="),
        pytest.param(
            ["probe=none", "text=Hi"],
            "prefs: no probe in none: give a folder with probe.json",
            marks=pytest.mark.slow,  # after torch is loaded
        ),
        (["probe=none", "text=Hi", "out=file/below"], "prefs: out: cannot write to file/below: Not a directory"),
        (["probe=none", "text=Hi", "max_new_tokens=0"], "prefs: max_new_tokens: got 0; allowed: 1 or more"),
    ],
)
def test_what_the_user_can_mend_is_one_line_and_exit_code_2(tmp_path, arguments, line):
    (tmp_path / "file").touch()
    done = run(tmp_path, *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith(line)
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.browser
def test_in_a_browser(folder, own, tmp_path):
    save_probe(folder, SavedProbe(made("linear", "rating"), card()))
    applied = scored(folder, own, text=HOSTILE, completion="</div><img src=x onerror=alert(1)>")
    with chromium(tmp_path / "profile") as browser:
        browser.get((folder.parent / "out" / "score.html").as_uri())
        assert browser.get_log("browser") == []
        spans = browser.execute_script(
            "return [...document.querySelectorAll('.tokens span')].map(e => [e.textContent, e.className,"
            " getComputedStyle(e).backgroundColor])"
        )
        assert len(spans) == len(applied.stream.tokens)
        assert browser.execute_script("return document.querySelectorAll('script, img').length") == 0
        assert len({colour for _, _, colour in spans}) > 5  # the styles are let in by the policy
        wide = browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
        assert wide
