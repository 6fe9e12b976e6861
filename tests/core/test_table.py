# SPDX-License-Identifier: Apache-2.0
"""Entries found by the qualified name of a type or of one of its bases."""

import gc
import weakref

from graft.core.ops import TypeTable


class Base:
    pass


class Middle(Base):
    pass


class Leaf(Middle):
    pass


class Other:
    pass


def name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def test_a_type_is_found_by_its_qualified_name():
    table = TypeTable({name(Base): 1})
    assert table.find(Base) == 1
    assert table.find(Other) is None


def test_subclasses_take_the_entry_of_their_nearest_base():
    table = TypeTable({name(Base): "base", name(Middle): "middle"})
    assert [table.find(c) for c in (Base, Middle, Leaf)] == ["base", "middle", "middle"]


def test_the_first_base_in_method_resolution_order_decides():
    class Both(Other, Base):
        pass

    table = TypeTable({name(Base): "base", name(Other): "other"})
    assert table.find(Both) == "other"


def test_an_entry_added_later_is_seen_by_types_already_looked_up():
    table = TypeTable({name(Base): "base"})
    assert table.find(Leaf) == "base"
    table.add(name(Leaf), "leaf")
    assert table.find(Leaf) == "leaf" and table.find(Middle) == "base"


def test_a_short_name_or_a_namesake_elsewhere_is_not_the_type():
    table = TypeTable({"Base": 1, "elsewhere.Base": 2})
    assert table.find(Base) is None


def test_falsy_entries_and_rows_given_in_are_kept():
    rows = {name(Base): 0}
    table = TypeTable(rows)
    rows[name(Base)] = 7
    assert table.find(Leaf) == 0


def test_a_looked_up_type_can_be_collected():
    table = TypeTable({name(Base): 1})
    local = type("Local", (Base,), {})
    assert table.find(local) == 1
    ref = weakref.ref(local)
    del local
    gc.collect()
    assert ref() is None


def test_a_new_type_in_the_memory_of_an_old_one_is_another():
    table = TypeTable({name(Base): 1})
    old = [type("Local", (), {}) for _ in range(200)]
    assert {table.find(local) for local in old} == {None}
    ids = {id(local) for local in old}
    del old
    gc.collect()
    new = [type("Local", (Base,), {}) for _ in range(200)]
    assert ids & {id(local) for local in new}, "no two had one id: the test sees nothing"
    assert {(table.find(local), table.origin(local)) for local in new} == {(1, Base)}
