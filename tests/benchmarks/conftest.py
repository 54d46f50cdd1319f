"""The benchmarks, which are scripts and no modules."""

import runpy

import pytest


@pytest.fixture(scope="module")
def main(request):
    """What a test module's SCRIPT runs; scripts import their neighbours."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(request.module.SCRIPT.parent)
        return runpy.run_path(str(request.module.SCRIPT))["main"]
