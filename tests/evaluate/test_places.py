"""The hit rate of the places to proofread: places at faults of the tree are hits, others are not."""

from __future__ import annotations

import numpy as np

from hpc_neuro.core.morphology import Tree, build_tree, concatenate_trees, empty_tree
from hpc_neuro.evaluate.places import ALL, HitCount, add_counts, count_hits, render_section


def line(start: tuple[float, float, float], stop: tuple[float, float, float]) -> Tree:
    points = np.linspace(start, stop, 21)
    return build_tree(points, np.arange(21) - 1)


def test_places_at_faults_are_hits() -> None:
    # Gold: a cable of 200 voxels and a branch at its end. Traced: the cable, and a false one beside its start.
    shared = line((10, 10, 0), (10, 10, 200))
    missed, false = line((10, 14, 200), (10, 60, 200)), line((10, 40, 0), (10, 40, 50))
    gold, tree = concatenate_trees([shared, missed]), concatenate_trees([shared, false])
    places = {
        "end": np.array([[10.0, 10, 200], [10, 10, 100]]),
        "gap": np.array([[10.0, 40, 25]]),
    }
    counts = count_hits(places, tree, gold, tolerance=4.0)
    base = counts[ALL].base_rate
    assert counts["end"] == HitCount(places=2, hits=1, false_cable=0, missed_cable=1, expected=2 * base)
    assert counts["gap"] == HitCount(places=1, hits=1, false_cable=1, missed_cable=0, expected=base)
    assert counts[ALL].places == 3
    assert counts[ALL].rate == 2 / 3

    # Of 250 voxels of cable 50 are false, and 7 lie within 8 voxels of the missed branch, which begins 4 voxels off.
    assert abs(base - 57 / 250) < 0.03
    assert count_hits(places, tree, gold, tolerance=4.0) == counts

    total = add_counts([counts, counts])
    assert list(total) == ["end", "gap", ALL]
    assert total["end"].base_rate == base
    assert total["end"].places == 4
    assert "hit where the tree is wrong within 8 voxels" in render_section(total, 4.0)


def test_a_right_tree_has_no_hits_and_an_empty_one_misses_all() -> None:
    gold = line((10, 10, 0), (10, 10, 50))
    places = {"turn": np.array([[10.0, 10, 20]])}
    counts = count_hits(places, gold, gold, 4.0)
    assert counts[ALL].hits == counts[ALL].expected == 0
    nothing = count_hits({}, empty_tree(), gold, 4.0)
    assert nothing[ALL].places == nothing[ALL].base_rate == 0
    assert count_hits(places, empty_tree(), gold, 4.0)["turn"].missed_cable == 1
