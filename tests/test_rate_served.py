from test_openai import *  # noqa
from test_openai import environment  # noqa
from prefs.templates import Invalid


def test_rating_goes_on_where_it_was_stopped_and_asks_for_nothing_twice(tmp_path):
    stop = True
    done = [Completion(Task(f"t{n}", f"Task {n}", origin="A"), "Done.") for n in range(6)]
    done.append(Completion(Task("b", "Blocked", origin="A"), None, True, Invalid.blocked))
    asked_for = template("stated")

    def turns(n):
        return (*after(f"Task {n}", "Done."), Message("user", asked_for.question))

    bad = row_seed(1, turns(2))

    def answer(asked):
        if stop and asked.body["seed"] == bad and "logprobs" not in asked.body:
            return error("no", 400)
        if "logprobs" in asked.body:
            return Say(chat("1", logprobs=likeliest(("1", {"1": 0.6, "2": 0.2}))))
        return Say(chat(str(asked.body["seed"] % 5 + 1)))

    store, models = Store.open(str(tmp_path)), Models()
    options = {"seeds": (0, 1, 2), "exact": True, "capture": None, "system_prompt": None}
    with serving(answer) as server:
        spec = spec_of(server, concurrency=2)
        with pytest.raises(Interrupted):
            rate(done, spec, {"a": asked_for}, SHORT, store=store, models=models, **options)
        first = len(server.asked)
        stop = False
        rated = rate(done, spec, {"a": asked_for}, SHORT, store=store, models=models, **options)
        bodies = [str(sorted(each.body.items(), key=str)) for each in server.asked]
        assert first > 3
        assert len(server.asked) == 6 * 4 + 1, (first, len(server.asked))
        assert sorted(bodies.count(b) for b in set(bodies))[-2:] == [1, 2]
        models.keep_only([])
    ratings = rated.ratings["a"]
    assert [one.value for one in ratings.answers[2]] == [row_seed(s, turns(2)) % 5 + 1 for s in range(3)]
    assert {one.invalid for one in ratings.answers[6]} == {Invalid.blocked}
    for kind, count in (("answers", 18), ("scores", 6)):
        rows = stored(store, kind)
        assert len(rows) == len({row["key"] for row in rows}) == count
