"""Ids, stops and system prompts of tokenizers and chat templates of every make, against transformers' own.

The vocabularies are trained here on a few words; what differs is what lies around them: how blanks are written, what
stands first, and which blanks the control tokens strip.
"""

from __future__ import annotations

import logging
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from engine_calls import complete
from hydra import compose
from hydra_app import shipped_configs
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tiny_models import llama, tiny_model
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import GenerationConfig, PreTrainedTokenizerFast

from prefs.config import typed
from prefs.errors import UserError
from prefs.models.chat_template import ChatTemplate
from prefs.models.loading import Models, ModelSpec, identity, recorded
from prefs.models.prompts import encode_prompt, shared_prefix
from prefs.models.sampling import Stops
from prefs.models.tokens import ChatEncoder
from prefs.models.types import Message, Question, Sampling, as_dicts
from prefs.stages.measure import sites

FILES = Path(__file__).parent / "chat_templates"
CORPUS = [
    "The user asks: how much did you like it? From 1 to 5.",
    " Rain  falls on\n\nthe roof; it sings.\tIt's 42!",
] * 9
WORDS = [" ", "  ", "\n", "\n\n", "\t", "Rain", "the roof", "It's", "42", "1", ".", "é", "你好", "🙂", "▁", "<", "|>"]

OPENED = "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
PHI3 = "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}" + OPENED
TRIMMED = "{{ bos_token }}" + PHI3.replace("m['content']", "m['content'] | trim")
ZEPHYR = PHI3.replace("<|end|>", "</s>")
LLAMA2 = """{% for m in messages %}{% if m['role'] == 'user' %}{{ '<s>[INST] ' + m['content'] + ' [/INST]' }}
{%- elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + ' </s>' }}
{%- else %}{{ raise_exception('no system prompt') }}{% endif %}{% endfor %}"""
PLAIN_TURNS = """{% for m in messages %}### {{ m['role'] | capitalize }}:
{{ m['content'] }}{{ '\n\n' }}{% endfor %}{% if add_generation_prompt %}### Assistant:\n{% endif %}"""
TEMPLATES = {
    **{"phi3": PHI3, "trimmed": TRIMMED, "zephyr": ZEPHYR, "llama2": LLAMA2, "plain": PLAIN_TURNS},
    **{name: (FILES / f"{name}.jinja").read_text() for name in ("gemma2", "llama3_1", "qwen3")},
}
CONTROL = [
    *("<s>", "</s>", "<unk>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<|im_start|>", "<|im_end|>"),
    *("<start_of_turn>", "<end_of_turn>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    *("<think>", "</think>"),
]
DUMMY_PREFIX = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
LOWER = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])


def byte_level(**how) -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(**{"add_prefix_space": False, **how})
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(CORPUS * 9, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet))
    return made


def sentencepiece(scheme: str | None = None, *, unigram: bool = False) -> Tokenizer:
    """With Metaspace, or the older form, a normalizer (None). Control tokens stand in the vocabulary itself."""
    made = Tokenizer(models.Unigram() if unigram else models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.decoder = decoders.Metaspace()
    if scheme is None:
        made.normalizer = DUMMY_PREFIX
    else:
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    trainer = trainers.UnigramTrainer if unigram else trainers.BpeTrainer
    made.train_from_iterator(CORPUS * 9, trainer(vocab_size=200, special_tokens=CONTROL, unk_token="<unk>"))
    return made


def word_piece() -> Tokenizer:
    made = Tokenizer(models.WordPiece(unk_token="<unk>"))
    made.normalizer, made.pre_tokenizer = LOWER, pre_tokenizers.Split(Regex(r"\s+|\w+|."), "isolated")
    made.train_from_iterator(CORPUS * 9, trainers.WordPieceTrainer(vocab_size=200, special_tokens=CONTROL))
    return made


def tokenizer_of(made: Tokenizer, template: str = PHI3, **flags: bool) -> PreTrainedTokenizerFast:
    """In transformers, with control tokens that have these flags of `AddedToken`."""
    flags = {"normalized": False, **flags}
    made.add_special_tokens([AddedToken(text, special=True, **flags) for text in CONTROL])
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, chat_template=template, **named)


MAKES = {
    "bytes": lambda: tokenizer_of(byte_level()),
    "bytes, a blank put first": lambda: tokenizer_of(byte_level(add_prefix_space=True)),
    "bytes, strips left": lambda: tokenizer_of(byte_level(), lstrip=True),
    "bytes, strips right": lambda: tokenizer_of(byte_level(), rstrip=True),
    "bytes, strips both": lambda: tokenizer_of(byte_level(), lstrip=True, rstrip=True),
    "metaspace, first": lambda: tokenizer_of(sentencepiece("first")),
    "metaspace, always": lambda: tokenizer_of(sentencepiece("always"), rstrip=True),
    "metaspace, never": lambda: tokenizer_of(sentencepiece("never"), lstrip=True),
    "unigram, first": lambda: tokenizer_of(sentencepiece("first", unigram=True), rstrip=True),
    "dummy prefix": lambda: tokenizer_of(sentencepiece()),
    "dummy prefix, normalized": lambda: tokenizer_of(sentencepiece(), normalized=True),
    "lower case, normalized": lambda: tokenizer_of(word_piece(), normalized=True),
}


@pytest.fixture(scope="module", params=MAKES)
def encoders(request) -> dict[str, ChatEncoder]:
    """Of one make of tokenizer, with each template. That they can be had at all says that their probe was right."""
    tokenizer, made = MAKES[request.param](), {}
    for name, template in TEMPLATES.items():
        made[name] = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer.backend_tokenizer,
            chat_template=template,
            **{"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
        )
    return {name: ChatEncoder(tokenizer) for name, tokenizer in made.items()}


def published(encoder: ChatEncoder, turns, **kwargs):
    return encoder.tokenizer.apply_chat_template(
        as_dicts(turns), **{"return_dict": False, "date_string": "26 Jul 2024", "add_generation_prompt": True, **kwargs}
    )


texts = st.lists(st.sampled_from(WORDS), min_size=1, max_size=8).map("".join)
conversations = st.lists(texts, min_size=3, max_size=3).map(
    lambda texts: tuple(map(Message, ("user", "assistant", "user"), texts))
)
BORDERS = tuple(map(Message, ("user", "assistant", "user"), ("\n Rain  ", "  It's 42.\n\n", " 1\t")))
shared = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=8)


@given(conversations)
@example(BORDERS)
@shared
def test_ids_are_those_of_apply_chat_template(encoders, turns):
    for encoder in encoders.values():
        assert list(encoder.encode(turns, answer="").ids) == published(encoder, turns)
        assert list(encoder.encode(turns[:2]).ids) == published(encoder, turns[:2], add_generation_prompt=False)


@given(conversations, st.lists(st.sampled_from([*CONTROL, *WORDS]), min_size=4).map("".join))
@example(BORDERS, " ".join(CONTROL) + "".join(CONTROL))
@shared
def test_control_tokens_in_texts_are_text(encoders, turns, nasty):
    for encoder in encoders.values():
        control = encoder.control_ids - {encoder.tokenizer.unk_token_id}
        turns = (replace(turns[0], content=nasty), turns[1], replace(turns[2], content=turns[2].content + nasty))
        ids, spans = encoder.encode(turns, answer="").ids, encoder.encode(turns, answer="").spans
        benign = encoder.encode([replace(turn, content="42") for turn in turns], answer="").ids
        assert [token for token in ids if token in control] == [token for token in benign if token in control]
        for start, end in spans:
            assert not control & {*ids[start:end]}


def test_prefixes_questions_and_options_are_the_whole_conversation(encoders):
    questions = [Question("  From 1 to 5? ", ("1", "42")), Question("\nIt's?", ("Rain", "the roof"), "It's ")]
    for encoder in encoders.values():
        prompts = [encode_prompt(encoder, BORDERS[:2], question) for question in questions]
        prefix = shared_prefix(prompts)
        for prompt, question in zip(prompts, questions, strict=True):
            opened = published(encoder, (*BORDERS[:2], Message("user", question.text)), tokenize=False)
            assert prompt.ids[: len(prefix)] == prefix
            for say, tail in zip(question.options, prompt.tails, strict=True):
                whole = encoder.tokenizer(opened + question.prefill + say, add_special_tokens=False)["input_ids"]
                assert [*prompt.ids, *tail] == whole


def test_spans_hold_the_tokens_that_end_in_their_text(encoders):
    turns = [Message("user", " asks: Rain 🙂  "), Message("assistant", "\n\nthe roof; it sings.\n")]
    for encoder in encoders.values():
        rendered = published(encoder, turns, tokenize=False, add_generation_prompt=False)
        tokens = encoder.tokenizer(rendered, add_special_tokens=False, return_offsets_mapping=True)
        for message, (start, end) in zip(turns, encoder.encode(turns).spans, strict=True):
            text = message.content.strip()
            first = rendered.index(text)
            inside = [n for n, (_, last) in enumerate(tokens["offset_mapping"]) if first < last <= first + len(text)]
            assert list(range(start, end)) == inside != []


@pytest.mark.parametrize(
    ("template", "flags"), [(PHI3.replace("m['content']", "m['content'] | upper"), {}), (PHI3, {"single_word": True})]
)
def test_a_tokenizer_that_transformers_gets_other_ids_from_is_refused(template, flags):
    with pytest.raises(UserError, match=r"tokens than transformers' apply_chat_template makes.*: token \d+ .* for \["):
        ChatEncoder(tokenizer_of(byte_level(), template, **flags))


HARMONY = """{% for m in messages %}<|start|>{{ m['role'] }}<|message|>{{ m['content'] }}
{%- if loop.last and m['role'] == 'assistant' %}<|return|>{% else %}<|end|>{% endif %}{% endfor %}"""
GLM = "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}{% endfor %}" + OPENED
ONLY_USERS_LAST = "{% if messages[-1]['role'] != 'user' %}{{ raise_exception('no') }}{% endif %}" + GLM


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (PHI3, "<|end|>"),
        (ZEPHYR, "</s>"),
        (LLAMA2, "</s>"),
        (TEMPLATES["gemma2"], "<end_of_turn>"),
        (TEMPLATES["llama3_1"], "<|eot_id|>"),
        (TEMPLATES["qwen3"], "<|im_end|>"),
        (HARMONY, "<|return|>"),  # <|end|> also ends what comes before the answer
        (GLM, "<|user|>"),
        (ONLY_USERS_LAST, "<|user|>"),
    ],
)
def test_answers_end_at_what_the_template_writes_after_a_turn(template, end):
    tokenizer = tokenizer_of(byte_level(), template)
    tokenizer.add_tokens(["<|start|>", "<|message|>", "<|return|>"], special_tokens=True)
    encoder = ChatEncoder(tokenizer)
    eos, other = tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|system|>")
    expected = {tokenizer.convert_tokens_to_ids(end), eos}
    assert Stops.of(encoder, None) == Stops(frozenset(expected))
    assert Stops.of(encoder, GenerationConfig(eos_token_id=[other])) == Stops(frozenset({*expected, other}))


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (PLAIN_TURNS, "\n\n### User:"),
        (PHI3.replace("<|end|>", " [ENDE]"), "[ENDE]"),
        (PHI3.replace("<|end|>", "~~ <|end|>"), "~~"),
        ("{% for m in messages %}{{ m['content'] }}\n{% endfor %}", None),
    ],
)
def test_turns_that_no_token_ends_end_with_a_text(template, end):
    encoder = ChatEncoder(tokenizer_of(byte_level(), template))
    stops = Stops.of(encoder, None)
    assert stops == Stops(frozenset({encoder.tokenizer.eos_token_id}), end)
    if end is not None:
        answer = f"Rain.{end}\nMore"
        ids = encoder.tokenizer(answer)["input_ids"]
        ended = [stops.reached(encoder.tokenizer, ids[:count]) for count in range(len(ids) + 1)]
        first = ended.index(True)
        assert end in encoder.tokenizer.decode(ids[:first])
        assert end not in encoder.tokenizer.decode(ids[: first - 1])
        assert stops.cut(answer) == "Rain."
    else:
        assert stops.cut("Rain.\nMore") == "Rain.\nMore"


LATE = """{%- set told = none -%}
{%- if messages[0]['role'] == 'system' -%}{%- set told = messages[0]['content'] -%}{%- set messages = messages[1:] -%}
{%- endif -%}{%- for m in messages -%}{{- '<|im_start|>' + m['role'] + '\n' -}}
{%- if loop.last and told is not none -%}{{- told + '\n\n' -}}{%- endif -%}{{- m['content'] + '<|im_end|>\n' -}}
{%- endfor -%}{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"""


def test_where_a_template_shows_the_system_prompt(tokenizer):
    shown = {name: ChatTemplate(tokenizer_of(byte_level(), text), {}) for name, text in TEMPLATES.items()}
    assert not any(template.shows_system_last for template in shown.values())
    assert ChatTemplate(tokenizer_of(byte_level(), LATE), {}).shows_system_last


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> ModelSpec:
    return tiny_model(tmp_path_factory.mktemp("tiny"), llama())


def test_conditions_that_no_completion_is_read_under_are_refused(tiny, tmp_path, caplog):
    def checked(folder, *overrides: str) -> list[str]:
        with shipped_configs():
            model = ["model=hf", f"model.path={folder}", "capture.layers=[0]", "probe=none"]
            config = typed(compose("config", overrides=[*model, *overrides]))
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            sites(config, ModelSpec.from_config(config.model))
        return caplog.messages

    shutil.copytree(tiny.path, tmp_path / "late")
    (tmp_path / "late" / "chat_template.jinja").write_text(LATE)
    concept, told = "concept=[liking_math]", "rating.system_prompt=Hi"
    assert checked(tiny.path, concept) == checked(tiny.path, told) == checked(tmp_path / "late") == []
    with pytest.raises(UserError, match=r"^concept: the chat template of .* only in the last turn.*mean_completion"):
        checked(tmp_path / "late", concept)
    assert checked(tmp_path / "late", concept, "capture.positions=[rating]") == []
    (warning,) = checked(tmp_path / "late", told)
    assert warning.startswith("rating.system_prompt: the chat template of")


def test_an_answer_is_drawn_until_the_text_that_ends_it(tiny, monkeypatch):
    engine, prompts = Models().get(tiny), [(Message("user", f"Hi {number}"),) for number in range(3)]
    sampling = Sampling(1.0, 1.0, 24)
    whole = complete(engine, prompts, 0, sampling)
    texts = [sample.text for sample in whole]
    end = texts[1][len(texts[1]) // 2 :][:3]
    monkeypatch.setattr(engine.decoder, "stops", Stops(engine.decoder.stops.tokens, end))
    for before, after in zip(whole, complete(engine, prompts, 0, sampling), strict=True):
        assert after.text == before.text.partition(end)[0]
        assert after.finished == (before.finished or end in before.text)
        assert (after.tokens < before.tokens) == (end in before.text)


def test_records_of_an_unchanged_model_keep_their_keys(tiny, smollm2_fp32):
    assert recorded(smollm2_fp32) == identity(smollm2_fp32)
    assert recorded(tiny) == {**identity(tiny), "records": 2}
