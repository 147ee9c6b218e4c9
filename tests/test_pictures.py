"""docs/pictures.py: the curves of the clip, and the two pictures."""

import sys

import pytest
from conftest import ROOT
from PIL import Image

sys.path.insert(0, str(ROOT / "docs"))
import pictures  # noqa: E402


def test_the_clipped_objective():
    """min(A ρ, A clip(ρ)), by hand."""
    ratios = [0.4, 0.8, 1.0, 1.25, 1.28, 1.8]
    assert pictures.objective(ratios, 1, 0.28) == pytest.approx([0.4, 0.8, 1.0, 1.25, 1.28, 1.28])
    assert pictures.objective(ratios, 1, 0.2) == pytest.approx([0.4, 0.8, 1.0, 1.2, 1.2, 1.2])
    assert pictures.objective(ratios, -1, 0.28) == pytest.approx([-0.8, -0.8, -1.0, -1.25, -1.28, -1.8])


def test_both_are_drawn(set_constants, monkeypatch, tmp_path):
    """Of a small step, whose groups, rewards, and updates are counted as they are."""
    monkeypatch.chdir(ROOT)
    set_constants(BATCH_SIZE=4, GROUP_SIZE=4, MINI_BATCHES=2, DAPO_EPOCHS=1, MAX_RESPONSE_LENGTH=40, DEVICE="cpu")
    steps, take = [], pictures.take_step
    monkeypatch.setattr(pictures, "take_step", lambda: steps.append(take()) or steps[0])
    pictures.main(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clip.png", "step.png"]
    assert all(min(Image.open(path).size) > 800 for path in tmp_path.iterdir())
    (taken,) = steps
    assert len(taken.sampled) == sum(len(kept) + len(dropped) for kept, dropped in taken.rounds)
    assert len(taken.batch) == taken.metrics["groups_trained"] and 1 <= taken.updates <= 2
    for response in taken.sampled[0]:
        assert -response.penalty == pytest.approx(max(0, len(response.tokens) - 8) / 32)
