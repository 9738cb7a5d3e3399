"""The embedded model, fetched once into the user's cache; without it the tests that need it fail, they aren't skipped."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is imported; spinning threads are 20 times slower on busy cores

import pytest

from unstilted.models.resolve import BaseModelFiles, resolve_model
from unstilted.recipe import ModelTable

pytest_plugins = ("vote_fixtures",)


@pytest.fixture(scope="session")
def embedded_model() -> BaseModelFiles:
    return resolve_model(ModelTable())
