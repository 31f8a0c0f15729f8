"""Masks: the crop they define, how they grow, and what they mean on the latent grid."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import maximum_filter

from modules.data.masks import (
    Square,
    center_square,
    dilate,
    gray_background,
    latent_edit_mask,
    object_square,
    shrink,
)


def box_mask(height: int, width: int, top: int, bottom: int, left: int, right: int) -> np.ndarray:
    mask = np.zeros((height, width), dtype=bool)
    mask[top:bottom, left:right] = True
    return mask


def test_the_square_is_centered_on_the_object_with_its_margin():
    mask = box_mask(100, 200, 40, 60, 90, 130)  # 20 x 40, center (50, 110)
    assert object_square(mask, 0.0) == Square(90, 30, 40)
    assert object_square(mask, 0.25) == Square(80, 20, 60)


def test_the_square_moves_into_the_image_where_it_fits():
    assert object_square(box_mask(100, 200, 0, 20, 0, 40), 0.0) == Square(0, 0, 40)
    assert object_square(box_mask(100, 200, 90, 100, 160, 200), 0.0) == Square(160, 60, 40)


def test_the_square_stands_over_both_borders_where_it_is_longer_than_the_image():
    assert object_square(box_mask(20, 100, 5, 15, 10, 70), 0.0) == Square(10, -20, 60)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 29), st.integers(0, 39), st.integers(1, 20), st.integers(1, 20), st.floats(0, 1))
def test_the_object_is_always_inside_its_square(top, left, height, width, margin):
    mask = box_mask(30, 40, top, top + height, left, left + width)
    square = object_square(mask, margin)
    rows, columns = np.nonzero(mask)
    assert square.left <= columns.min() and columns.max() < square.left + square.side
    assert square.top <= rows.min() and rows.max() < square.top + square.side


def test_an_empty_mask_has_no_square():
    with pytest.raises(ValueError, match="empty mask"):
        object_square(np.zeros((4, 4), dtype=bool), 0.1)


def test_center_square():
    assert center_square(10, 4) == Square(3, 0, 4)
    assert center_square(4, 10) == Square(0, 3, 4)


def test_gray_background_keeps_the_object_and_nothing_else():
    pixels = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    mask = box_mask(4, 4, 1, 3, 1, 3)
    gray = gray_background(pixels, mask)
    assert (gray[mask] == pixels[mask]).all() and (gray[~mask] == 128).all() and gray.dtype == np.uint8


def test_shrink_takes_the_half_covered_and_never_loses_a_thin_object():
    mask = box_mask(8, 8, 0, 4, 0, 8)
    covered = np.array([[255, 127], [128, 0]], dtype=np.uint8)
    assert shrink(mask, 2, covered).tolist() == [[1, 0], [1, 0]]
    line = box_mask(8, 8, 6, 7, 0, 3)
    assert shrink(line, 2, np.full((2, 2), 30, dtype=np.uint8)).tolist() == [[0, 0], [1, 0]]
    assert shrink(np.zeros((8, 8), dtype=bool), 2, np.zeros((2, 2), dtype=np.uint8)).sum() == 0


@pytest.mark.parametrize("radius", [0, 1, 3])
def test_dilate_is_the_maximum_filter(radius):
    masks = (torch.rand(3, 17, 23, generator=torch.Generator().manual_seed(0)) < 0.05).to(torch.uint8)
    wanted = np.stack([maximum_filter(m, size=2 * radius + 1, mode="constant") for m in masks.numpy()])
    grown = dilate(masks, radius)
    assert grown.dtype == torch.uint8 and (grown.numpy() == wanted).all()


def test_latent_cells_of_an_object_touch_it_and_of_a_background_hold_none_of_it():
    mask = torch.zeros(1, 16, 16, dtype=torch.uint8)
    mask[0, 5, 5:9] = 1  # touches cells (1, 1) and (1, 2) of a 4 x 4 grid
    m_object = latent_edit_mask(mask, "object", 0, 4)
    assert m_object.dtype == torch.float32 and m_object.nonzero().tolist() == [[0, 1, 1], [0, 1, 2]]
    m_background = latent_edit_mask(mask, "background", 0, 4)
    assert torch.equal(m_background, 1 - m_object)


def test_the_latent_masks_equal_their_definition_cell_by_cell():
    masks = (torch.rand(4, 32, 32, generator=torch.Generator().manual_seed(1)) < 0.02).to(torch.uint8)
    grown = dilate(masks, 2)
    for edit, editable, rule in (("object", grown, torch.Tensor.any), ("background", 1 - grown, torch.Tensor.all)):
        found = latent_edit_mask(masks, edit, 2, 8)
        for n in range(4):
            for row in range(8):
                for column in range(8):
                    cell = editable[n, row * 4 : row * 4 + 4, column * 4 : column * 4 + 4].bool()
                    assert found[n, row, column] == float(rule(cell))


def test_latent_mask_refuses_what_it_cannot_mean():
    masks = torch.zeros(1, 16, 16)
    with pytest.raises(ValueError, match="edit is 'all'"):
        latent_edit_mask(masks, "all", 0, 4)
    with pytest.raises(ValueError, match="16 x 16 pixels do not divide into a latent grid of 5"):
        latent_edit_mask(masks, "object", 0, 5)
