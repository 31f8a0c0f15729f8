"""Backing off when memory runs out: the number that was too large is halved, and said; nothing else changes."""

import weakref

import pytest
import torch

from modules.diffusion.fit import fit_slots
from modules.errors import OutOfMemory
from tests.diffusion.engine import Engine


def builder(largest_call: int, largest_decode: int, monkeypatch):
    """Engines whose UNet call takes at most so many slots, and whose decoder so many images."""
    built = []

    def build(slots, decode_batch):
        engine = Engine(slots=slots, decode_batch=decode_batch)
        step, decode = engine.slots.in_flight.step, engine.slots.decode

        def limited_step():
            if slots > largest_call:
                raise torch.OutOfMemoryError("CUDA out of memory")
            step()

        def limited_decode(z):
            if len(z) > largest_decode:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return decode(z)

        engine.slots.in_flight.step, engine.slots.decode = limited_step, limited_decode
        built.append((slots, decode_batch))
        engine.slots.owner = engine
        return engine.slots

    return build, built


def test_what_fits_is_taken_as_asked(monkeypatch):
    build, built = builder(8, 8, monkeypatch)
    slots, rows, decode = fit_slots(build, 4, 2)
    assert built == [(4, 2)] and (rows.value, decode.value) == (4, 2)
    assert rows.reason == "generation.slots" and decode.reason == "generation.decode_batch"
    slots.owner.make(3)


def test_each_number_is_halved_on_its_own(monkeypatch):
    build, built = builder(3, 1, monkeypatch)
    slots, rows, decode = fit_slots(build, 8, 2)
    assert built == [(8, 2), (4, 2), (2, 2), (2, 1)]
    assert (rows.value, decode.value) == (2, 1)
    assert "8 ran out of memory" in rows.reason and "2 ran out of memory" in decode.reason
    slots.owner.make(2)


@pytest.mark.parametrize(
    ("call", "decode", "message"), [(0, 8, "one UNet call of a single"), (8, 0, "decode of a single")]
)
def test_what_never_fits_names_the_part_and_the_knobs(call, decode, message, monkeypatch):
    build, _ = builder(call, decode, monkeypatch)
    with pytest.raises(OutOfMemory, match=f"{message}.*pipeline.resolution"):
        fit_slots(build, 2, 2)


@pytest.mark.parametrize("room", [8, 4, 2, 1, 0])
def test_slots_are_halved_twice_for_an_engine_made_faster_then_it_stays_as_it_is(room, monkeypatch):
    """The engine is made faster where it fits, and an attempt that failed is gone before the next is built."""
    build, built = builder(8, 8, monkeypatch)
    attempts = []

    def accelerate(slots):
        assert not [one() for one in attempts if one() is not None], "a failed engine still holds its memory"
        attempts.append(weakref.ref(slots))
        slots.in_flight.step = slots.in_flight.step  # held by what it holds, as a captured tick is
        if len(slots.occupants) > room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        slots.faster = True

    made = []

    def build_weakly(slots, decode_batch):
        engine = build(slots, decode_batch)
        made.append(weakref.ref(engine.owner))
        return engine

    slots, rows, decode = fit_slots(build_weakly, 8, 2, accelerate)
    fits = {8: 8, 4: 4, 2: 2}.get(room, 8)
    assert (rows.value, decode.value) == (fits, 2) and hasattr(slots, "faster") == (room >= 2)
    assert built == {8: [(8, 2)], 4: [(8, 2), (4, 2)]}.get(room, [(8, 2), (4, 2), (2, 2)] + [(8, 2)] * (room < 2))
    assert rows.reason == ("generation.slots" if fits == 8 else "generation.slots 8 ran out of memory")
    assert [one() for one in made if one() is not None] == [slots.owner]
    slots.owner.make(2)


def test_memory_of_other_libraries_counts_too(monkeypatch):
    build, built = builder(8, 8, monkeypatch)

    def refused(slots, decode_batch):
        if slots > 2:
            raise RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED")
        return build(slots, decode_batch)

    assert fit_slots(refused, 4, 2)[1].value == 2


def test_other_errors_are_not_taken_for_missing_memory():
    def build(slots, decode_batch):
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        fit_slots(build, 4, 4)
