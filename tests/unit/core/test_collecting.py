import gc

from splitserve.core.collecting import rarely_collecting


def test_garbage_is_looked_for_rarely_meanwhile_and_as_before_afterwards() -> None:
    usual, frozen = gc.get_threshold(), gc.get_freeze_count()
    with rarely_collecting():
        assert gc.get_threshold() > usual
        assert gc.get_freeze_count() > frozen
    assert (gc.get_threshold(), gc.get_freeze_count()) == (usual, frozen)


def test_what_the_process_had_frozen_itself_stays_frozen() -> None:
    gc.freeze()
    try:
        with rarely_collecting():
            pass
        assert gc.get_freeze_count() > 0
    finally:
        gc.unfreeze()
