"""Near-duplicates: entries of one subject that say nearly what an earlier one of the same segment says.

They are masked where contents are read, not dropped on arrival: the mask is a function of the recipe and of the
subject's own entries in the segment, so that a replay, whatever has become a tombstone meanwhile, finds it anew, and
nobody's data decides whether another's is learned. Similarity is Jaccard's of the texts' five-letter pieces, estimated
by MinHash (Broder 1997).
"""

from collections.abc import Sequence

from riverdelta.core.curation import text_of

_PIECE = 5
_PERMUTATIONS = 128


def without_near_duplicates(
    contents: Sequence[bytes | None], subjects: Sequence[tuple[str, ...]], alike: float
) -> list[bytes | None]:
    """A segment's contents, None in place of those at least so `alike` to an earlier one about the same subjects.

    Entries about nobody are not compared. An `alike` of 0 compares nothing.
    """
    kept = list(contents)
    if not alike:
        return kept
    from datasketch import MinHash

    known: dict[tuple[str, ...], list[MinHash]] = {}
    for slot, (content, about) in enumerate(zip(contents, subjects, strict=True)):
        if content is None or not about:
            continue
        text = " ".join(text_of(content).lower().split())
        mark = MinHash(num_perm=_PERMUTATIONS, seed=1)
        mark.update_batch([text[at : at + _PIECE].encode() for at in range(max(1, len(text) - _PIECE + 1))])
        seen = known.setdefault(about, [])
        if any(mark.jaccard(other) >= alike for other in seen):
            kept[slot] = None
        else:
            seen.append(mark)
    return kept
