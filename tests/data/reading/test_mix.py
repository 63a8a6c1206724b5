from collections import Counter

import pytest

from diffalign.config.schema import DataConfig
from diffalign.data import encode_preferences, read_preferences
from diffalign.errors import UserError
from tests.data.conftest import Model, row, write_parquet


@pytest.fixture
def sets(tmp_path):
    first = write_parquet(tmp_path / "first.parquet", [row(number) for number in range(4)])
    second = write_parquet(tmp_path / "second.parquet", [row(number) for number in range(10, 50)])
    return str(first), str(second)


def test_a_weight_is_the_visits_of_a_row_in_an_epoch(sets, tmp_path):
    first, second = sets
    config = DataConfig(path=first, mix=(f"{second}=2.5", f"{first}=1"), resolution=16)
    model = Model()
    encoded = encode_preferences(model, read_preferences(config), config, tmp_path / "c", False)
    visits = Counter(record.where for record in encoded)
    assert {visits[f"first.parquet row {number}"] for number in range(4)} == {2}  # once of each mention
    counts = Counter(visits[f"second.parquet row {number}"] for number in range(40))
    assert set(counts) == {2, 3} and 10 <= counts[3] <= 30  # 20 expected
    assert model.images == 2 * 44 and encoded.counts.usable == len(encoded) == visits.total()
    again = Model()
    assert list(encode_preferences(again, read_preferences(config), config, tmp_path / "c", False)) == list(
        encoded
    )
    assert not again.batches


def test_less_than_one_takes_a_share_that_the_seed_draws(sets):
    first, second = sets
    config = DataConfig(path=first, mix=(f"{second}=0.5",), resolution=16)
    taken = [[example.where for example in read_preferences(config, seed)] for seed in (0, 0, 1)]
    assert taken[0] == taken[1] != taken[2] and 4 + 10 <= len(taken[0]) <= 4 + 30


@pytest.mark.parametrize("entry", ["second.parquet", "a=", "=2", "a=0", "a=-1", "a=nan", "a=inf"])
def test_entries_that_are_no_path_with_a_weight(sets, entry):
    with pytest.raises(UserError, match=r"data.mix: .*allowed: PATH=WEIGHT"):
        read_preferences(DataConfig(path=sets[0], mix=(entry,)))
