"""Documents of strangers are read, or refused by a ValueError."""

from __future__ import annotations

import pytest

from ip_adapter_trainer.storage.documents import yaml_of


@pytest.mark.parametrize(
    "value", ["!!int ''", "!!float", "!!timestamp x", "!!bool x", "!!binary 3", "!!set [1]", "!!python/name:os.system"]
)
def test_a_tag_whose_value_does_not_fit_is_refused(value: str) -> None:
    with pytest.raises(ValueError):
        yaml_of(f"a: {value}")
