"""What the server holds of runs: latest by node and page, bounded; notices and endings of nodes."""

import pytest

from autorefiner.nodes.run_states import (
    MOST_ASKED,
    MOST_NOTICES,
    MOST_PICTURES,
    NodeTexts,
    RunState,
    RunStates,
    stopped_text,
)

IMAGE = "/9j/" + 4000 * "A"


def started(states: RunStates, node: str = "3", prompt: str = "a", **origin: object) -> RunState:
    """Begin a run that has one finished chunk of 7."""
    run = RunState(node, prompt, **{"workflow": "w", "client": "one", **origin})
    states.update(run, {"chunks": 7, "frames": 81, "elapsed": 0.5})
    states.update(run, tile(0, elapsed=2.0))
    return run


def tile(chunk: int, level: int = 4, **facts: object) -> dict:
    return {"chunk": chunk, "level": level, "levels": 4, "image": IMAGE, "pictures": 2, **facts}


def test_a_run_is_found_as_its_events_left_it() -> None:
    states = RunStates()
    run = started(states)
    event = states.update(run, {"chunk": 1, "level": 1, "levels": 4, "elapsed": 3.0})
    assert (event["status"], event["workflow"], event["run"]) == ("running", "w", run.number)
    states.update(run, {"status": "failed"})
    shown = states.find("w", ["3", "4"])["3"]
    assert (shown["status"], shown["elapsed"], shown["frames"]) == ("failed", 3.0, 81)
    assert shown["sequence"] == 4 and "4" not in states.find("w", ["3", "4"])
    assert [(each["chunk"], each["level"]) for each in shown["tiles"]] == [(0, 4), (1, 1)]
    assert shown["tiles"][0]["image"] == IMAGE and "elapsed" not in shown["tiles"][0]


def test_a_chunk_keeps_its_picture_until_it_has_a_newer_one() -> None:
    run = started(RunStates())
    run.event({"chunk": 0, "level": 4, "levels": 4})
    assert run.tiles[0]["image"] == IMAGE
    run.event(tile(0) | {"image": "/9j/new"})
    assert run.tiles[0]["image"] == "/9j/new"


def test_a_page_gets_its_own_run_and_another_page_the_latest() -> None:
    states = RunStates()
    started(states, prompt="a", client="one")
    started(states, prompt="b", client="two")
    started(states, prompt="c", client="two", workflow="other")

    def prompt(client: str | None) -> object:
        return states.find("w", ["3"], client)["3"]["prompt"]

    assert [prompt(client) for client in ("one", "two", "three", None)] == ["a", "b", "b", "b"]
    started(states, prompt="d", client="one")
    assert [prompt(client) for client in ("one", "two", "three")] == ["d", "b", "d"]


def test_runs_are_bounded_by_number_and_bytes_oldest_first() -> None:
    states = RunStates(most_runs=3)
    for node in "12345":
        started(states, node)
    assert sorted(states.find("w", list("12345"))) == ["3", "4", "5"]
    one = states.nbytes // 3
    states = RunStates(most_bytes=2 * one + one // 2)
    runs = [started(states, node) for node in "12345"]
    assert sorted(states.find("w", list("12345"))) == ["4", "5"]
    states.update(runs[3], tile(1))  # the older one grows, and is the newest now
    assert sorted(states.find("w", list("12345"))) == ["4"]
    assert states.nbytes <= states.most_bytes


def test_a_long_run_keeps_chunks_and_drops_every_second_picture() -> None:
    states = RunStates()
    run = started(states)
    for chunk in range(1000):
        states.update(run, tile(chunk))
    tiles = states.find("w", ["3"])["3"]["tiles"]
    pictured = [each["chunk"] for each in tiles if "image" in each]
    assert len(tiles) == 1000 and len(pictured) * len(IMAGE) <= MOST_PICTURES
    assert len(pictured) > 100 and pictured[:2] == [0, run.step]


def test_a_run_of_no_workflow_is_not_held() -> None:
    states = RunStates()
    run = started(states, workflow=None)
    assert len(states) == 0 and states.update(run, {"elapsed": 1.0})["sequence"] == 3


@pytest.mark.parametrize(
    "request_",
    [None, [], {"workflow": "w"}, {"workflow": 1, "nodes": []}, {"workflow": "w", "nodes": [3]},
     {"workflow": "w", "nodes": ["3"] * (MOST_ASKED + 1)}, {"workflow": "w", "nodes": "3"}],
)  # fmt: skip
def test_what_no_page_asks_is_refused(request_: object) -> None:
    with pytest.raises(ValueError, match="workflow"):
        RunStates().answer(request_)


def test_an_answer_holds_runs_by_node() -> None:
    states = RunStates()
    started(states)
    assert states.answer({"workflow": "w", "nodes": ["3"], "client": 7})["runs"].keys() == {"3"}
    assert states.answer({"workflow": "v", "nodes": ["3"]}) == {"runs": {}}


def test_notices_stay_with_the_text_of_their_node_and_prompt() -> None:
    texts = NodeTexts()
    texts.notice("p", "3", "one")
    texts.show("p", "3", "plan")
    for text in ("two", "one"):
        texts.notice("p", "3", text)
    assert texts.lines("p", "3") == ["one", "two", "plan"]
    assert texts.lines("q", "3") == texts.lines("p", "4") == []
    texts.end("p", "3", stopped_text(3, 7, 33))
    ended = texts.lines("p", "3")
    assert ended[2] == "3 of 7 chunks, 33 frames: stopped" and ended[3].endswith("plan")


def test_a_node_that_runs_again_in_a_prompt_does_not_say_how_it_ended_before() -> None:
    texts = NodeTexts()
    texts.show("a", "3", "9 frames")
    texts.end("a", "3", "stopped")
    assert texts.lines("a", "3") == ["stopped", "planned: 9 frames"]
    texts.show("a", "3", "33 frames")
    assert texts.lines("a", "3") == ["33 frames"]


def test_notices_are_bounded() -> None:
    texts = NodeTexts(most=2)
    for number in range(100):
        texts.notice("p", "3", f"{number} " + 9999 * "x")
    notices = texts.notices("p", "3")
    assert len(notices) == MOST_NOTICES and max(map(len, notices)) <= 600
    texts.end("p", "4", "stopped")
    texts.notice("p", "5", "new")
    assert texts.notices("p", "3") == [] and texts.lines("p", "4") == ["stopped"]
    texts.show("p", "6", "new")
    assert texts.lines("p", "4") == [] and texts.lines("p", "6") == ["new"]
