"""What can be done with any source keeps what is known about it."""

import numpy as np
import pytest

from jaxdl.data import Cached, CaptionedImage, Info, Mapped, Source, Subset, evenly_spaced, report_left_out


class Counting(Source[CaptionedImage]):
    """Four images of 100 bytes that know how often they were read."""

    def __init__(self):
        self.info, self.reads = Info(spec="toy", classes=("a", "b")), 0

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> CaptionedImage:
        if not 0 <= index < 4:
            raise IndexError(index)
        self.reads += 1
        return CaptionedImage(np.full((10, 10, 1), index, np.uint8), (str(index),))

    def annotations(self, index: int) -> CaptionedImage:
        return CaptionedImage(np.zeros((0, 0, 1), np.uint8), (str(index),))


def test_a_cache_reads_once_and_keeps_to_its_room():
    source = Counting()
    cached = Cached(source, room=250)
    for _ in range(3):
        assert [cached[i].image[0, 0, 0] for i in range(4)] == [0, 1, 2, 3]
    assert source.reads == 2 + 3 * 2


@pytest.mark.parametrize(
    "wrap",
    [Cached, lambda s: Subset(s, [0, 1, 2, 3]), lambda s: Mapped(s, lambda e: e), lambda s: Cached(Mapped(s, lambda e: e))],
)
def test_a_wrapped_source_keeps_its_info_and_its_annotations_need_no_image(wrap):
    source = Counting()
    wrapped = wrap(source)
    assert wrapped.info == source.info and len(wrapped) == 4
    assert [wrapped.annotations(i).captions for i in range(4)] == [("0",), ("1",), ("2",), ("3",)]
    assert source.reads == 0
    assert [element.captions for element in wrapped] == [("0",), ("1",), ("2",), ("3",)] and source.reads == 4


def test_what_is_not_wanted_is_left_out_and_told_without_reading_an_image():
    source = Counting()
    even = source.where(lambda e: int(e.captions[0]) % 2 == 0, "are odd")
    none = even.where(lambda e: e.captions == ("0",), "are no zero")
    assert source.reads == 0 and [e.captions for e in even] == [("0",), ("2",)]
    assert (even.info.left_out, none.info.left_out, none.info.classes) == (2, 3, ("a", "b"))
    assert report_left_out(source, even, Cached(none)) == [
        "toy: 2 of 4 are odd and are left out",
        "toy: 3 of 4 are no zero and are left out",
    ]


@pytest.mark.parametrize(("length", "most", "chosen"), [(10, 4, [0, 3, 6, 9]), (3, 5, [0, 1, 2]), (7, 1, [0]), (0, 3, [])])
def test_evenly_spaced_elements_have_the_first_and_the_last_among_them(length, most, chosen):
    assert list(evenly_spaced(range(length), most)) == chosen
