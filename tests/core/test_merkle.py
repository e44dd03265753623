"""Merkle trees against the vectors of RFC 6962's reference implementation, and every path against every root."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from riverdelta.core import merkle

# Certificate Transparency's own test data (merkle_tree_test in its reference repository).
LEAVES = [
    bytes.fromhex(text)
    for text in ("", "00", "10", "2021", "3031", "40414243", "5051525354555657", "606162636465666768696a6b6c6d6e6f")
]
ROOTS = [
    "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
]


@pytest.mark.parametrize("count", range(9))
def test_the_roots_of_the_reference(count: int) -> None:
    assert merkle.root([merkle.leaf(data) for data in LEAVES[:count]]).hex() == ROOTS[count]


@given(st.integers(1, 70), st.data())
def test_a_path_leads_to_the_root_from_its_place_alone(count: int, data: st.DataObject) -> None:
    leaves = [merkle.leaf(bytes([number])) for number in range(count)]
    root = merkle.root(leaves)
    place = data.draw(st.integers(0, count - 1))
    path = merkle.path(leaves, place)
    assert merkle.climb(leaves[place], place, count, path) == root
    other = data.draw(st.integers(0, count - 1))
    if other != place:
        assert merkle.climb(leaves[place], other, count, path) != root
        assert merkle.climb(leaves[other], place, count, path) != root
    assert merkle.climb(leaves[place], place, count, [*path, root]) is None
    assert merkle.climb(leaves[place], count, count, path) is None
    if path:
        assert merkle.climb(leaves[place], place, count, path[:-1]) is None
        wrong = data.draw(st.integers(0, len(path) - 1))
        damaged = [*path[:wrong], bytes(32), *path[wrong + 1 :]]
        assert merkle.climb(leaves[place], place, count, damaged) != root
