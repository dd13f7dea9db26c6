"""What a trial does to the aliases of a registry, in the name of `rollout`."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager

from labkit.serving import lookup, moves
from labkit.serving.naming import UnknownAdapter, read_alias
from labkit.serving.registry import Registry
from labkit.serving.sequential import PROMOTE
from labkit.serving.trial import Trial, TrialPlan

ACTOR, SUFFIX = "rollout", "-candidate"


def candidate_alias(alias: str) -> str:
    """The alias that points to the candidate while a trial of `alias` runs; it also keeps it from being deleted.

    >>> candidate_alias("support@production")
    'support@production-candidate'
    """
    return f"{alias}{SUFFIX}"


@contextmanager
def candidate_pointed(registry: Registry, plan: TrialPlan, note: str) -> Iterator[None]:
    """Let the alias of the candidate point to it; not so if the block, which writes that the trial begins, fails."""
    about = f"a share of {plan.share:g} of {plan.alias}, {plan.mode}. {note}".strip()
    registry.set_alias(candidate_alias(plan.alias), plan.candidate, ACTOR, about)
    try:
        yield
    except BaseException:
        remove_candidates(registry, [candidate_alias(plan.alias)])
        raise


def left_candidates(registry: Registry, led: Collection[str]) -> list[str]:
    """The aliases of candidates of trials that did not begin: a kill came between the alias and the record.

    Args:
        registry: to look in.
        led: the aliases of the trials that run.
    """
    mine = [alias for alias in registry.aliases() if alias.endswith(SUFFIX)]
    return [
        alias
        for alias in mine
        if alias.removesuffix(SUFFIX) not in led and registry.history(alias)[-1].author == ACTOR
    ]


def remove_candidates(registry: Registry, aliases: Collection[str]) -> None:
    """Let these aliases point to nothing."""
    for alias in aliases:
        registry.remove_alias(alias, ACTOR, "its trial did not begin")


def is_candidate(registry: Registry, plan: TrialPlan) -> bool:
    """Does that alias point to the candidate still?"""
    try:
        return registry.resolve(candidate_alias(plan.alias)).number == plan.candidate
    except UnknownAdapter:
        return False


def carry_out(registry: Registry, trial: Trial) -> dict[str, int]:
    """Move the aliases as the verdict says, in one transaction. Nothing is moved twice, or away from where people put it.

    Returns:
        what the aliases of the adapter point to after it.

    Raises:
        labkit.files.InUse, labkit.files.CannotWrite: nothing was moved.
    """
    plan = trial.plan
    production, candidate = read_alias(plan.alias), read_alias(candidate_alias(plan.alias))
    with registry.writing() as db:
        signed = moves.Signed(registry.clock(), ACTOR, f"{trial.name}: {trial.verdict}: {trial.reason}")
        before = lookup.pointing(db, production.name)
        if trial.verdict == PROMOTE and before.get(str(production)) == plan.control:
            moves.put(db, production, plan.candidate, signed, expected=plan.control)
        if before.get(str(candidate)) == plan.candidate:
            moves.remove(db, candidate, signed)
        return lookup.pointing(db, production.name)
