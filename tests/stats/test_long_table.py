import pandas as pd
import pytest

from bids_dgmseg.errors import InputError
from bids_dgmseg.stats.long_table import iter_groups, numeric_column

AGES = pd.DataFrame({"participant_id": ["sub-1"], "age": ["30"]})


def test_text_in_numeric_column_is_rejected():
    with pytest.raises(ValueError, match=r"column age holds .*, expected numbers"):
        numeric_column(AGES, "age")


@pytest.mark.parametrize("access", [numeric_column, lambda table, column: list(iter_groups(table, [column]))])
def test_missing_column_is_rejected(access):
    with pytest.raises(InputError, match=r"^group table: no column sex \(columns: participant_id, age\); add it"):
        access(AGES, "sex")
