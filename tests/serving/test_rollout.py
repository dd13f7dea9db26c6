"""Trials over a registry: aliases that move by themselves, the record, and servers that are killed. No model here."""

import argparse
import json
import math

import numpy as np
import pytest

from labkit.files.writing import CannotWrite, InUse
from labkit.serving import trial_aliases, trial_record
from labkit.serving.commands import main
from labkit.serving.naming import UnknownAdapter
from labkit.serving.requests import Completion, NewToken
from labkit.serving.rollout import Rollouts
from labkit.serving.routed import AlreadyScored, UnknownAnswer
from labkit.serving.trial import CANDIDATE, CONTROL
from labkit.serving.trial_log import answers_of, explain, log_of, read_log
from labkit.serving.trial_options import GoldJudge, add_trial_options, rollouts_of
from tests.serving.engines import AtOnce

ALIAS, HELPER = "support@production", "support@production-candidate"


@pytest.fixture
def production(filled):
    """A registry whose production is v1 of support, and which has a v2."""
    filled.set_alias(ALIAS, 1, "ann")
    return filled


@pytest.fixture
def opened(production):
    """Makes rollouts over the registry, and closes them."""
    made = []

    def open_(**others) -> Rollouts:
        made.append(Rollouts(production, worker=AtOnce(), **others))
        return made[-1]

    yield open_
    for one in made:
        one.held.close()


def ended(reason="stop", tokens=3, prompt=5, first=7) -> Completion:
    error = ValueError("broken") if reason == "error" else None
    return Completion(
        tuple(NewToken(first, -1.0) for _ in range(tokens)), reason, error, prompt, 0, 0.0, 0.0, 1.0
    )


def ask(rollouts: Rollouts, id: str, user: str | None, reason="stop", prompt=None, text="yes", shadow="no"):
    """One request: routed, answered, and by the shadow too if there is one."""
    source = rollouts.registry.resolve("support")
    given = rollouts.route(id, "support", user, source, prompt)
    given.running += given.shadow is not None
    for is_shadow, said in [(False, text)] + [(True, shadow)] * (given.shadow is not None):
        gather = rollouts.gathering(given, 1, is_shadow)
        gather(0, said)
        gather(0, ended("stop" if is_shadow else reason))
    return given


def play(rollouts: Rollouts, control: float, candidate: float, most=2000, seed=0, first=0) -> int:
    """Users who ask and say what they think, until the trial is over; how many asked."""
    chance, trial = np.random.default_rng(seed), rollouts.records[ALIAS].trial
    for n in range(first, first + most):
        if trial.is_over:
            return n - first
        given = ask(rollouts, f"a{n}", f"user-{n}")
        rollouts.feedback(
            f"a{n}", float(chance.random() < (candidate if given.arm == CANDIDATE else control))
        )
    return most


def test_a_worse_version_is_rolled_back_by_itself_and_production_stays(production, opened):
    rollouts = opened()
    rollouts.start(ALIAS, 2, author="ann", note="cheaper")
    assert production.aliases("support") == {ALIAS: 1, HELPER: 2}
    asked = play(rollouts, 0.9, 0.2)
    assert asked < 400 and production.aliases("support") == {ALIAS: 1}
    last = production.history(HELPER)[-1]
    assert (last.kind, last.author) == ("remove", "rollout")
    assert "roll back: the candidate is worse: evidence of" in last.note and "support@v2 mean 0." in last.note
    assert ask(rollouts, "later", "user-1").label == "support@v1"


def test_a_better_version_is_promoted_by_itself_in_one_step(production, opened):
    rollouts = opened()
    rollouts.start(ALIAS, 2)
    play(rollouts, 0.3, 0.95)
    assert production.aliases("support") == {ALIAS: 2}
    move = production.history(ALIAS)[-1]
    assert (move.kind, move.number, move.author) == ("set", 2, "rollout") and "promote" in move.note
    assert production.rollback(ALIAS).number == 1


def test_equal_versions_end_at_the_limit_and_control_stays(production, opened):
    rollouts = opened()
    rollouts.start(ALIAS, 2, most=60)
    play(rollouts, 0.8, 0.8)
    assert rollouts.records[ALIAS].trial.verdict == "no decision"
    assert production.aliases("support") == {ALIAS: 1}


@pytest.mark.parametrize("reason", ["error", "timeout"])
def test_a_candidate_that_fails_is_rolled_back_without_any_feedback_on_it(production, opened, reason):
    rollouts = opened()
    rollouts.start(ALIAS, 2)
    for n in range(400):
        is_candidate = rollouts.records[ALIAS].trial.route(f"user-{n}")[0] == CANDIDATE
        given = ask(rollouts, f"a{n}", f"user-{n}", reason if is_candidate else "stop")
        if given.arm == CONTROL and given.record:
            rollouts.feedback(f"a{n}", 1.0)
    assert rollouts.records[ALIAS].trial.verdict == "roll back" and production.aliases("support") == {
        ALIAS: 1
    }
    by = {
        line["by"]
        for line in read_log(log_of(production.root, ALIAS))
        if line.get("arm") == CANDIDATE and "by" in line
    }
    assert by == {"error"}


def test_who_hangs_up_says_nothing_of_the_version(opened):
    rollouts = opened()
    rollouts.start(ALIAS, 2)
    for n in range(100):
        ask(rollouts, f"a{n}", f"user-{n}", "cancelled")
    assert not rollouts.records[ALIAS].trial.scores


def test_feedback_is_taken_once_and_only_for_answers_that_are_known(opened):
    rollouts = opened(remember=10)
    rollouts.start(ALIAS, 2)
    for n in range(12):
        ask(rollouts, f"a{n}", None)
    assert rollouts.feedback("a11", 1) is True
    with pytest.raises(AlreadyScored):
        rollouts.feedback("a11", 0)
    for unknown in ("a0", "a1", "invented"):
        with pytest.raises(UnknownAnswer, match="the last 10 are"):
            rollouts.feedback(unknown, 1)
    with pytest.raises(ValueError, match="must be a number from 0"):
        rollouts.feedback("a10", 2)
    assert rollouts.feedback("a10", 0.5) is True


def test_only_the_first_score_of_a_user_counts(opened):
    rollouts = opened()
    rollouts.start(ALIAS, 2)
    ask(rollouts, "a", "ann"), ask(rollouts, "b", "ann")
    assert rollouts.feedback("a", 1) is True and rollouts.feedback("b", 1) is False


def test_feedback_outside_a_trial_is_taken_and_counts_nowhere(opened):
    rollouts = opened()
    ask(rollouts, "a", "ann")
    assert rollouts.feedback("a", 1) is False
    with pytest.raises(AlreadyScored):
        rollouts.feedback("a", 1)


@pytest.mark.parametrize("model", ["support@v1", "support@v2"])
def test_who_names_a_version_gets_it(production, opened, model):
    rollouts = opened()
    rollouts.start(ALIAS, 2, share=0.5)
    given = [rollouts.route(str(n), model, f"user-{n}", production.resolve(model), None) for n in range(20)]
    assert {one.label for one in given} == {model} and not any(one.record for one in given)


def test_people_who_move_an_alias_end_the_trial_at_once(production, opened):
    rollouts = opened()
    rollouts.start(ALIAS, 2)
    production.remove_alias(HELPER, "ann", "stop it")
    labels = {ask(rollouts, f"a{n}", f"user-{n}").label for n in range(50)}
    assert labels == {"support@v1"} and rollouts.records[ALIAS].trial.verdict == "overtaken"
    rollouts.start(ALIAS, 2)
    production.set_alias(ALIAS, 2, "ann")
    assert ask(rollouts, "b", "ann").label == "support@v2"
    assert "points to v2, and not to v1" in rollouts.records[ALIAS].trial.reason
    assert production.aliases("support") == {ALIAS: 2}


def test_a_verdict_does_not_move_what_people_have_moved_meanwhile(production, opened, monkeypatch):
    rollouts = opened()
    rollouts.start(ALIAS, 2)
    third = production.publish("support", production.resolve("sales@v1").path, "ann").number
    real = trial_aliases.carry_out

    def too_late(registry, trial):
        registry.set_alias(ALIAS, third, "ann")
        return real(registry, trial)

    monkeypatch.setattr(trial_aliases, "carry_out", too_late)
    play(rollouts, 0.3, 0.95)
    assert rollouts.records[ALIAS].trial.verdict == "promote" and production.aliases("support") == {
        ALIAS: third
    }


def test_a_registry_that_is_locked_at_the_verdict_is_moved_by_a_later_request(
    production, opened, monkeypatch
):
    rollouts = opened()
    rollouts.start(ALIAS, 2)

    def locked(*arguments):
        raise InUse("locked")

    with monkeypatch.context() as patch:
        patch.setattr(trial_aliases, "carry_out", locked)
        play(rollouts, 0.9, 0.2)
    assert production.aliases("support") == {ALIAS: 1, HELPER: 2}
    assert ask(rollouts, "next", "user-1").label == "support@v1"
    assert production.aliases("support") == {ALIAS: 1}


def test_a_score_that_cannot_be_written_changes_nothing(opened, monkeypatch):
    rollouts = opened()
    rollouts.start(ALIAS, 2)
    ask(rollouts, "a", "ann")

    def full(*arguments, **others):
        raise CannotWrite("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(trial_record, "append", full)
        with pytest.raises(CannotWrite):
            rollouts.feedback("a", 1)
        ask(rollouts, "b", "bob")  # answered all the same
    assert not rollouts.records[ALIAS].trial.scores and rollouts.feedback("a", 1) is True


def judge(prompt: str, answer: str) -> float | None:
    return None if prompt == "?" else float(answer == "yes")


def test_a_shadow_is_never_sent_and_its_pairs_decide(production, opened):
    rollouts = opened(judge=judge)
    rollouts.start(ALIAS, 2, mode="shadow", share=0.5)
    given = [ask(rollouts, f"a{n}", f"user-{n}", prompt="2+2?") for n in range(60)]
    assert {one.label for one in given} == {"support@v1"}
    assert {one.shadow for one in given[:10]} == {None, "support@v2"}
    assert rollouts.records[ALIAS].trial.verdict == "roll back" and production.aliases("support") == {
        ALIAS: 1
    }


def test_pairs_that_the_judge_cannot_score_say_nothing_and_one_that_fails_harms_nobody(opened, caplog):
    rollouts = opened(judge=judge)
    rollouts.start(ALIAS, 2, mode="shadow", share=1.0)
    ask(rollouts, "a", "ann", prompt="?")
    rollouts.judge = lambda prompt, answer: 1 / 0
    ask(rollouts, "b", "bob", prompt="2+2?")
    rollouts.judge = lambda prompt, answer: math.nan
    ask(rollouts, "c", "cyd", prompt="2+2?")
    assert not rollouts.records[ALIAS].trial.scores and "ZeroDivisionError" in caplog.text


def test_a_judge_scores_answers_of_a_split_trial_too(opened):
    rollouts = opened(judge=judge)
    rollouts.start(ALIAS, 2)
    ask(rollouts, "a", "ann", prompt="2+2?", text="no")
    assert sum(rollouts.records[ALIAS].trial.scores.values()) == 1
    with pytest.raises(AlreadyScored):
        rollouts.feedback("a", 1)


@pytest.mark.parametrize(
    "others, error, message",
    [
        ({"alias": "support"}, ValueError, "is not an alias"),
        ({"alias": "support@staging"}, UnknownAdapter, "staging"),
        ({"candidate": 9}, UnknownAdapter, "v9"),
        ({"candidate": 1}, ValueError, "both v1"),
        ({"mode": "shadow"}, ValueError, "give Rollouts a judge"),
        ({"sahre": 0.2}, TypeError, "sahre"),
    ],
)
def test_a_trial_that_cannot_be_is_refused_and_leaves_nothing(production, opened, others, error, message):
    with pytest.raises(error, match=message):
        opened().start(**{"alias": ALIAS, "candidate": 2} | others)
    assert production.aliases("support") == {ALIAS: 1} and not read_log(log_of(production.root, ALIAS))


def test_a_second_trial_waits_for_the_first_and_another_process_for_the_server(production, opened):
    rollouts = opened()
    rollouts.start(ALIAS, 2)
    with pytest.raises(ValueError, match="support@production#1 is running"):
        rollouts.start(ALIAS, 2)
    with pytest.raises(InUse, match="leads the trials"):
        opened()
    rollouts.close()
    assert opened().records[ALIAS].trial.name == "support@production#1"


def test_a_killed_server_goes_on_where_it_was_whatever_line_was_the_last(production, opened):
    """Cut the record after every line, and within one: the trial is made anew, and ends as it would have."""
    rollouts = opened()
    rollouts.start(ALIAS, 2)
    play(rollouts, 0.9, 0.2)
    whole = rollouts.records[ALIAS].trial
    rollouts.close()
    path = log_of(production.root, ALIAS)
    lines = path.read_bytes().splitlines(keepends=True)
    for cut in {1, 2, 3, len(lines) // 2, len(lines) - 2, len(lines) - 1, len(lines)}:
        path.write_bytes(b"".join(lines[:cut]) + b'{"kind": "score", "tri')
        production.set_alias(HELPER, 2, "rollout")  # as it was before the verdict
        with pytest.warns(UserWarning, match="cut off"):
            again = opened()
        trial = again.records[ALIAS].trial
        kinds = [json.loads(line)["kind"] for line in lines[:cut]]
        assert trial.scores.total() == kinds.count("score") and trial.answers.total() == kinds.count("answer")
        known = {id for id, given in again.known.items() if not given.is_scored}
        assert len(known) == kinds.count("answer") - kinds.count("score")
        if trial.is_over:
            assert (trial.verdict, trial.reason, trial.numbers()) == (
                whole.verdict,
                whole.reason,
                whole.numbers(),
            )
            settled = [line["kind"] for line in read_log(path)].count("settled")
            assert settled == 1 and HELPER not in production.aliases("support")
        again.close()


def test_a_start_that_is_cut_off_leaves_no_alias_whether_killed_or_failed(production, opened, monkeypatch):
    production.set_alias("support@blue-candidate", 2, "ann")
    rollouts, begin = opened(), trial_record.TrialRecord.begin
    for error in (CannotWrite("no space"), KeyboardInterrupt()):
        monkeypatch.setattr(trial_record.TrialRecord, "begin", lambda *_, error=error: raise_(error))
        with pytest.raises(type(error)):
            rollouts.start(ALIAS, 2)
        assert HELPER not in production.aliases()
    production.set_alias(HELPER, 2, trial_aliases.ACTOR)  # and there a kill comes
    rollouts.close()
    again = opened()
    assert production.aliases() == {ALIAS: 1, "support@blue-candidate": 2}, "what people named stays"
    assert production.history(HELPER)[-1].note == "its trial did not begin"
    monkeypatch.setattr(trial_record.TrialRecord, "begin", begin)
    again.start(ALIAS, 2)
    again.held.close()
    opened()
    assert production.aliases()[HELPER] == 2, "a trial that runs keeps its own"


def raise_(error):
    raise error


def test_a_damaged_record_is_an_error_that_names_the_file(production, opened):
    opened().start(ALIAS, 2)
    path = log_of(production.root, ALIAS)
    path.write_bytes(b"{broken\n" + path.read_bytes())
    with pytest.raises(ValueError, match="support@production.jsonl"):
        Rollouts(production, worker=AtOnce())


def test_what_served_a_user_and_why_can_be_read_later(production, opened):
    rollouts = opened()
    rollouts.start(ALIAS, 2, author="ann", note="cheaper")
    play(rollouts, 0.9, 0.2)
    number = next(n for n in range(100) if rollouts.known[f"a{n}"].arm == CANDIDATE)
    story = explain(production.root, f"a{number}")
    assert f"a{number}: support@v2 wrote it (stop)" in story and "is below the share 0.2" in story
    assert "v2 against v1 of support@production, split" in story and "by ann: cheaper" in story
    assert "by feedback, counted" in story and "roll back: the candidate is worse" in story
    [line] = answers_of(production.root, f"user-{number}")
    assert (line["answer"], line["version"]) == (f"a{number}", "support@v2")
    assert f"user-{number}" not in log_of(production.root, ALIAS).read_text()
    with pytest.raises(LookupError, match="no trial gave an answer"):
        explain(production.root, "invented")


def test_the_registry_s_command_says_why(production, opened, capsys):
    rollouts = opened()
    rollouts.start(ALIAS, 2)
    ask(rollouts, "a1", "ann")

    def said(*arguments: str) -> tuple[int, str]:
        status = main(["--registry", str(production.root), "why", *arguments])
        return status, "".join(capsys.readouterr())

    label = rollouts.known["a1"].label
    assert said("a1") == (0, explain(production.root, "a1") + "\n") and f"{label} wrote it" in said("a1")[1]
    assert f"a1 {label}: support@production#1: the user's place" in said("--user", "ann")[1]
    assert said("--user", "bob") == (0, "no trial gave an answer to bob\n")
    assert said("invented")[0] == 3


def test_how_trials_stand_is_json(opened):
    rollouts = opened()
    rollouts.start(ALIAS, 2)
    play(rollouts, 0.9, 0.9, most=30)
    state = json.loads(json.dumps(rollouts.as_json()))
    [trial] = state["data"]
    assert (trial["trial"], trial["verdict"], sum(trial["answers"].values())) == (
        "support@production#1",
        "",
        30,
    )


def test_drift_of_a_version_goes_on_record_and_moves_nothing(production, opened):
    rollouts = opened()
    chance = np.random.default_rng(0)

    def some(mean: float, number: int) -> None:
        for _ in range(number):
            given = rollouts.route("a", "support", None, production.resolve("support"), None)
            prompt, tokens = 1 + int(chance.poisson(mean)), 1 + int(chance.poisson(20))
            rollouts.gathering(given, 1)(
                0, ended(tokens=tokens, prompt=prompt, first=int(chance.integers(5)))
            )

    some(40, 400)
    assert not rollouts.alarms
    some(60, 200)
    assert {alarm["feature"] for alarm in rollouts.alarms} == {"prompt_tokens"}
    [line] = read_log(production.root / "rollouts" / "drift.jsonl")
    assert line["version"] == "support@v1" and line["psi"] > line["threshold"]
    assert production.aliases("support") == {ALIAS: 1}


def chosen(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_trial_options(parser)
    return parser.parse_args(arguments)


def test_a_server_that_is_started_again_does_not_bring_back_what_was_rolled_back(production):
    options = chosen("--candidate", "support@v2", "--share", "0.3")
    rollouts = rollouts_of(production, options)
    assert rollouts.records[ALIAS].trial.plan.share == 0.3
    rollouts.close()
    again = rollouts_of(production, options)
    again.worker = AtOnce()
    assert (
        again.records[ALIAS].trial.name == "support@production#1" and not again.records[ALIAS].trial.is_over
    )
    play(again, 0.9, 0.1)
    again.held.close()
    last = rollouts_of(production, options)
    assert last.records[ALIAS].trial.verdict == "roll back" and production.aliases("support") == {ALIAS: 1}
    last.close()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--candidate", "support"], "is not a version"),
        (["--candidate", "support@v9"], "--candidate support@v9: .*v9"),
        (["--candidate", "other@v1"], "--candidate other@v1: "),
        (["--candidate", "support@v2", "--shadow"], "give Rollouts a judge"),
        (["--candidate", "support@v2", "--share", "2"], "share=2.0 must be"),
    ],
)
def test_options_of_a_trial_that_cannot_be_are_errors(production, arguments, message):
    with pytest.raises(ValueError, match=message):
        rollouts_of(production, chosen(*arguments))
    with pytest.raises(ValueError, match="are for versions of a --registry"):
        rollouts_of(None, chosen(*arguments))


def test_a_file_of_right_answers_judges_the_prompts_that_it_has(tmp_path):
    path = tmp_path / "gold.jsonl"
    path.write_text('{"prompt": "2+2?", "completion": " 4\\n"}\n')
    judge = GoldJudge.read(path)
    assert (judge("2+2?", "4"), judge("2+2?", "5"), judge("3+3?", "6")) == (1.0, 0.0, None)
    path.write_text('{"prompt": "2+2?", "completion": 4}\n')
    with pytest.raises(ValueError, match="line 1: give the texts"):
        GoldJudge.read(path)
