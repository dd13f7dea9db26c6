"""What a trial does to the aliases of a registry, in the name of `rollout`."""

from labkit.serving import lookup, moves
from labkit.serving.naming import UnknownAdapter, read_alias
from labkit.serving.registry import Registry
from labkit.serving.sequential import PROMOTE
from labkit.serving.trial import Trial, TrialPlan

ACTOR = "rollout"


def candidate_alias(alias: str) -> str:
    """The alias that points to the candidate while a trial of `alias` runs; it also keeps it from being deleted.

    >>> candidate_alias("support@production")
    'support@production-candidate'
    """
    return f"{alias}-candidate"


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
