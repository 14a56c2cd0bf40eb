"""The types of the public names, as a user's type checker sees them. mypy reads this file; nothing runs it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import assert_type

import numpy as np
import torch

import wasteddp

model = wasteddp.load("runs/mine", policy="policy.json")
assert_type(model, wasteddp.Model)
answers = model.predict(["photo.jpg", b"bytes", np.zeros((8, 8, 3), np.uint8)])
assert_type(answers, list[wasteddp.Answer])
assert_type(answers[0].class_name, str)
assert_type(answers[0].probability, float)
assert_type(answers[0].probabilities, Mapping[str, float])
assert_type(answers[0].bin, str | None)
assert_type(answers[0].decision, str | None)
assert_type(answers[0].unlikeness, float | None)

loader = wasteddp.TrainingLoader("shards/mine", batch_size=64)
for batch in loader:
    assert_type(batch, wasteddp.Batch)
    assert_type(batch.images_BCHW, torch.Tensor)
    assert_type(batch.labels_B, torch.Tensor)
