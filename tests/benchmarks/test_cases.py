"""The table of tests, and choosing among them."""

from __future__ import annotations

from benchmarks.cases import CACHED, CASES, OTHERS, Case, chosen, select


def test_every_test_has_a_name_of_its_own() -> None:
    names = [case.name for case in CASES] + list(OTHERS)
    assert len(set(names)) == len(names)
    assert len({case.title for case in CASES}) == len(CASES)


def test_a_name_says_the_load() -> None:
    case = Case("tmpfs", "randwrite", 32, queues=2, flush_every=32, sleeping=True)
    assert case.name == "tmpfs/randwrite-4k-d32-flush32-q2-sleeping"


def test_files_in_the_page_cache_are_all_that_is_neither_memory_nor_a_device() -> None:
    others = {case.name for case in CASES} - CACHED
    assert {name.split("/")[0] for name in CACHED} == {"tmpfs", "ext4"}
    assert {name.split("/")[0] for name in others} == {"direct", "null", "memory"}


def test_without_patterns_all_are_chosen() -> None:
    assert select([]) == list(CASES)
    assert chosen("footprint", [])


def test_a_pattern_is_a_part_or_a_glob() -> None:
    assert {case.place for case in select(["ext4"])} == {"ext4"}
    assert select(["tmpfs/randread-4k-d1"])[0].name == "tmpfs/randread-4k-d1"
    assert [case.name for case in select(["null/*-d1"])] == ["null/randread-4k-d1"]
    assert select(["nothing"]) == []


def test_every_write_says_that_it_writes() -> None:
    assert {case.pattern for case in CASES if case.writes} == {"randwrite", "write"}
