import gc

import pytest

from splitserve.bench.collecting import rarely_collecting


def test_garbage_is_looked_for_rarely_meanwhile_and_as_before_afterwards() -> None:
    usual = gc.get_threshold(), gc.get_freeze_count()
    with pytest.raises(KeyError), rarely_collecting():
        assert gc.get_threshold() > usual[0]
        assert gc.get_freeze_count() > usual[1]
        raise KeyError("however it ends")
    assert (gc.get_threshold(), gc.get_freeze_count()) == (usual[0], 0)
