"""Random genotypes of a given size; what is done when is tested with the command, in test_experiment.py."""

import pytest

import genotypes
import measure
import train
import utils
from experiments import plan, protocol


def test_a_random_genotype_of_given_size(monkeypatch):
    network = train.parse_args(["--layers", "3", "--init_channels", "4"])
    candidate = plan.Candidate("equal-7", "equal", "random", 7, "involution", "second-0", 0.02)
    wanted = measure.parameters(genotypes.DARTS, network)
    genotype = protocol.draw(candidate, genotypes.DARTS, network)
    assert abs(measure.parameters(genotype, network) - wanted) <= 0.02 * wanted
    assert genotype == protocol.draw(candidate, genotypes.DARTS, network)
    assert genotype != protocol.draw(candidate._replace(seed=8), genotypes.DARTS, network)
    monkeypatch.setattr(protocol, "_TRIES", 3)
    with pytest.raises(utils.UserError, match="none of 3 random genotypes has within 2% of the .* of second-0"):
        protocol.draw(candidate, genotypes.DARTS_V2, network)
