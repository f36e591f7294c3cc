"""Schemas of the nodes: tooltips, validation of linked inputs, and fingerprints of files."""

import os

import pytest

from autorefiner.nodes.hosts import standalone
from autorefiner.nodes.load import LoadARVDM
from autorefiner.nodes.refiner import LoadRefiner
from autorefiner.nodes.registry import NODES

SCHEMAS = [kind.define_schema() for kind in NODES]


def test_every_input_of_every_node_has_a_tooltip_and_every_execute_is_short() -> None:
    import inspect

    for kind in NODES:
        schema = kind.define_schema()
        assert schema.description and schema.category == "AutoRefiner"
        assert all(socket.tooltip for socket in schema.inputs)
        assert len(inspect.getsource(kind.execute).splitlines()) <= 40


SOUGHT = {
    "wan": "AutoRefinerSampler",
    "long video": "AutoRefinerSampler",
    "extend": "AutoRefinerSampler",
    "i2v": "AutoRefinerSampler",
    "image to video": "AutoRefinerSampler",
    "video to video": "AutoRefinerSampler",
    "v2v": "AutoRefinerSampler",
    "reroll": "AutoRefinerSampler",
    "live preview": "AutoRefinerSampler",
    "krea": "AutoRefinerLoadARVDM",
    "self forcing": "AutoRefinerLoadARVDM",
    "causvid": "AutoRefinerLoadARVDM",
    "longlive": "AutoRefinerLoadARVDM",
    "best of n": "AutoRefinerSearch",
    "prompt travel": "AutoRefinerPromptTimeline",
    "before after": "AutoRefinerCompareVideos",
}


@pytest.mark.parametrize("words", SOUGHT)
def test_the_search_for_nodes_knows_what_people_type(words: str) -> None:
    schema = next(schema for schema in SCHEMAS if schema.node_id == SOUGHT[words])
    terms = (schema.display_name, *schema.search_aliases)
    assert any(words in term.lower() for term in terms)


def test_no_two_nodes_have_names_that_differ_by_case_only() -> None:
    names = [schema.display_name.lower() for schema in SCHEMAS]
    assert len(set(names)) == len(names)


def test_what_is_linked_is_not_looked_at_before_it_is_known() -> None:
    """ComfyUI validates prompts with None for every linked input, or (None,) for list inputs."""
    import inspect

    for kind in NODES:
        if (validate := getattr(kind, "validate_inputs", None)) is not None:
            link = (None,) if kind.define_schema().is_input_list else None
            result = validate(**dict.fromkeys(inspect.signature(validate).parameters, link))
            assert result is True, f"{kind.__name__}: {result}"
    one, other = (
        LoadRefiner.fingerprint_inputs(file=None, model=None, strength=by, form="auto")
        for by in (1.0, 0.5)
    )
    assert (
        one
        == LoadRefiner.fingerprint_inputs(file=None, model=None, strength=1.0, form="auto")
        != other
    )


def test_a_model_that_took_the_place_of_another_is_read_again(tmp_path, monkeypatch) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(b"one")
    monkeypatch.setattr(standalone, "find_file", lambda folder, name: path)
    inputs = {"file": "model.pt", "preset": "auto", "dtype": "auto", "weights": "auto"}
    first = LoadARVDM.fingerprint_inputs(**inputs)
    assert LoadARVDM.fingerprint_inputs(**inputs) == first
    assert LoadARVDM.fingerprint_inputs(**inputs | {"weights": "raw"}) != first
    os.utime(path, (1, 1))
    assert LoadARVDM.fingerprint_inputs(**inputs) != first
    assert LoadARVDM.fingerprint_inputs(**inputs | {"file": None}) != first
