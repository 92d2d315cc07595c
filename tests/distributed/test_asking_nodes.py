"""Nodes that go, or come, between being listed and being asked."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.exceptions import RayError

from dt_ray.distributed.paths import ask_each_node
from dt_ray.errors import ResourceError


class Nodes:
    """Nodes by name, and whether each sees the file; `happenings` take place one at a time, between list and ask."""

    def __init__(self, sees: dict[str, bool], happenings: list[dict[str, bool | None]] | None = None) -> None:
        self.sees, self.happenings, self.num_asked = dict(sees), list(happenings or []), 0

    def alive(self) -> dict[str, str]:
        return {node: f"address of {node}" for node in self.sees}

    def ask(self, node: str, file: str) -> str:
        self.num_asked += 1
        for name, sees in (self.happenings.pop(0) if self.happenings else {}).items():
            if sees is None:
                self.sees.pop(name, None)
            else:
                self.sees[name] = sees
        return node

    def answer(self, call: str) -> bool:
        if call not in self.sees:
            raise RayError(f"TaskUnschedulableError: {call}")
        return self.sees[call]

    def blind(self) -> tuple[list[str], int]:
        return ask_each_node(Path("/file"), alive=self.alive, ask=self.ask, answer=self.answer)  # type: ignore[arg-type]


def test_a_node_that_goes_before_it_is_asked_is_no_error() -> None:
    assert Nodes({"one": True, "two": True}, [{"two": None}]).blind() == ([], 1)


def test_a_node_that_does_not_see_the_file_is_named_unless_it_has_gone() -> None:
    assert Nodes({"one": True, "two": False}).blind() == (["address of two"], 2)
    assert Nodes({"one": True, "two": False}, [{}, {"two": None}]).blind() == ([], 1)


def test_a_node_that_comes_meanwhile_is_asked_too() -> None:
    assert Nodes({"one": True}, [{"two": False}]).blind() == (["address of two"], 2)


def test_a_node_that_is_there_and_never_answers_is_named() -> None:
    nodes = Nodes({"one": True, "two": True})
    nodes.answer = lambda call: nodes.sees.get(call if call == "one" else "nobody") or _raise(call)
    with pytest.raises(ResourceError, match="no answer from address of two, asked 3 times about /file"):
        nodes.blind()
    assert nodes.num_asked <= 6


def _raise(call: str) -> bool:
    raise RayError(call)


NAMES = st.sampled_from("abcde")


@given(
    sees=st.dictionaries(NAMES, st.booleans(), min_size=1),
    happenings=st.lists(st.dictionaries(NAMES, st.none() | st.booleans(), max_size=3), max_size=6),
)
def test_whatever_comes_and_goes_the_answer_is_about_the_nodes_that_are_there(
    sees: dict[str, bool], happenings: list[dict[str, bool | None]]
) -> None:
    # What a node sees stays as it is while it is there.
    fixed = {name: (name in "abc") for name in "abcde"}
    happenings = [{name: None if seen is None else fixed[name] for name, seen in each.items()} for each in happenings]
    nodes = Nodes({name: fixed[name] for name in sees}, happenings)
    blind, num_nodes = nodes.blind()
    assert blind == sorted(f"address of {name}" for name in nodes.sees if not fixed[name])
    assert num_nodes == len(nodes.sees)
