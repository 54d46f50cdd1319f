import numpy as np
import pandas as pd
import pytest

from bids_dgmseg.errors import InputError
from bids_dgmseg.stats.long_table import (
    covariate_columns,
    covariate_matrix,
    fit_covariates,
    iter_groups,
    numeric_column,
)

AGES = pd.DataFrame({"participant_id": ["sub-1"], "age": ["30"]})


def test_text_in_numeric_column_is_rejected():
    with pytest.raises(ValueError, match=r"column age holds .*, expected numbers"):
        numeric_column(AGES, "age")


@pytest.mark.parametrize("access", [numeric_column, lambda table, column: list(iter_groups(table, [column]))])
def test_missing_column_is_rejected(access):
    with pytest.raises(InputError, match=r"^group table: no column sex \(columns: participant_id, age\); add it"):
        access(AGES, "sex")


def test_covariates_are_columns_as_in_the_fit():
    table = pd.DataFrame({"age": [40.0, 60, np.nan], "sex": ["F", "M", "M"], "site": ["A", "A", None]})
    expected = [[-10, 0, 0], [10, 1, 0], [np.nan, 1, np.nan]]
    np.testing.assert_array_equal(covariate_matrix(table), expected)
    covariates = fit_covariates(table)
    assert (covariates[0].low, covariates[0].high, covariates[1].levels) == (40, 60, ("F", "M"))
    other = pd.DataFrame({"age": [80.0], "sex": ["O"], "site": ["A"]})
    np.testing.assert_array_equal(covariate_columns(covariates, other), [[30, np.nan, 0]])
    assert covariate_columns((), table).shape == (3, 0)
