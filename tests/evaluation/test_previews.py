"""Pictures of an evaluation show what is saved, not what the network gave."""

import numpy as np
import torch
from custom.evaluation import Previews
from monai.data import DataLoader
from monai.engines import SupervisedEvaluator
from monai.transforms import Compose, CopyItemsd, Lambdad, Zoomd


def drawn(tmp_path, monkeypatch, postprocessing, label, **options):
    sheets = {}

    def keep(path, rows, vessel_labels):
        sheets[path.name] = list(rows)

    monkeypatch.setattr("custom.evaluation.handlers.save_sheet", keep)
    cases = [{"image": torch.full((1, 4, 4, 4), float(i)), "label": label, "case": f"c{i}"} for i in range(3)]
    SupervisedEvaluator(
        device=torch.device("cpu"),
        val_data_loader=DataLoader(cases, batch_size=1),
        network=torch.nn.Identity(),
        postprocessing=postprocessing,
        val_handlers=[Previews(str(tmp_path), vessel_labels=[1], cases=2, **options)],
    ).run()
    return sheets


def test_a_picture_shows_the_image_after_its_postprocessing_on_the_grid_of_its_label(tmp_path, monkeypatch):
    finish = Compose(
        [Lambdad("pred", lambda v: v + 10), CopyItemsd("pred", names="picture"), Zoomd("pred", 2.0, keep_size=False)]
    )
    sheets = drawn(tmp_path, monkeypatch, finish, torch.ones(1, 4, 4, 4), key="picture", by_case=True)
    assert list(sheets) == ["c0.png", "c1.png"]
    for i, name in enumerate(sheets):
        ((title, image, label),) = sheets[name]
        assert title == f"c{i}: rendered"
        np.testing.assert_array_equal(image, np.full((4, 4, 4), 10.0 + i))
        assert label.shape == image.shape


def test_the_truth_stands_above_the_rendering(tmp_path, monkeypatch):
    truth = torch.stack([torch.full((4, 4, 4), 7.0), torch.ones(4, 4, 4)])
    sheets = drawn(tmp_path, monkeypatch, None, truth)
    (rows,) = sheets.values()
    assert [title for title, _, _ in rows] == ["c0: true", "c0: rendered", "c1: true", "c1: rendered"]
    assert (rows[0][1] == 7).all()
    assert (rows[0][2] == 1).all()
