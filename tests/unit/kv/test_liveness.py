"""When a peer is asked, probed and called silent. Time is an argument."""

from splitserve.kv.liveness import Health, Liveness, Need


def peer(health: Health = Health.ALIVE) -> Liveness:
    return Liveness(silent_s=5.0, heard_at=0.0, health=health, asked_at=0.0)


def test_a_peer_is_asked_five_times_per_silence_and_no_more() -> None:
    life = peer()
    asked = [tick for tick in range(100) if Need.ASK in life.due(tick * 0.1)]
    assert asked == [10, 20, 30, 40, 50, 60, 70, 80, 90]


def test_a_peer_that_answers_is_never_probed_or_silent() -> None:
    life = peer()
    for second in range(1, 100):
        assert life.due(float(second)) == [Need.ASK]
        assert not life.heard(second + 0.5)


def test_a_question_without_an_answer_leads_to_a_probe_well_before_silence() -> None:
    life = peer()
    assert life.due(1.0) == [Need.ASK]
    assert life.due(2.0) == [Need.ASK, Need.PROBE]
    assert life.health is Health.ALIVE


def test_silence_is_told_once() -> None:
    life = peer()
    told = [second for second in range(1, 30) if Need.FELL_SILENT in life.due(float(second))]
    assert told == [6]
    assert life.health is Health.SILENT


def test_a_silent_peer_is_still_asked_and_comes_back_with_its_first_word() -> None:
    life = peer()
    for second in range(1, 10):
        life.due(float(second))
    assert Need.ASK in life.due(10.0)
    assert life.heard(10.5)
    assert life.health is Health.ALIVE
    assert not life.heard(10.6)


def test_a_peer_never_met_is_greeted_and_probed_but_never_called_silent() -> None:
    life = peer(Health.GREETING)
    needs = [need for second in range(1, 30) for need in life.due(float(second))]
    assert {Need.ASK, Need.PROBE} == set(needs)


def test_a_refused_peer_is_left_alone() -> None:
    life = peer(Health.REFUSED)
    assert [life.due(float(second)) for second in range(1, 30)] == [[]] * 29
