"""The protocol: which jobs of a plan can be named by now, as what has been done of it stands.

A searched genotype has a name once its search has ended, a random one of a given size once the search has that it takes
the size from; the final training is for the best of a group, which the short training must have ended to tell.
"""

import genotypes
import measure
import utils
from experiments import jobs, plan

_TRIES = 10_000  # random genotypes of which one should have the wanted number of parameters


def find_genotype(the_plan, candidate, folder):
    """The genotype of a candidate, and how --arch names it; None while it depends on a search that has not ended.

    A random one is named by its file, once `keep_genotypes` has written it.
    """
    if candidate.kind == "named":
        return genotypes.NAMED[candidate.name], candidate.name
    if candidate.kind == "searched":
        job = the_plan.searches[candidate.name]
        if jobs.look(job, folder).status != "finished":
            return None
        return genotypes.parse(folder / job.name), folder / job.name
    wanted = None
    if candidate.budget:
        budget = next(other for other in the_plan.candidates if other.name == candidate.budget)
        found = find_genotype(the_plan, budget, folder)
        if found is None:
            return None
        wanted = found[0]
    genotype = draw(candidate, wanted, the_plan.network)
    path = _file(candidate, folder)
    return genotype, path if _holds(path, genotype) else genotypes.format(genotype)


def find_genotypes(the_plan, folder):
    """`find_genotype` of every candidate, as a dict."""
    return {candidate: find_genotype(the_plan, candidate, folder) for candidate in the_plan.candidates}


def keep_genotypes(the_plan, folder):
    """Write the random genotypes that are known by now to the experiment's folder."""
    for candidate in the_plan.candidates:
        found = find_genotype(the_plan, candidate, folder) if candidate.kind == "random" else None
        path = _file(candidate, folder)
        if found and not _holds(path, found[0]):
            path.parent.mkdir(exist_ok=True)
            utils.write_text(path, genotypes.to_json(found[0]))


def _file(candidate, folder):
    return folder / "genotypes" / f"{candidate.name}.json"


def _holds(path, genotype):
    try:
        return path.read_text() == genotypes.to_json(genotype)
    except OSError:
        return False


def same_cells(found):
    """A sentence that names the candidates that have one genotype, or None.

    Args:
        found: as of `find_genotypes`.
    """
    names = {}
    for candidate, known in found.items():
        if known:
            names.setdefault(genotypes.format(known[0]), []).append(candidate.name)
    same = [" = ".join(of) for of in names.values() if len(of) > 1]
    return f"One genotype under two names, so that these are not independent: {', '.join(same)}." if same else None


def draw(candidate, like, network):
    """A random genotype; where another one is given, the first that has about as many parameters in that network.

    Raises:
        UserError: ten thousand have not.
    """
    primitives = genotypes.SEARCH_SPACES[candidate.search_space]
    if like is None:
        return genotypes.sample(primitives, candidate.seed)
    wanted = measure.parameters(like, network)
    for k in range(_TRIES):
        genotype = genotypes.sample(primitives, candidate.seed + k * 10**6)
        if abs(measure.parameters(genotype, network) - wanted) <= candidate.tolerance * wanted:
            return genotype
    raise utils.UserError(
        f"[random.{candidate.group}]: none of {_TRIES} random genotypes has within {candidate.tolerance:.0%} of the "
        f"{wanted} parameters of {candidate.budget}: a larger tolerance"
    )


def known_jobs(the_plan, folder):
    """The jobs that can be named by now, in the order of their stages; more of them as searches and rankings end."""
    found = find_genotypes(the_plan, folder)
    short = {c: list(the_plan.training("short", c, arch[1])) for c, arch in found.items() if arch}
    result = [*the_plan.searches.values(), *(job for of in short.values() for job in of)]
    for group in dict.fromkeys(c.group for c in the_plan.candidates):
        for candidate in chosen(the_plan, group, short, folder):
            result += the_plan.training("final", candidate, found[candidate][1])
    return result


def chosen(the_plan, group, short, folder):
    """The candidates of a group that the final training is for: the best of the short one, once all of it has ended.

    Those that a diverged or failed search leaves out are not waited for. Published genotypes are not chosen among.
    """
    ranked = []
    for candidate in (c for c in the_plan.candidates if c.group == group):
        source = the_plan.source(candidate)
        if candidate not in short and jobs.look(source, folder).status in ("diverged", "failed"):
            continue
        states = [jobs.look(job, folder) for job in short.get(candidate, ())]
        if not states or any(state.status not in jobs.ENDED for state in states):
            return []
        if all(state.status == "finished" for state in states):
            ranked.append((sum(state.value("valid_acc") for state in states) / len(states), candidate))
    ranked.sort(key=lambda pair: -pair[0])
    return [candidate for _, candidate in ranked[: None if group == plan.NAMED else the_plan.best]]
