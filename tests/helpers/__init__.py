"""What tests share: toy data and runs, packs by hand, processes, damaged files. `pythonpath` of pytest leads here."""

import pytest

pytest.register_assert_rewrite(
    "helpers.processes", "helpers.runs", "helpers.weights"
)  # an assert of a helper shows its values too
